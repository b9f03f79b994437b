"""One capture of a container at a time: each would undo what the other holds."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from rewarm import processes, recover
from rewarm.errors import CaptureError
from rewarm.oci import record
from rewarm.oci.runc import Container

PATIENCE = 30.0
"""Seconds to wait for the helper of a capture that is over."""
_PAUSE = 0.02


@contextmanager
def alone(container: Container, state_dir: str, waiting: Callable[[], None] = lambda: None) -> Iterator[int]:
    """Inside, no other capture of the container begins. The value is a descriptor that whoever inherits it keeps so for
    as long as he lives: a helper that is not done yet (lifeline.py) when its capture has failed or was killed.

    `waiting` is called while there is a helper to wait for. Raises CaptureError if another capture, or the helper of
    one, is at it, and if the container has ended meanwhile.
    """
    path = record.capture_path(state_dir, container.pid, container.start_time)
    end = time.monotonic() + PATIENCE
    while True:
        ours = False
        try:
            with recover.locked(path, wait=False) as lock:
                if lock >= 0:
                    ours = True
                    _sign(lock, f"{os.getpid()} {processes.start_time(os.getpid())}")
                    try:
                        _check(container)
                        yield lock
                    finally:
                        _sign(lock, "")
                    return
        finally:
            if ours:
                _tidy(path)
        if _signer_lives(path):
            raise CaptureError(
                "capture container", container.id, "another capture of it is going on", "wait for its end"
            )
        if time.monotonic() > end:
            cause = f"a capture of it has ended, and what it has begun is still being undone, after {PATIENCE:g} s"
            step = "look for rewarm.lifeline in `ps`: it waits for room on a GPU (`nvidia-smi`), or for `runc resume`"
            raise CaptureError("capture container", container.id, cause, step)
        waiting()
        time.sleep(_PAUSE)


def _check(container: Container) -> None:
    """It may be another one by the time that the lock is there."""
    if processes.start_time(container.pid) != container.start_time:
        cause = f"its init, process {container.pid}, has ended"
        raise CaptureError("capture container", container.id, cause, "capture it while it runs")


def _sign(lock: int, text: str) -> None:
    with suppress(OSError):  # it only chooses the words of an error
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
    with suppress(OSError), recover.locked(path, wait=False) as last:  # what stays is swept (recover.py)
        if last >= 0:
            os.unlink(f"{path}~lock")
