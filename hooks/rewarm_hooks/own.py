"""What a container has of its own in the upper directory of its root filesystem, before a snapshot comes over it.

The kubelet makes a new container for each start. Docker and Podman start a container again with the upper directory
that it had (`docker restart`), databases and uploads in it. The memory of a snapshot is older than those, and its files
would replace some of them: such a container has to start cold.
"""

from __future__ import annotations

import bisect
import errno
import os
import re
import stat
from contextlib import contextmanager

from . import member as kinds
from . import names, regular, sparse, tarread, xattrs
from .errors import LayerError, failed
from .names import joined
from .walk import Walker, tree

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import BinaryIO

    from .member import Member
    from .names import Parts

    Members = dict[Parts, Member]

_PIECE = 1 << 20
_DEEPEST = 128  # levels: a walk goes down from the root again and again
_REDIRECT = (b"trusted.overlay.redirect", b"user.overlay.redirect")
_OPAQUE = (b"trusted.overlay.opaque", b"user.overlay.opaque")
_METACOPY = (b"trusted.overlay.metacopy", b"user.overlay.metacopy")
# Made by engines before or while they make a container: a link by CRI-O and Podman; what ldconfig reads and makes, by
# NVIDIA's hooks, with random names and inode numbers.
_ENGINES = re.compile(
    rb"etc/mtab|etc/ld\.so\.cache|var/cache/ldconfig/aux-cache|etc/ld\.so\.conf\.d/(?:00|zz)-nvcr-[^/]*\.conf"
)


def check(upper_fd: int, root_fd: int, lower: Sequence[str], layer: BinaryIO | None) -> None:
    """Raises LayerError for the first thing in the upper directory that is not just so in the layer or in the image.

    upper_fd, root_fd, lower: the upper directory of an overlay, its merged view, which nobody uses, and the paths of
    its lower directories, topmost first, as far as they are known. Compared are owner, mode, xattrs and content, not
    times. What says nothing is passed over: directories, which engines and runc make to mount on (but not one that was
    moved: overlayfs leaves what is in it below), empty files for the same reason, FIFOs, sockets and device nodes. So
    is what was deleted, if the layer does not make it: in general that leaves no trace. As in the image is what a
    restore that failed and was undone has left.
    """
    members: Members | None = None
    with Walker(upper_fd) as upper, Walker(root_fd) as merged:
        for directory, fd, found in tree(upper, ()):
            if len(directory) > _DEEPEST:
                raise LayerError(joined(directory), f"more than {_DEEPEST} directories deep")
            if directory and _is_moved(directory, fd):
                raise _own(directory)
            for name, status in found:
                parts = (*directory, name)
                if not _says_something(status) or _ENGINES.fullmatch(joined(parts)):
                    continue
                if members is None:
                    members = {} if layer is None else _members(layer)
                member = members.get(parts)
                if _is_whiteout(status):
                    # A time zone that Podman or CRI-O mounts: the image's link is deleted, and a file is to mount on.
                    if member is not None and (member.size or member.kind == kinds.SYMLINK):
                        raise Own(joined(parts), "the container has deleted it, and the snapshot would make it")
                    continue
                if member is not None and layer is not None and _is_the_same(parts, member, merged, layer):
                    continue
                if not _is_the_images(parts, merged, lower):
                    raise _own(parts)


class Own(LayerError):
    """Something is the container's own."""


def _own(parts: Parts) -> Own:
    return Own(joined(parts), "the container has its own there, and the snapshot knows nothing of it")


def _is_moved(parts: Parts, fd: int) -> bool:
    try:
        return _has(fd, _REDIRECT)
    except OSError as error:
        raise failed(joined(parts), "reading its extended attributes", error) from error


def _has(fd: int, attributes: tuple[bytes, ...]) -> bool:
    try:
        found = os.listxattr(fd)
    except OSError as error:
        if error.errno == errno.ENOTSUP:
            return False
        raise
    return any(os.fsencode(name) in attributes for name in found)


def _says_something(status: os.stat_result) -> bool:
    """Links, files that are not empty, and whiteouts."""
    mode = status.st_mode
    return stat.S_ISLNK(mode) or (stat.S_ISREG(mode) and status.st_size > 0) or _is_whiteout(status)


