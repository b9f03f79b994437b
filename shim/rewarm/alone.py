"""One capture of a container at a time: each would undo what the other holds."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from rewarm import processes, recover
from rewarm.errors import CaptureError
from rewarm.oci import record
from rewarm.oci.runc import Container

PATIENCE = 10.0
"""Seconds to wait for the helper of a capture that is over."""
_PAUSE = 0.02


@contextmanager
def alone(container: Container, state_dir: str) -> Iterator[int]:
    """Inside, no other capture of the container begins. The value is a descriptor that whoever inherits it keeps so for
    as long as he lives: a helper that is not done yet (lifeline.py) when its capture has failed or was killed.

    Raises CaptureError if another capture, or the helper of one, is at it.
    """
    path = f"{record.directory(state_dir, container.root, container.id)}~capture"
    end = time.monotonic() + PATIENCE
    while True:
        ours = False
        try:
            with recover.locked(path, wait=False) as lock:
                if lock >= 0:
                    ours = True
                    _sign(lock, f"{os.getpid()} {processes.start_time(os.getpid())}")
                    try:
                        yield lock
                    finally:
                        _sign(lock, "")
                    return
        finally:
            if ours:
                _tidy(path)
        if _signer_lives(path):
            raise _refused(container, "another capture of it is going on")
        if time.monotonic() > end:
            raise _refused(container, "the helper of a capture that has ended is still letting it go on")
        time.sleep(_PAUSE)


def _refused(container: Container, cause: str) -> CaptureError:
    return CaptureError("capture container", container.id, cause, "wait for its end")


def _sign(lock: int, text: str) -> None:
    os.ftruncate(lock, 0)
    os.pwrite(lock, text.encode(), 0)


def _signer_lives(path: str) -> bool:
    try:
        with open(f"{path}~lock", "rb") as file:
            pid, start = map(int, file.read(64).split())
    except (OSError, ValueError):
        return False  # it has ended, or has not signed yet
    return processes.start_time(pid) == start


def _tidy(path: str) -> None:
    """Remove the file, unless somebody has inherited the lock: a new file would be another lock."""
    with recover.locked(path, wait=False) as last, suppress(FileNotFoundError):
        if last >= 0:
            os.unlink(f"{path}~lock")
