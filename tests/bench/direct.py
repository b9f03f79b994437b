"""What a disk gives where there is no fio: reads of files with O_DIRECT, by several threads, each file by one."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

BLOCK = 8 << 20
THREADS = (4, 8, 16)
"""The best of these counts."""


def rate(files: Sequence[Path]) -> float:
    """GB/s over files that are on the disk as a whole, those of a megabyte and more."""
    large = [path for path in files if path.stat().st_size >= 1 << 20]
    shares = [large[at :: len(THREADS)] for at in range(len(THREADS))]
    found = []
    for count, share in zip(THREADS, shares, strict=True):
        began = time.monotonic()
        with ThreadPoolExecutor(count) as pool:
            size = sum(pool.map(_read, share))
        found.append(size / (time.monotonic() - began) / 1e9)
    return max(found)


def _read(path: Path) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    buffer = mmap.mmap(-1, BLOCK)
    try:
        size = os.fstat(fd).st_size
        for offset in range(0, size, BLOCK):
            os.preadv(fd, [buffer], offset)
        return size
    finally:
        os.close(fd)


def forget(directory: Path) -> None:
    """Takes all files below `directory` out of the page cache, once they are on the disk."""
    for file in directory.rglob("*"):
        if file.is_file():
            fd = os.open(file, os.O_RDONLY)
            try:
                os.fsync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)
