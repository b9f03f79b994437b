"""What the kernel has in its page cache."""

from __future__ import annotations

import os

from ._native import lib


def is_cached(fd: int, offset: int) -> bool:
    """Whether the file's page at byte `offset` is in the page cache, and whole; false past the end. Nothing is read,
    and the GIL is given back meanwhile.

    mincore(2), which says yes of files that the caller neither owns nor may write. cachestat(2) would need no mapping,
    but counts pages whose read is still going on, and sees none of a file on overlayfs. Raises OSError; ENODEV if the
    file system maps no files.
    """
    found: int = lib.rw_is_cached(fd, offset)
    if found < 0:
        raise OSError(-found, f"look for a page of a file in the page cache: {os.strerror(-found)}")
    return found > 0
