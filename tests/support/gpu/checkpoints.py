"""The driver's checkpoint calls by ctypes, apart from rewarm's: what a person does by hand, and what tests look at."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from support.gpu import machine

RUNNING, LOCKED, CHECKPOINTED, FAILED = range(4)


class Failed(Exception):
    """A call, the process, and the CUresult."""


class Checkpoints:
    """Calls about processes by host pid. Raises OSError without a driver, Failed for what it answers."""

    def __init__(self) -> None:
        self._lib = ctypes.CDLL(str(machine.driver_library()))

    def _call(self, name: str, pid: int, argument: object) -> None:
        code = getattr(self._lib, f"cuCheckpointProcess{name}")(ctypes.c_int(pid), argument)
        if code:
            raise Failed(f"{name} of process {pid}: CUresult {code}")

    def state(self, pid: int) -> int | None:
        """None for a process that does not use CUDA, or is gone."""
        found = ctypes.c_int(-1)
        try:
            self._call("GetState", pid, ctypes.byref(found))
        except Failed:
            return None
        return found.value

    def using(self, pids: Iterable[int]) -> list[int]:
        """Those that use CUDA."""
        return [pid for pid in pids if self.state(pid) is not None]

    def suspend(self, pids: list[int]) -> float:
        """Lock all, then checkpoint all, at once as far as the driver does; returns the seconds."""
        began = time.monotonic()
        _each(pids, lambda pid: self._call("Lock", pid, _arguments(10000)))
        _each(pids, lambda pid: self._call("Checkpoint", pid, _arguments()))
        return time.monotonic() - began

    def resume(self, pids: list[int]) -> float:
        """Restore all, then unlock all; returns the seconds."""
        began = time.monotonic()
        _each(pids, lambda pid: self._call("Restore", pid, _arguments()))
        _each(pids, lambda pid: self._call("Unlock", pid, _arguments()))
        return time.monotonic() - began

    def wait_checkpointed(self, pids: list[int], states: tuple[int, ...], timeout: float) -> bool:
        """Looks until one of the processes is in one of the states; False when time is up."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            if any(self.state(pid) in states for pid in pids):
                return True
            time.sleep(0.001)
        return False


class NoCheckpoints(Checkpoints):
    """On a machine without a GPU: no process uses one."""

    def __init__(self) -> None:
        """Nothing is loaded."""

    def state(self, pid: int) -> int | None:
        return None


def here() -> Checkpoints:
    return NoCheckpoints() if machine.FAKE else Checkpoints()


def _arguments(milliseconds: int = 0) -> ctypes.Array[ctypes.c_uint]:
    """Any of the calls' structures: 64 bytes, the time-out first where there is one."""
    return (ctypes.c_uint * 16)(milliseconds)


def _each(pids: list[int], call: Callable[[int], None]) -> None:
    if pids:
        with ThreadPoolExecutor(len(pids)) as pool:
            list(pool.map(call, pids))
