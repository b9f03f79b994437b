"""Programs that stand still while the driver works in them.

The driver does its work in threads of the process, and so does the device memory library; the program itself is not to
run while its device memory is not there. So the process is stopped by a signal, as a whole, and those few threads are
made to run all the same, by a tracer. Whatever becomes of the tracer, they stop again with the others: a program never
runs by accident, and whoever comes next finds it stopped.
"""

from __future__ import annotations

import errno
import signal
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from types import TracebackType

from rewarm import processes
from rewarm.aside import PATIENCE, Task
from rewarm.errors import GpuError
from rewarm_native import rouse
from rewarm_native.cuda import Driver

from . import threads

LIBRARY_THREAD = "rewarm-mem-"
"""How the name of the library's own thread begins (native/device_memory)."""
_DRIVER_THREADS = "cuda"
"""The same for the threads of libcuda (driver 580)."""
_EVERY_SIGNAL = (1 << 64) - 1 & ~(1 << signal.SIGKILL - 1 | 1 << signal.SIGSTOP - 1)
_PAUSE, _AGAIN = 0.0005, 0.1
_OPERATION = "hold still"


def stop(pids: Iterable[int], limit: float) -> None:
    """Stop processes (host pids) with SIGSTOP, and wait at most `limit` seconds until no thread of them runs.

    The signal is sent again to those that run on: a thread that a debugger traces may have taken it, and where the
    debugger keeps it the others never hear of it (ptrace(2), signal-delivery-stop).

    Raises GpuError that names the one that does; whoever stopped them lets them go on (`go_on`).
    """
    found = list(pids)
    for pid in found:
        processes.send(pid, signal.SIGSTOP)
    end = time.monotonic() + limit
    for pid in found:
        again = time.monotonic() + _AGAIN
        while tid := _moving(pid):
            now = time.monotonic()
            if now > again:
                processes.send(pid, signal.SIGSTOP)
                again = now + _AGAIN
            if now > end:
                state = processes.stat(pid, tid)
                cause = f"its thread {tid} has not stopped within {limit:g} s (state {state.state if state else '?'})"
                raise GpuError(_OPERATION, _name(pid), cause, f"look at /proc/{pid}/task/{tid}/stack")
            time.sleep(_PAUSE)


def go_on(pids: Iterable[int]) -> None:
    """Let stopped processes run again."""
    for pid in pids:
        processes.send(pid, signal.SIGCONT)


class Awake:
    """Context manager: of stopped processes, only the threads of the driver and of the library run inside."""

    def __init__(self, driver: Driver, pids: Sequence[int]) -> None:
        """`pids`: host pids of processes that are stopped."""
        self._driver = driver
        self._pids = pids
        self._masks: dict[int, int] = {}
        self._ready = threading.Event()
        self._end = threading.Event()
        self._failure: BaseException | None = None
        self._task = Task(self._work, "awake")

    def __enter__(self) -> Awake:
        """Raises GpuError that names the first process in which no such thread can be made to run."""
        try:
            self._task.start()
            self._ready.wait()
            if self._failure is not None:
                raise self._failure
        except BaseException:
            self._end.set()
            self._task.wait(PATIENCE)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self._end.set()
        self._task.wait(PATIENCE)  # the end of its thread lets go of what hangs

    def _work(self) -> None:
        try:
            for pid in self._pids:
                self._rouse(pid)
        except BaseException as error:
            self._failure = error
            self._end.set()
        self._ready.set()
        with suppress(OSError):  # who waits for the threads that do not go on will say so
            while not self._end.wait(_PAUSE):
                for tid in rouse.keep_awake():
                    # Of a thread that was born since: it has the mask of who made it.
                    self._masks.setdefault(tid, 0)
        for tid, mask in self._masks.items():
            with suppress(OSError):  # it has ended, or the end of this thread lets it go
                rouse.let_sleep(tid, mask)

    def _rouse(self, pid: int) -> None:
        found = self._wanted(pid)
        for tid in found:
            try:
                mask = rouse.rouse(tid)
                # Left by a tracer that was killed: libcuda's own threads block nothing (driver 580).
                left = mask == _EVERY_SIGNAL and not threads.name(pid, tid).startswith(LIBRARY_THREAD)
                self._masks[tid] = 0 if left else mask
            except OSError as error:
                if error.errno == errno.ESRCH:
                    continue
                next_step = "rewarm needs CAP_SYS_PTRACE, and no debugger may be attached"
                raise GpuError("have run", f"thread {tid} of {_name(pid)}", str(error.strerror), next_step) from None
        if not self._masks.keys() & set(found):
            raise GpuError("have run", _name(pid), "it has no thread of the driver", "look at /proc/PID/task/*/comm")

    def _wanted(self, pid: int) -> list[int]:
        own = [threads.of_number(*pair) for pair in threads.of_driver(self._driver, [pid])]
        # A program's threads have the name of its executable, and that may be anything.
        common = threads.name(pid, pid)
        found = []
        for tid in processes.threads(pid):
            name = threads.name(pid, tid)
            if tid in own or (name != common and name.startswith((_DRIVER_THREADS, LIBRARY_THREAD))):
                found.append(tid)
        return found


def _moving(pid: int) -> int:
    """A thread of the process that runs, 0 if there is none."""
    for tid in processes.threads(pid):
        found = processes.stat(pid, tid)
        if found is not None and found.state not in "TtZX":
            return tid
    return 0


def _name(pid: int) -> str:
    return f"process {pid} ({processes.command(pid)})"
