"""What a container has of its own in the upper directory of its root filesystem, before a snapshot comes over it.

The kubelet makes a new container for each start. Docker and Podman start a container again with the upper directory
that it had (`docker restart`), databases and uploads in it. The memory of a snapshot is older than those, and its files
would replace some of them: such a container has to start cold.
"""

from __future__ import annotations

import bisect
import os
import stat

from . import member as kinds
from . import names, regular, sparse, tarread, xattrs
from .errors import LayerError, failed
from .names import joined
from .walk import Walker, tree

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import BinaryIO

    from .member import Member
    from .names import Parts

    Members = dict[Parts, Member]

_PIECE = 1 << 20
_DEEPEST = 128  # levels: a walk goes down from the root again and again
_REDIRECT = (b"trusted.overlay.redirect", b"user.overlay.redirect")
_ENGINES = (b"etc", b"mtab")  # a link that CRI-O and Podman make


def check(upper_fd: int, root_fd: int, layer: BinaryIO | None) -> None:
    """Raises LayerError for the first thing in the upper directory that is not just so in the layer.

    upper_fd, root_fd: the upper directory of an overlay, and its merged view, which nobody uses. Compared are owner,
    mode, xattrs and content, not times. What says nothing is passed over: directories, which engines and runc make to
    mount on (but not one that was moved: overlayfs leaves what is in it below), empty files for the same reason, FIFOs,
    sockets and device nodes. So is what was deleted, if the layer does not make it: in general that leaves no trace.
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
                if not _says_something(status):
                    continue
                if members is None:
                    members = {} if layer is None else _members(layer)
                member = members.get(parts)
                if stat.S_ISCHR(status.st_mode):
                    if member is not None:
                        raise LayerError(joined(parts), "the container has deleted it, and the snapshot would make it")
                elif member is None:
                    if parts != _ENGINES or not stat.S_ISLNK(status.st_mode):
                        raise _own(parts)
                elif layer is not None and not _is_the_same(parts, member, merged, layer):
                    raise _own(parts)


def _own(parts: Parts) -> LayerError:
    return LayerError(joined(parts), "the container has its own there, and the snapshot knows nothing of it")


def _is_moved(parts: Parts, fd: int) -> bool:
    try:
        return any(name in xattrs.read(fd) for name in _REDIRECT)
    except OSError as error:
        raise failed(joined(parts), "reading its extended attributes", error) from error


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
    name, directory = parts[-1], merged.directory(parts[:-1])
    try:
        found = os.stat(name, dir_fd=directory, follow_symlinks=False)
        if (found.st_uid, found.st_gid) != (member.uid, member.gid):
            return False
        if xattrs.carried(xattrs.read(xattrs.place(directory, name))) != member.xattrs:
            return False
        if member.kind == kinds.SYMLINK:
            return stat.S_ISLNK(found.st_mode) and os.readlink(name, dir_fd=directory) == member.link
        if member.kind != kinds.FILE or not stat.S_ISREG(found.st_mode):
            return False
        if (found.st_size, stat.S_IMODE(found.st_mode)) != (member.size, member.mode):
            return False
        fd = regular.open_regular(name, os.O_RDONLY, directory, known=found)
        try:
            return _same_content(fd, member, layer)
        finally:
            os.close(fd)
    except OSError as error:
        raise failed(joined(parts), "comparing it with the snapshot's", error) from error


def _same_content(fd: int, member: Member, layer: BinaryIO) -> bool:
    """Looks at what is data in either of them, and never at what is a hole in both."""
    data = sparse.data_of(fd, os.fstat(fd)) + [(offset, length) for offset, length, _ in member.extents]
    at = 0
    for offset, length in sorted(data):
        at = max(at, offset)
        while at < offset + length:
            count = min(offset + length - at, _PIECE)
            if os.pread(fd, count, at) != _content(member, layer, at, count):
                return False
            at += count
    return True


def _content(member: Member, layer: BinaryIO, at: int, count: int) -> bytes:
    """`count` bytes of a member's file; zeros where no extent is."""
    made = bytearray(count)
    index = max(0, bisect.bisect_right(member.extents, at, key=lambda extent: extent[0]) - 1)
    for offset, length, source in member.extents[index:]:
        if offset >= at + count:
            break
        start, end = max(offset, at), min(offset + length, at + count)
        if start < end:
            layer.seek(source + start - offset)
            made[start - at : end - at] = tarread.read(layer, end - start, member.name)
    return bytes(made)
