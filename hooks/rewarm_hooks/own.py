"""What a container has written itself, in an earlier run, and a layer must not take from it.

Engines that start a container again (`docker restart`, `podman restart`) give it the upper directory that it had, with
its files, databases and uploads among them. A snapshot knows nothing of those: where it would replace or delete one,
nothing is applied, and the container starts cold. What it had deleted may come back: overlayfs keeps no trace of the
deletion of what was never in a lower directory.
"""

from __future__ import annotations

import os
import stat

from . import member as kinds
from . import names, regular, tarread
from .errors import LayerError, failed
from .names import joined
from .plan import ENTRY
from .walk import Walker, tree

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import BinaryIO

    from .member import Member
    from .names import Parts
    from .plan import Step

_PIECE = 1 << 20


def check(steps: list[Step], upper_fd: int, walker: Walker, layer: BinaryIO) -> None:
    """Raises LayerError for the first file or link in the upper directory that one of the steps would replace or
    delete, unless the layer has the same. Empty files hold nothing: engines and runc make them, to mount on.

    upper_fd: the upper directory of the overlay whose merged view `walker` walks.
    """
    members = {step.parts: step.member for step in steps if step.what == ENTRY}
    with Walker(upper_fd) as raw:
        upper = _Upper(raw)
        for step in steps:
            if step.fresh or (step.what == ENTRY and step.member.kind == kinds.DIRECTORY and step.over_directory):
                continue
            for parts, status in upper.below(step.parts):
                if not _holds_something(status):
                    continue
                member = members.get(parts)
                if member is not None and member.kind == kinds.LINK:
                    member = members[names.parse(member.link)]
                if member is None or not _is_the_same(parts, member, walker, layer):
                    raise LayerError(
                        joined(parts),
                        "the container has written it itself, in an earlier run, and the snapshot would take it away: "
                        "only a new container starts warm",
                    )


class _Upper:
    """An upper directory, which has a part of the tree's directories."""

    def __init__(self, walker: Walker) -> None:
        self._walker = walker
        self._there: set[Parts] = {()}
        self._not_there: set[Parts] = set()

    def below(self, parts: Parts) -> Iterator[tuple[Parts, os.stat_result]]:
        """What it has by this name, and in a directory of this name, but for directories."""
        for depth in range(1, len(parts)):
            if not self._is_directory(parts[:depth]):
                return
        status = self._walker.find(parts)
        if status is None:
            return
        if not stat.S_ISDIR(status.st_mode):
            yield parts, status
            return
        for directory, _, found in tree(self._walker, parts):
            for name, child in found:
                if not stat.S_ISDIR(child.st_mode):
                    yield (*directory, name), child

    def _is_directory(self, parts: Parts) -> bool:
        if parts in self._there:
            return True
        if parts in self._not_there:
            return False
        status = self._walker.find(parts)
        known = self._there if status is not None and stat.S_ISDIR(status.st_mode) else self._not_there
        known.add(parts)
        return known is self._there


def _holds_something(status: os.stat_result) -> bool:
    """Whiteouts (overlayfs has them as character devices, or as empty files), FIFOs and sockets do not."""
    return stat.S_ISLNK(status.st_mode) or (stat.S_ISREG(status.st_mode) and status.st_size > 0)


def _is_the_same(parts: Parts, member: Member, walker: Walker, layer: BinaryIO) -> bool:
    """Whether the merged tree has just what the layer has there; times do not count."""
    name, fd = parts[-1], walker.directory(parts[:-1])
    try:
        found = os.stat(name, dir_fd=fd, follow_symlinks=False)
        if (found.st_uid, found.st_gid) != (member.uid, member.gid):
            return False
        if member.kind == kinds.SYMLINK:
            return stat.S_ISLNK(found.st_mode) and os.readlink(name, dir_fd=fd) == member.link
        if member.kind != kinds.FILE or not stat.S_ISREG(found.st_mode):
            return False
        if (found.st_size, stat.S_IMODE(found.st_mode)) != (member.size, member.mode):
            return False
        with os.fdopen(regular.open_regular(name, os.O_RDONLY, fd, known=found), "rb", 1 << 16) as file:
            return _same_content(file, member, layer)
    except OSError as error:
        raise failed(joined(parts), "comparing it with the snapshot's", error) from error


def _same_content(file: BinaryIO, member: Member, layer: BinaryIO) -> bool:
    """Extents, and zeros between them."""
    at = 0
    for offset, length, source in (*member.extents, (member.size, 0, 0)):
        while at < offset:
            count = min(offset - at, _PIECE)
            if file.read(count) != bytes(count):
                return False
            at += count
        layer.seek(source)
        while length:
            count = min(length, _PIECE)
            if file.read(count) != tarread.read(layer, count, member.name):
                return False
            at += count
            length -= count
    return True
