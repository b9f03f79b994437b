"""The threads that do the driver's work in processes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rewarm import processes

if TYPE_CHECKING:
    from rewarm_native.cuda import Driver


def of_driver(driver: Driver, pids: Iterable[int]) -> list[tuple[int, int]]:
    """Pid (host) and tid of each, as the driver numbers it; without those that it says nothing of."""
    from rewarm_native.cuda import CudaError

    found = []
    for pid in pids:
        try:
            number = driver.restore_thread(pid)
        except CudaError:
            continue
        if number is not None:
            found.append((pid, number))
    return found


def of_number(pid: int, number: int) -> int | None:
    """The thread of a process (host pid) with this number: on the host, or else in the process's own pid namespace.

    None if it has none. Which of the two the driver says is not documented.
    """
    tids = processes.threads(pid)
    if number in tids:
        return number
    return next((tid for tid in tids if processes.namespace_pid(pid, tid) == number), None)


def name(pid: int, tid: int) -> str:
    """A thread's name (15 bytes at most), "" if it is gone."""
    try:
        with open(f"/proc/{pid}/task/{tid}/comm", encoding="utf-8", errors="replace", newline="\n") as file:
            return file.read().rstrip("\n")
    except (FileNotFoundError, ProcessLookupError):
        return ""
