"""The directory in which one capture gathers its files before they go into the store.

It is locked for as long as somebody writes into it: rewarm, or a CRIU that outlived it. What nobody holds is
of a capture that was killed, and goes when it is seen.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from pathlib import Path
from types import TracebackType

from rewarm import private
from rewarm.errors import CaptureError

_PREFIX = "capture-"


class Scratch:
    """Context manager: a new directory below `work_dir`, removed at the end; what dead captures left goes first.

    `snapshot` becomes the snapshot's files, `work` is for whatever else is needed. `lock` is an open file that a
    program which writes here has to inherit. Raises CaptureError when the directory cannot be made.
    """

    def __init__(self, work_dir: str) -> None:
        self._base = Path(work_dir)
        self.path = self._base / f"{_PREFIX}{secrets.token_hex(8)}"
        self.snapshot = self.path / "snapshot"
        self.work = self.path / "work"
        self.lock = -1

    def __enter__(self) -> Scratch:
        try:
            private.make(str(self._base))
            # Between mkdir and flock it would look like a dead one's to another capture: this lock keeps that away.
            gate = _open(self._base)
            try:
                fcntl.flock(gate, fcntl.LOCK_EX)
                for path in self._base.glob(f"{_PREFIX}*"):
                    remove_dead(path)
                self.path.mkdir(mode=0o700)
                self.lock = _open(self.path)
                fcntl.flock(self.lock, fcntl.LOCK_EX)
            finally:
                os.close(gate)
            self.snapshot.mkdir(mode=0o700)
            self.work.mkdir(mode=0o700)
        except OSError as error:
            raise CaptureError(
                "make work directory", str(self.path), error.strerror or str(error), "see `work_dir` in the settings"
            ) from error
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        os.close(self.lock)
        # What cannot be removed now is left to the next capture: this one is done, well or badly.
        shutil.rmtree(self.path, ignore_errors=True)


def dead(work_dir: str) -> list[Path]:
    """The directories of captures that are no more: nobody holds their lock."""
    found = []
    for path in sorted(Path(work_dir).glob(f"{_PREFIX}*")):
        try:
            fd = _open(path)
        except OSError:
            continue  # none of a capture's, or just removed
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            found.append(path)
        except BlockingIOError:
            continue  # somebody writes into it
        finally:
            os.close(fd)
    return found


def remove_dead(path: Path) -> bool:
    """Remove the directory of a capture that is no more; False when somebody still writes into it. Raises OSError."""
    try:
        fd = _open(path)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    shutil.rmtree(path)
    return True


def _open(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
