"""How fast the store reads what is not in memory: measured once a capture, in its workspace."""

from __future__ import annotations

import mmap
import os
import secrets
import time
from pathlib import Path

from .files import store_error, write_all

PROBE = 8 << 20
"""Bytes written and read again: 80 ms on a disk of 100 MB/s."""


def read_rate(directory: Path) -> float:
    """Bytes/s of a first read of a file in `directory`. Raises StoreError.

    A network file system's server may have the file in its memory; the figure is then that of the network.
    """
    path = directory / "probe"
    try:
        try:
            _write(path)
            return _read(path)
        finally:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise store_error("measure", path, error) from None


def _write(path: Path) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        # Random: a file system that compresses must not look faster than it is for such data.
        write_all(fd, secrets.token_bytes(PROBE))
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def _read(path: Path) -> float:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_DIRECT)
    except OSError:  # EINVAL where the file system has no O_DIRECT
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        with mmap.mmap(-1, PROBE) as memory, memoryview(memory) as view:
            done = 0
            begin = time.monotonic()
            while done < PROBE:
                count = os.preadv(fd, [view[done:]], done)
                if count == 0:
                    break
                done += count
            return done / max(1e-9, time.monotonic() - begin)
    finally:
        os.close(fd)
