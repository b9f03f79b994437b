"""Verifying large files in threads while CRIU reads them."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

from rewarm import aside
from rewarm.errors import RestoreError
from rewarm.trace import Trace

if TYPE_CHECKING:
    from rewarm.store.materialise import PendingVerification

_THREADS = 4


class Verifier:
    """`join` raises the first failure. `stop` is set by it, and ends the threads when another sets it."""

    def __init__(self, stop: threading.Event, trace: Trace) -> None:
        self._stop = stop
        self._trace = trace
        self._lock = threading.Lock()
        self._all: list[PendingVerification] = []
        self._pending: list[PendingVerification] = []
        self._threads: list[threading.Thread] = []
        self._failure: Exception | None = None

    def start(self, pending: list[PendingVerification]) -> None:
        """Start verifying. Raises RuntimeError if no thread can be made."""
        self._all = pending
        self._pending = list(pending)
        for _ in range(min(len(pending), _THREADS, os.cpu_count() or 1)):
            thread = threading.Thread(target=self._run, daemon=True)
            self._threads.append(thread)
            thread.start()

    def join(self) -> None:
        """Wait for all of them. Raises SnapshotDamaged, StoreError."""
        for thread in self._threads:
            thread.join()
        if self._failure is not None:
            raise self._failure
        if not all(one.verified for one in self._all):
            raise RestoreError("verify snapshot", "large files", "a verification ended early")

    def abandon(self) -> None:
        """Have the threads end, if they can: one that hangs in a dead file system's read ends with the process."""
        aside.wait(self._threads)

    def _run(self) -> None:
        while not self._stop.is_set():
            with self._lock:
                if not self._pending:
                    return
                one = self._pending.pop()
            try:
                with self._trace.phase("restore.verify"):
                    one.verify(self._stop)
            except Exception as error:
                self._failure = error  # raised by `join`
                self._stop.set()
