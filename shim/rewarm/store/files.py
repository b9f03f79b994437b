"""How the store's files are opened and read: no links, no pipes, no mmap, and errors that say what to do.

Another node may have written the store, so what lies at a path is not trusted to be what should lie there: every
component below the store's root is opened with O_NOFOLLOW, the last without blocking, and only a regular file is
read. A file is read with preadv into a buffer, since one that shrinks under a mapping would kill the reader by SIGBUS.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from blake3 import blake3

from rewarm.errors import StoreError

PIECE = 4 << 20
"""Bytes read at a time: enough to keep a disk and BLAKE3 busy, little enough for many readers at once."""

_CAUSES = {
    errno.ENOSPC: ("no space is left", "free space there, or remove snapshots with `rewarm rm`"),
    errno.EDQUOT: ("the disk quota is used up", "raise the quota, or remove snapshots with `rewarm rm`"),
    errno.EROFS: ("the file system is mounted read-only", "mount it writable, or set `store` to another directory"),
    errno.ENOENT: ("does not exist", "create it or mount it, or correct `store` in the settings"),
    errno.ENOTDIR: ("is not a directory", "put a directory there, or correct `store` in the settings"),
    errno.ELOOP: ("is a symbolic link, which the store does not follow", "put the real file or directory there"),
    errno.EACCES: ("permission is denied", "run as root, and check the mount's export options"),
    errno.EPERM: ("permission is denied", "run as root, and check the mount's export options"),
    errno.EIO: ("could not be read or written (input/output error)", "check the disk and the kernel's log"),
    errno.ESTALE: ("the network file system has lost it (stale handle)", "mount the store anew"),
}


class NotRegular(Exception):
    """A link, pipe, device or directory lies where a file should be."""


class Short(Exception):
    """The file ended before the bytes asked for; the argument is the offset at which it ended."""


class Stop(Protocol):
    """What a threading.Event is to a reader."""

    def is_set(self) -> bool:
        """Whether to give up."""


def store_error(operation: str, path: str | Path, error: OSError) -> StoreError:
    """An OSError as a StoreError that says what to do about it."""
    cause, step = _CAUSES.get(error.errno or 0, (error.strerror or str(error), ""))
    return StoreError(operation, str(path), cause, step)


def open_root(root: Path) -> int:
    """The store's directory as a descriptor; the store itself may be a symbolic link. Raises StoreError."""
    try:
        return os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ENOENT and root.is_symlink():
            cause = f"is a broken symbolic link to {os.readlink(root)}"
            raise StoreError("open store", str(root), cause, "create its target or mount it") from None
        raise store_error("open store", root, error) from None


def open_directory(root: Path, parts: Sequence[str]) -> int:
    """A directory of the store as a descriptor. Raises OSError (a link is ENOTDIR), StoreError for the root."""
    fd = open_root(root)
    for part in parts:
        try:
            # O_DIRECTORY on a link that O_NOFOLLOW does not follow is ENOTDIR.
            below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
        finally:
            os.close(fd)
        fd = below
    return fd


def open_regular(root: Path, parts: Sequence[str]) -> int:
    """A regular file of the store, for reading. Raises OSError, NotRegular, and StoreError for the root."""
    directory = open_directory(root, parts[:-1])
    try:
        return open_plain(parts[-1], directory)
    finally:
        os.close(directory)


def open_plain(path: str | Path, dir_fd: int | None = None) -> int:
    """A file for reading that must be regular and no link. Raises OSError and NotRegular."""
    try:
        # O_NONBLOCK: opening a FIFO without a writer would otherwise hang.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC, dir_fd=dir_fd)
    except OSError as error:
        # ELOOP is a link, ENXIO a socket or a device without a driver.
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise NotRegular from None
        raise
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise NotRegular
    return fd


def close(fd: int) -> None:
    """Close a file whose bytes are verified by whoever reads them: a network file system that fails here loses none."""
    with suppress(OSError):
        os.close(fd)


def read_up_to(fd: int, limit: int) -> bytes:
    """The file's first `limit` bytes, or all of it. Raises OSError."""
    pieces = []
    left = limit
    while left:
        piece = os.read(fd, min(left, PIECE))
        if not piece:
            break
        pieces.append(piece)
        left -= len(piece)
    return b"".join(pieces)


def read_range(fd: int, offset: int, size: int, take: Callable[[memoryview], None], stop: Stop | None = None) -> bool:
    """Hand `size` bytes from `offset` to `take`, piece by piece; the memory is reused after each call.

    Returns False if `stop` was set before the end. Raises OSError, and Short if the file ends early.
    """
    buffer = memoryview(bytearray(min(PIECE, max(1, size))))
    end = offset + size
    while offset < end:
        if stop is not None and stop.is_set():
            return False
        count = os.preadv(fd, [buffer[: min(len(buffer), end - offset)]], offset)
        if count == 0:
            raise Short(offset)
        take(buffer[:count])
        offset += count
    return True


def threaded_hasher() -> blake3:
    """A BLAKE3 hasher with threads of its own, for reading a lot while nothing else runs.

    Not blake3.AUTO: its threads are the process's, and a child that is forked after their first use waits for
    them for ever.
    """
    return blake3(max_threads=min(8, len(os.sched_getaffinity(0))))


def hash_range(fd: int, offset: int, size: int, stop: Stop | None = None) -> str | None:
    """BLAKE3-256 (hex) of a part of a file; None if `stop` was set. Raises OSError and Short."""
    hasher = blake3()

    def take(piece: memoryview) -> None:
        hasher.update(piece)

    return hasher.hexdigest() if read_range(fd, offset, size, take, stop) else None


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Write all of `data`. Raises OSError."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
