"""What the kernel has in its page cache."""

from __future__ import annotations

import os

from ._native import lib


def is_cached(fd: int, offset: int) -> bool:
    """Whether the file's page at byte `offset` is in the page cache; false past the end. Nothing is read, and the GIL
    is given back meanwhile.

    cachestat(2), from Linux 6.5 on, or mincore(2), which says yes of files that the caller neither owns nor may write.
    Raises OSError; ENODEV if the file system maps no files.
    """
    found: int = lib.rw_is_cached(fd, offset)
    if found < 0:
        raise OSError(-found, f"look for a page of a file in the page cache: {os.strerror(-found)}")
    return found > 0