def _is_whiteout(status: os.stat_result) -> bool:
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


def _members(layer: BinaryIO) -> Members:
    """What the layer makes, by name; a hard link is the file that it names."""
    found: Members = {}
    for member in tarread.members(layer):
        if names.deleted_name(member.name, member.parts) is None:
            # Only an earlier file: plan.py takes no other.
            meant = found.get(names.parse(member.link)) if member.kind == kinds.LINK else member
            if meant is not None:
                found[member.parts] = meant
    return found


def _is_the_same(parts: Parts, member: Member, merged: Walker, layer: BinaryIO) -> bool:
    """Whether the merged tree has just what the layer makes: right also where the upper directory has only metadata."""
    directory = merged.directory(parts[:-1])
    try:
        found = os.stat(parts[-1], dir_fd=directory, follow_symlinks=False)
        wanted = (member.kind, member.mode, member.uid, member.gid, member.size, member.xattrs, member.link)
        if _kind_and_metadata(directory, parts[-1], found) != wanted:
            return False
        if member.kind != kinds.FILE:
            return True
        data = [(offset, length) for offset, length, _ in member.extents]
        with _file(directory, parts[-1], found) as file:
            return _same_content(file, data, lambda at, count: _content(member, layer, at, count))
    except OSError as error:
        raise failed(joined(parts), "comparing it with the snapshot's", error) from error


def _is_the_images(parts: Parts, merged: Walker, lower: Sequence[str]) -> bool:
    """Whether the merged tree has just what the topmost lower directory with this name has."""
    directory = merged.directory(parts[:-1])
    try:
        found = os.stat(parts[-1], dir_fd=directory, follow_symlinks=False)
        for path in lower:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            with _closing(fd), Walker(fd) as walker:
                status, goes_on = _in_lower(parts, walker)
                if status is None:
                    if goes_on:
                        continue
                    return False
                below = walker.directory(parts[:-1])
                metadata = _kind_and_metadata(directory, parts[-1], found)
                if metadata != _kind_and_metadata(below, parts[-1], status):
                    return False
                if metadata[0] != kinds.FILE:
                    return True
                with _file(directory, parts[-1], found) as file, _file(below, parts[-1], status) as other:
                    if _has(other, _METACOPY):
                        return False
                    data = sparse.data_of(other, status)
                    return _same_content(file, data, lambda at, count: os.pread(other, count, at))
    except OSError as error:
        raise failed(joined(parts), "comparing it with the image's", error) from error
    return False


def _in_lower(parts: Parts, walker: Walker) -> tuple[os.stat_result | None, bool]:
    """What one lower directory has of this name, and if nothing, whether those below it are seen through it."""
    seen_through = True
    for depth in range(1, len(parts)):
        status = walker.find(parts[:depth])
        if status is None:
            return None, seen_through
        if not stat.S_ISDIR(status.st_mode):
            return None, False
        seen_through = seen_through and not _has(walker.directory(parts[:depth]), (*_REDIRECT, *_OPAQUE))
    status = walker.find(parts)
    if status is None:
        return None, seen_through
    return None if _is_whiteout(status) else status, False


def _kind_and_metadata(directory: int, name: bytes, status: os.stat_result) -> tuple[object, ...]:
    """As a layer has them: kind, mode, owner, size, xattrs, and the target of a link."""
    attributes = xattrs.carried(xattrs.read(xattrs.place(directory, name)))
    if stat.S_ISLNK(status.st_mode):
        return kinds.SYMLINK, 0o777, status.st_uid, status.st_gid, 0, attributes, os.readlink(name, dir_fd=directory)
    kind = kinds.FILE if stat.S_ISREG(status.st_mode) else None
    mode = stat.S_IMODE(status.st_mode)
    return kind, mode, status.st_uid, status.st_gid, status.st_size, attributes, b""


@contextmanager
def _file(directory: int, name: bytes, status: os.stat_result) -> Iterator[int]:
    fd = regular.open_regular(name, os.O_RDONLY, directory, known=status)
    with _closing(fd):
        yield fd


@contextmanager
def _closing(fd: int) -> Iterator[None]:
    try:
        yield
    finally:
        os.close(fd)


def _same_content(fd: int, data: list[tuple[int, int]], other: Callable[[int, int], bytes]) -> bool:
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
