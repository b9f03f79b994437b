"""Doing something in a thread while the main thread waits in a way that a signal can end.

A read of a share that hangs is not interrupted by a signal that has a handler (FUSE and NFS wait for the server; only
a fatal signal ends that): in the main thread it would hold up the deadline for ever.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


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
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    return results[0]
