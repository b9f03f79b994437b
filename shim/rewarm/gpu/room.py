"""Whether GPUs have the room for device memory that is to come back: the driver does not undo a restore that runs out
of it, and the process is lost."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from rewarm import aside, processes
from rewarm.errors import GpuError
from rewarm_native import cuda
from rewarm_native.cuda import CudaError, Driver

from .contexts import Context

if TYPE_CHECKING:
    from .nvml import Nvml

ALL = 0
"""In the place of a pid: all processes together, where NVML does not say what each of them has."""
Needed = Mapping[str, Mapping[int, int]]
"""By the GPU's UUID and the process's host pid: bytes of device memory."""
_PAUSE = 0.2
_LONGEST_STATE = 10.0
"""Seconds that the driver may take to tell a process's state: a call that goes on in it may have to end first."""
_SHORT = 0.5


def with_imported(told: Needed, taken: Needed, imported: Needed, freed: Mapping[str, int]) -> Needed:
    """What processes have of each GPU, as NVML has `told`, where some of what was `taken` of them is `imported` from
    another process, as what a restore has brought.

    Whether NVML counts that, nobody says. What the driver's checkpoint has `freed` on each GPU is the rest of all, so
    the answer that comes nearer to it is taken.
    """
    found: dict[str, Mapping[int, int]] = {}
    for uuid, sizes in told.items():
        more = {pid: size + imported.get(uuid, {}).get(pid, 0) for pid, size in sizes.items()}
        rest = [
            sum(max(0, size - taken.get(uuid, {}).get(pid, 0)) for pid, size in one.items()) for one in (sizes, more)
        ]
        nearer = abs(rest[1] - freed[uuid]) < abs(rest[0] - freed[uuid])
        # Neighbours may have freed some of it: what was not seen to come free is not asked for.
        over = max(0, rest[1] - max(rest[0], freed[uuid]))
        found[uuid] = _less(more, over) if nearer else sizes
    return found


def _less(sizes: Mapping[int, int], bytes_less: int) -> dict[int, int]:
    found = {}
    for pid, size in sizes.items():
        taken = min(size, bytes_less)
        found[pid] = size - taken
        bytes_less -= taken
    return found


class _States:
    """Whose memory is off the GPUs, as far as the driver says it: one that does not answer holds up no other."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._tasks: dict[int, aside.Task] = {}
        self._states: dict[int, int] = {}

    def off(self, pids: Sequence[int]) -> list[int]:
        """Those of the processes. Who has not answered is waited for the first time only."""
        first = not self._tasks
        for pid in pids:
            if pid not in self._tasks or self._tasks[pid].wait(0):
                self._tasks[pid] = aside.Task(partial(self._ask, pid), "state")
                self._tasks[pid].start()
        end = time.monotonic() + (_LONGEST_STATE if first else _SHORT)
        answered = [pid for pid in pids if self._tasks[pid].wait(max(0.0, end - time.monotonic()))]
        return [pid for pid in answered if self._states.get(pid) == cuda.CHECKPOINTED]

    def _ask(self, pid: int) -> None:
        self._states.pop(pid, None)
        with suppress(CudaError):  # it has ended
            self._states[pid] = self._driver.state(pid)


def short(nvml: Nvml, uuid: str, needed: int) -> str:
    """How much is needed and free on a GPU, in words; "" if it is enough. Raises GpuError if NVML does not say."""
    free = nvml.free_bytes(uuid) if needed else 0
    return (
        "" if free >= needed else f"{needed} bytes ({needed >> 20} MiB) are needed, {free} ({free >> 20} MiB) are free"
    )


def _missing(states: _States, nvml: Nvml, contexts: Sequence[Context], needed: Needed) -> str:
    """On which GPU there is no room for what those of the processes had that are off it now; "" if there is.

    Who has its memory back needs none. Of processes of which only the sum is known, nothing is known any more once one
    has it back. Raises GpuError if NVML does not say what is free.
    """
    alive = [context.pid for context in contexts if processes.start_time(context.pid) == context.start_time]
    off = states.off(alive)
    for uuid, sizes in needed.items():
        together = sizes.get(ALL, 0) if off == alive else 0
        text = short(nvml, uuid, sum(sizes.get(pid, 0) for pid in off) + (together if off else 0))
        if text:
            return f"on {uuid} {text}"
    return ""


def wait(driver: Driver, nvml: Nvml, contexts: Sequence[Context], needed: Needed, limit: float) -> None:
    """Wait until there is room, at most `limit` seconds. Raises GpuError if there is none then.

    Where NVML does not answer, the driver is to try.
    """
    end = time.monotonic() + limit
    states = _States(driver)
    try:
        while text := aside.run(lambda: _missing(states, nvml, contexts, needed), limit + _LONGEST_STATE):
            if time.monotonic() > end:
                break
            time.sleep(_PAUSE)
    except (GpuError, TimeoutError):
        return
    if text:
        raise GpuError(
            "give back GPU memory of", "the captured processes", text, "end what has taken it: they wait for it"
        )
