"""The store's locks: flock(2) on files under v1/locks, which the kernel drops when their holder dies.

Lock files are never removed: unlinking one that another process is about to lock would give two holders.
NFSv4 and other shared file systems pass flock on to their server, as an exclusive or shared lock of the whole file;
an exclusive one there needs a descriptor open for writing.
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
from pathlib import Path
from types import TracebackType

from rewarm.errors import StoreError

from .files import store_error

PATIENCE = 300.0
"""Seconds to wait for publishing captures and removals, each of which holds the store's lock for a moment."""


class Lock:
    """One lock, held until `release` or the end of the `with`."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def release(self) -> None:
        """Give the lock up; again does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def sign(self) -> None:
        """Write into the lock file who holds it, for whoever meets it locked. Raises OSError."""
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()


def try_lock(path: Path, *, shared: bool = False) -> Lock | None:
    """The lock, or None if another holds it. Raises StoreError."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
        except BaseException:
            os.close(fd)
            raise
    except OSError as error:
        raise store_error("lock", path, error) from None
    return Lock(fd)


def wait_lock(path: Path, *, shared: bool = False, patience: float = PATIENCE) -> Lock:
    """The lock, as soon as it is free. Raises StoreError after `patience` seconds."""
    deadline = time.monotonic() + patience
    while True:
        lock = try_lock(path, shared=shared)
        if lock is not None:
            return lock
        if time.monotonic() >= deadline:
            cause = f"another capture or removal has held it for {patience:.0f} s"
            raise StoreError("lock", str(path), cause, "see who holds it with `fuser`, and try again")
        # A waiting flock() cannot be bounded without a signal, which a library must not take.
        time.sleep(0.02)


def holder(path: Path) -> str:
    """Who signed the lock, "pid 7 on node-1"; "another process" if that cannot be read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return "another process"  # only a detail of the error that is being reported
    try:
        text = os.read(fd, 256).decode("ascii", "replace").strip()
    finally:
        os.close(fd)
    return text if text.isprintable() and text.startswith("pid ") else "another process"
