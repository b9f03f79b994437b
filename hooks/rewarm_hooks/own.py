"""What a container has of its own in the upper directory of its root filesystem, before a snapshot comes over it.

The kubelet makes a new container for each start. Docker and Podman start a container again with the upper directory
that it had (`docker restart`), databases and uploads in it. The memory of a snapshot is older than those, and its files
would replace some of them: such a container has to start cold.
"""

from __future__ import annotations

import os
import re
import stat

from . import alike, names, tarread
from . import member as kinds
from .errors import LayerError, failed
from .image_view import METACOPY, OPAQUE, REDIRECT, ImageView, Tree, has, is_whiteout
from .names import joined
from .walk import Walker

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import BinaryIO

    from .member import Member
    from .names import Parts

    Members = dict[Parts, Member]

_DEEPEST = 128  # levels: a walk goes down from the root again and again
_MOST = 1_000_000
"""Names, of which any container can leave as many as the disk has inodes, for each start to look at."""
# Made by engines before or while they make a container: a link by CRI-O and Podman; what ldconfig reads and makes, by
# NVIDIA's hooks (nvidia-cdi-hook update-ldcache and enable-cuda-compat), with random names and inode numbers.
_ENGINES = re.compile(
    rb"etc/mtab|etc/ld\.so\.cache|var/cache/ldconfig/aux-cache|etc/ld-musl-[^/]*\.path"
    rb"|etc/ld\.so\.conf\.d/(?:(?:00|zz)-nvcr-|00-compat-)[^/]*\.conf"
)


def check(upper_fd: int, root_fd: int, lower: Sequence[str], layer: BinaryIO | None) -> None:
    """Raises LayerError for the first thing in the upper directory that is not just so in the layer or in the image,
    and OSError.

    upper_fd, root_fd, lower: the upper directory of an overlay, its merged view, which nobody uses, and the paths of
    its lower directories, topmost first, as far as they are known. Compared are owner, mode, xattrs and content, not
    times. What says nothing is passed over: directories, which engines and runc make to mount on (but not one that was
    moved: overlayfs leaves what is in it below), empty files for the same reason, FIFOs, sockets and device nodes. So
    is what was deleted, if the layer does not make it: in general that leaves no trace. As in the image is what a
    restore that failed and was undone has left.
    """
    upper = _Upper()
    with Walker(upper_fd) as walker, Walker(root_fd) as merged, ImageView(lower) as image:
        members: Members | None = None
        later: list[tuple[Parts, Member | None]] = []
        for parts in upper.found(walker):
            if members is None:
                members = _members(layer)
            member = members.get(parts)
            status, found = _looked_at(parts, merged)
            if member is None or found != alike.metadata_of(member):
                member = None
                if not _is_the_images(parts, found, image):
                    raise _own(parts)
            if stat.S_ISREG(status.st_mode):
                later.append((parts, member))
        if upper.deleted:
            _check_deleted(_members(layer) if members is None else members, root_fd, image, bool(lower))
        for parts, member in later:  # when nothing cheaper speaks against it: these may be large
            if member is not None and layer is not None and _has_what_is_made(parts, member, merged, layer):
                continue
            if not _has_the_images(parts, merged, image):
                raise _own(parts)


class Own(LayerError):
    """Something is the container's own."""


def _own(parts: Parts) -> Own:
    return Own(joined(parts), "the container has its own there, of which the snapshot knows nothing")


