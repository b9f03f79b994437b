"""Lock, checkpoint, restore and unlock of all CUDA processes of a container: all of them, or none.

The driver works on several processes at once (measured: docs/decisions/0013), so every step has a thread for each. What
a process needs to go on is asked of the driver, not remembered: `go_on` may be called at any time, and again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

from rewarm import processes
from rewarm.aside import Task
from rewarm.errors import GpuError
from rewarm_native import cuda
from rewarm_native.cuda import CudaError, Driver

from .contexts import Context

Pairs = Sequence[tuple[bytes, bytes]]
"""(old, new) UUIDs of 16 bytes of every GPU that the processes see; empty if they are the same."""

_MARGIN = 5.0
"""Seconds that a call may take beyond the time that it was given."""
_CAUSES = {
    2: ("the GPU has not enough free memory", "free GPU memory, or restore on another GPU"),
    cuda.NOT_SUPPORTED: (
        "it uses what the driver cannot checkpoint, such as managed memory, CUDA IPC or MPS",
        "turn that off in the container",
    ),
    101: ("a GPU of the device map is not there", "look at `rewarm inspect` and `nvidia-smi -L`"),
    cuda.OPERATING_SYSTEM: ("it has ended", "look into the container's log"),
}


def lock(driver: Driver, contexts: Sequence[Context], timeout: float) -> None:
    """Lock all, waiting at most `timeout` seconds for the work that their GPUs have left.

    Raises GpuError naming the first that cannot be; some are locked then, and `go_on` is for the caller to do.
    """
    milliseconds = max(1, int(timeout * 1000))

    def one(context: Context) -> None:
        _check_alive(context, "Lock")
        driver.lock(context.pid, milliseconds)

    _raise_first(_each(contexts, one, timeout + _MARGIN), "lock CUDA in", timeout)


def checkpoint(driver: Driver, contexts: Sequence[Context], limit: float) -> None:
    """Move the device memory of all locked processes into their own, within `limit` seconds.

    Raises GpuError naming the first that cannot be; `go_on` is for the caller to do then.
    """

    def one(context: Context) -> None:
        _check_alive(context, "Checkpoint")
        driver.checkpoint(context.pid)

    _raise_first(_each(contexts, one, limit), "checkpoint GPU memory of")


def restore(driver: Driver, contexts: Sequence[Context], pairs: Pairs = ()) -> None:
    """Give all processes back their device memory, and let them go on once all have it.

    They have to be able to run. Raises GpuError; those that have it already stay locked then.
    """

    def one(context: Context) -> None:
        _check_alive(context, "Restore")
        driver.restore(context.pid, pairs)

    _raise_first(_each(contexts, one), "restore GPU memory of", pairs=pairs)
    _raise_first(_each(contexts, lambda context: driver.unlock(context.pid)), "unlock CUDA in")


def go_on(driver: Driver, contexts: Sequence[Context], patience: float = 0.0, limit: float | None = None) -> None:
    """Whatever state they are in, let the processes that still live go on: on the GPUs that they had.

    A call of somebody who was killed may still be at work in a process: it is tried again for `patience` seconds.
    Raises GpuError naming the first that cannot, or that the driver has not answered for within `limit` seconds; the
    others go on.
    """
    end = time.monotonic() + patience
    while (failures := _each(contexts, lambda context: _go_on(driver, context), limit)) and time.monotonic() < end:
        time.sleep(0.1)
    _raise_first(failures, "resume CUDA in")


def _check_alive(context: Context, call: str) -> None:
    """Its pid may be another process's by now, which has nothing to do with the container."""
    if processes.start_time(context.pid) != context.start_time:
        raise CudaError(cuda.OPERATING_SYSTEM, "CUDA_ERROR_OPERATING_SYSTEM", call, context.pid)


def _go_on(driver: Driver, context: Context) -> None:
    if processes.start_time(context.pid) != context.start_time:
        return
    state = driver.state(context.pid)
    if state == cuda.CHECKPOINTED:
        driver.restore(context.pid)
    if state in (cuda.CHECKPOINTED, cuda.LOCKED):
        driver.unlock(context.pid)
    elif state == cuda.FAILED:
        raise CudaError(-1, "its CUDA state is `failed`, which the driver does not undo", "GetState", context.pid)


_Failures = list[tuple[Context, Exception]]


def _each(contexts: Sequence[Context], work: Callable[[Context], None], limit: float | None = None) -> _Failures:
    """Do it with every process at once; the failures, in the order of the processes. One that has not ended within
    `limit` seconds is a failure: it is left to itself, in the driver."""
    failures: dict[int, Exception] = {}

    def call(at: int, context: Context) -> None:
        try:
            work(context)
        except Exception as error:
            failures[at] = error

    tasks = [Task(partial(call, at, context), "cuda") for at, context in enumerate(contexts)]
    for task in tasks:
        task.start()
    end = None if limit is None else time.monotonic() + limit
    for at, task in enumerate(tasks):
        if not task.wait(None if end is None else max(0.0, end - time.monotonic())):
            failures[at] = TimeoutError(f"the driver has not answered within {limit:g} s")
    return [(contexts[at], failures[at]) for at in sorted(failures)]


def _raise_first(failures: _Failures, operation: str, timeout: float = 0.0, pairs: Pairs = ()) -> None:
    for context, error in failures:
        if not isinstance(error, CudaError):
            cause = str(error) if isinstance(error, TimeoutError) else f"internal error {error!r}"
            raise GpuError(operation, str(context), cause, "look for Xid lines in `dmesg`") from error
        cause, next_step = _CAUSES.get(error.code, ("", "look for Xid lines in `dmesg`"))
        if error.code == cuda.INVALID_VALUE and error.call.endswith("Restore"):
            cause = "it has imported memory of another process by CUDA IPC, as it seems"
            next_step = "restart the container"
            if pairs:
                cause += ", or the driver does not take the device map"
        if error.code == cuda.NOT_READY:
            cause = f"its GPU was still busy after {timeout:g} s; it runs on"
            next_step = "capture it when it is idle, or raise `gpu_lock_timeout` in the settings"
        raise GpuError(operation, str(context), f"{error.name}{': ' + cause if cause else ''}", next_step) from None
