"""Doing something in a thread while the main thread waits in a way that a signal can end.

A read of a share that hangs is not interrupted by a signal that has a handler (FUSE and NFS wait for the server; only
a fatal signal ends that): in the main thread it would hold up the deadline for ever.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")

PATIENCE = 1.0
"""Seconds in which a thread that was told to end does so, unless it hangs."""

_left: list[threading.Thread] = []


def run(work: Callable[[], T]) -> T:
    """What `work` returns or raises. An exception of a signal handler comes through at once, and leaves the thread."""
    results: list[T] = []
    failures: list[BaseException] = []

    def call() -> None:
        try:
            results.append(work())
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=call, name="aside", daemon=True)
    _left.append(thread)
    thread.start()
    thread.join()
    _left.remove(thread)
    if failures:
        raise failures[0]
    return results[0]


def settle() -> None:
    """Wait for what `run` has left, as long as it is worth it: it must not go on writing where others clean up."""
    wait(_left)


def wait(threads: Iterable[threading.Thread]) -> None:
    """Join threads that were told to end; those that hang, however many, take PATIENCE seconds together."""
    end = time.monotonic() + PATIENCE
    for thread in threads:
        if thread.ident is not None:
            thread.join(max(0.0, end - time.monotonic()))