class _Upper:
    """A walk through an upper directory; no more than one directory's subdirectories are remembered at once beside
    those on the way."""

    def __init__(self) -> None:
        self.deleted = False
        """Whether there are marks of deletions: known when the walk has ended."""
        self._seen = 0

    def found(self, walker: Walker) -> Iterator[Parts]:
        """Links and files that are not empty, of no engine."""
        pending: list[Parts] = [()]
        while pending:
            directory = pending.pop()
            if len(directory) > _DEEPEST:
                raise LayerError(joined(directory), f"more than {_DEEPEST} directories deep")
            fd = walker.directory(directory)
            try:
                if directory:
                    self._look_at_marks(directory, fd)
                below: list[bytes] = []
                says: list[bytes] = []
                with os.scandir(fd) as entries:
                    for entry in entries:
                        self._count(directory)
                        if entry.is_dir(follow_symlinks=False):
                            below.append(os.fsencode(entry.name))
                        elif self._says_something(entry):
                            says.append(os.fsencode(entry.name))
            except OSError as error:
                raise failed(joined(directory), "reading the directory", error) from error
            for name in sorted(says):
                parts = (*directory, name)
                if not _ENGINES.fullmatch(joined(parts)):
                    yield parts
            pending += [(*directory, name) for name in sorted(below, reverse=True)]

    def _look_at_marks(self, directory: Parts, fd: int) -> None:
        if has(fd, REDIRECT):
            raise _own(directory)
        self.deleted = self.deleted or has(fd, OPAQUE)

    def _count(self, directory: Parts) -> None:
        self._seen += 1
        if self._seen > _MOST:
            raise LayerError(joined(directory), f"the container has made or changed more than {_MOST} files")

    def _says_something(self, entry: os.DirEntry[str]) -> bool:
        if entry.is_symlink():
            return True
        status = entry.stat(follow_symlinks=False)
        self.deleted = self.deleted or is_whiteout(status)
        return stat.S_ISREG(status.st_mode) and status.st_size > 0


def _members(layer: BinaryIO | None) -> Members:
    """What the layer makes, by name; a hard link is the file that it names."""
    found: Members = {}
    for member in () if layer is None else tarread.members(layer):
        if names.deleted_name(member.name, member.parts) is None:
            # Only an earlier file: plan.py takes no other.
            meant = found.get(names.parse(member.link)) if member.kind == kinds.LINK else member
            if meant is not None:
                found[member.parts] = meant
    return found


def _check_deleted(members: Members, root_fd: int, image: ImageView, known: bool) -> None:
    """What the image had, the container has deleted, alone or with its directory, and the layer would make again.

    Not an empty file: a time zone that Podman or CRI-O mounts has the image's link deleted, and a file to mount on.
    """
    root = Tree(root_fd)
    with root.walker:
        for parts, member in members.items():
            if not (member.size or member.kind == kinds.SYMLINK) or root.find(parts)[0] is not None:
                continue
            if not known or image.find(parts) is not None:
                raise Own(joined(parts), "the container has deleted it, and the snapshot would make it")


def _looked_at(parts: Parts, merged: Walker) -> tuple[os.stat_result, tuple[object, ...]]:
    """Status and metadata in the merged tree: right also where the upper directory has only metadata."""
    directory = merged.directory(parts[:-1])
    try:
        status = os.stat(parts[-1], dir_fd=directory, follow_symlinks=False)
        return status, alike.metadata(directory, parts[-1], status)
    except OSError as error:
        raise failed(joined(parts), "looking at it", error) from error


def _is_the_images(parts: Parts, found: tuple[object, ...], image: ImageView) -> bool:
    """Whether the image has that name with this metadata."""
    try:
        below = image.find(parts)
        return below is not None and alike.metadata(below[0], parts[-1], below[1]) == found
    except OSError as error:
        raise failed(joined(parts), "comparing it with the image's", error) from error


def _has_the_images(parts: Parts, merged: Walker, image: ImageView) -> bool:
    """Whether a file is just what the image has, metadata and content."""
    status, found = _looked_at(parts, merged)
    if not _is_the_images(parts, found, image):
        return False
    try:
        directory = merged.directory(parts[:-1])
        below = image.find(parts)
        assert below is not None
        with alike.opened(directory, parts[-1], status) as file, alike.opened(below[0], parts[-1], below[1]) as other:
            return not has(other, METACOPY) and alike.same_as_file(file, other, below[1])
    except OSError as error:
        raise failed(joined(parts), "comparing it with the image's", error) from error


def _has_what_is_made(parts: Parts, member: Member, merged: Walker, layer: BinaryIO) -> bool:
    """Whether a file's content is what the layer makes."""
    directory = merged.directory(parts[:-1])
    try:
        status = os.stat(parts[-1], dir_fd=directory, follow_symlinks=False)
        with alike.opened(directory, parts[-1], status) as file:
            return alike.same_as_made(file, member, layer)
    except OSError as error:
        raise failed(joined(parts), "comparing it with the snapshot's", error) from error
