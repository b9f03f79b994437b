"""Doing something in a thread while the main thread waits in a way that a signal can end.

A read of a share that hangs is not interrupted by a signal that has a handler (FUSE and NFS wait for the server; only
a fatal signal ends that): in the main thread it would hold up the deadline for ever.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

from rewarm.errors import RestoreError

T = TypeVar("T")

PATIENCE = 1.0
"""Seconds in which a thread that was told to end does so, unless it hangs."""
_MOMENT = 0.2
"""Seconds in which one that nobody waited for ends, such as the one that loads NVML."""


class Task:
    """Work in a thread of its own, which says itself when it is over.

    Thread.join does not: when a signal's handler raises out of it, Python 3.11 takes the thread for ended for good
    (threading.py, _wait_for_tstate_lock), and who cleans up next would not wait for it.
    """

    def __init__(self, work: Callable[[], object], name: str) -> None:
        self._work = work
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Raises RestoreError if no thread can be made."""
        _begun.append(self)
        try:
            self._thread.start()
        except RuntimeError as error:
            _begun.remove(self)
            next_step = "see the limits of processes and memory of who calls rewarm"
            raise RestoreError("start thread", self._thread.name, str(error), next_step) from None

    def wait(self, seconds: float | None = None) -> bool:
        """Wait for its end, however long or so many seconds; whether it has ended. A handler's exception passes."""
        return self._over.wait(seconds)

    def _run(self) -> None:
        try:
            self._work()
        finally:
            self._over.set()


_begun: list[Task] = []
"""Tasks in the order of their start, but for those that were seen to be over."""
_left: list[Task] = []


def run(work: Callable[[], T], limit: float | None = None) -> T:
    """What `work` returns or raises. An exception of a signal handler comes through at once, and leaves the thread.

    Raises TimeoutError, and leaves it as well, if it takes more than `limit` seconds.
    """
    results: list[T] = []
    failures: list[BaseException] = []

    def call() -> None:
        try:
            results.append(work())
        except BaseException as error:
            failures.append(error)

    task = Task(call, "aside")
    _left.append(task)
    task.start()
    if not task.wait(limit):
        raise TimeoutError(f"no answer within {limit:g} s")
    _left.remove(task)
    if failures:
        raise failures[0]
    return results[0]


def settle() -> None:
    """Wait for what `run` has left, as long as it is worth it: it must not go on writing where others clean up."""
    wait(_left)


def hangs() -> bool:
    """Whether any task is not over, even in a moment: then this process may not come to its end when it wants to."""
    end = time.monotonic() + _MOMENT
    _begun[:] = [task for task in _begun if not task.wait(max(0.0, end - time.monotonic()))]
    return bool(_begun)


def wait(tasks: Iterable[Task]) -> bool:
    """Wait for tasks that were told to end; those that hang, however many, take PATIENCE seconds together.

    Returns whether all have ended.
    """
    end = time.monotonic() + PATIENCE
    hanging = [task for task in tasks if not task.wait(max(0.0, end - time.monotonic()))]
    return not hanging
