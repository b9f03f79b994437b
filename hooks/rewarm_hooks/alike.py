"""Whether a file of a directory tree is just what a layer, or another tree, has of that name: times do not count."""

from __future__ import annotations

import bisect
import os
import stat
from contextlib import contextmanager

from . import member as kinds
from . import regular, sparse, tarread, xattrs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import BinaryIO

    from .member import Member

_PIECE = 1 << 20


def metadata(directory: int, name: bytes, status: os.stat_result) -> tuple[object, ...]:
    """As a layer has them: kind, mode, owner, size, xattrs, and the target of a link. Raises OSError."""
    attributes = xattrs.carried(xattrs.read(xattrs.place(directory, name)))
    if stat.S_ISLNK(status.st_mode):
        return kinds.SYMLINK, 0o777, status.st_uid, status.st_gid, 0, attributes, os.readlink(name, dir_fd=directory)
    kind = kinds.FILE if stat.S_ISREG(status.st_mode) else None
    mode = stat.S_IMODE(status.st_mode)
    return kind, mode, status.st_uid, status.st_gid, status.st_size, attributes, b""


def metadata_of(member: Member) -> tuple[object, ...]:
    """The same of what a layer makes."""
    return member.kind, member.mode, member.uid, member.gid, member.size, member.xattrs, member.link


@contextmanager
def opened(directory: int, name: bytes, status: os.stat_result) -> Iterator[int]:
    """A regular file, of that status. Raises OSError and LayerError."""
    fd = regular.open_regular(name, os.O_RDONLY, directory, known=status)
    try:
        yield fd
    finally:
        os.close(fd)


def same_as_made(fd: int, member: Member, layer: BinaryIO) -> bool:
    """Whether a file's content is what the layer makes. Raises OSError and LayerError."""
    data = [(offset, length) for offset, length, _ in member.extents]
    return _same(fd, data, lambda at, count: _content(member, layer, at, count))


def same_as_file(fd: int, other: int, status: os.stat_result) -> bool:
    """Whether a file's content is that of another, which has this status. Raises OSError."""
    return _same(fd, sparse.data_of(other, status), lambda at, count: os.pread(other, count, at))


def _same(fd: int, data: list[tuple[int, int]], other: Callable[[int, int], bytes]) -> bool:
    """Whether a file is what `other` reads (offset, length), of which `data` is no hole. What is a hole in both is
    never looked at."""
    at = 0
    for offset, length in sorted(data + sparse.data_of(fd, os.fstat(fd))):
        at = max(at, offset)
        while at < offset + length:
            count = min(offset + length - at, _PIECE)
            if os.pread(fd, count, at) != other(at, count):
                return False
            at += count
    return True


def _content(member: Member, layer: BinaryIO, at: int, count: int) -> bytes:
    """`count` bytes of a member's file; zeros where no extent is."""
    made = bytearray(count)
    index = max(0, bisect.bisect_right(member.extents, at, key=lambda extent: extent[0]) - 1)
    for number in range(index, len(member.extents)):
        offset, length, source = member.extents[number]
        if offset >= at + count:
            break
        start, end = max(offset, at), min(offset + length, at + count)
        if start < end:
            layer.seek(source + start - offset)
            made[start - at : end - at] = tarread.read(layer, end - start, member.name)
    return bytes(made)
