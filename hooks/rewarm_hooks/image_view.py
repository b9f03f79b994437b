"""What an image has of a name, seen through its layers: an overlay's lower directories."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import ExitStack

from .walk import Walker

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from .names import Parts

REDIRECT = (b"trusted.overlay.redirect", b"user.overlay.redirect")
OPAQUE = (b"trusted.overlay.opaque", b"user.overlay.opaque")
METACOPY = (b"trusted.overlay.metacopy", b"user.overlay.metacopy")


def has(fd: int, attributes: tuple[bytes, ...]) -> bool:
    """Whether an open file has one of these extended attributes. Raises OSError."""
    try:
        found = os.listxattr(fd)
    except OSError as error:
        if error.errno == errno.ENOTSUP:
            return False
        raise
    return any(os.fsencode(name) in attributes for name in found)


def is_whiteout(status: os.stat_result) -> bool:
    """Whether it stands for a deletion."""
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


class Tree:
    """A directory tree as one layer of an overlay. Looking at names in the order of a walk costs a call for each: what
    is known of the last one's directory is kept."""

    def __init__(self, fd: int) -> None:
        self.walker = Walker(fd)
        self._directory: Parts | None = None
        self._known = (True, True)

    def find(self, parts: Parts) -> tuple[os.stat_result | None, bool]:
        """What is there of this name, and if nothing, whether a layer below is seen through here. Raises OSError and
        LayerError."""
        if parts[:-1] != self._directory:
            self._directory = None
            self._known = self._look(parts[:-1])
            self._directory = parts[:-1]
        there, seen_through = self._known
        status = self.walker.find(parts) if there else None
        if status is None:
            return None, seen_through
        return None if is_whiteout(status) else status, False

    def _look(self, directory: Parts) -> tuple[bool, bool]:
        """Whether it is there, and whether those of the layers below are seen through it."""
        seen_through = True
        for depth in range(1, len(directory) + 1):
            status = self.walker.find(directory[:depth])
            if status is None:
                return False, seen_through
            if not stat.S_ISDIR(status.st_mode):
                return False, False
            fd = self.walker.directory(directory[:depth])
            seen_through = seen_through and not has(fd, (*REDIRECT, *OPAQUE))
        return True, seen_through


class ImageView:
    """All layers of an image, topmost first, by their paths. A context manager, which opens them; raises OSError."""

    def __init__(self, lower: Sequence[str]) -> None:
        self._lower = lower
        self._trees: list[Tree] = []
        self._stack = ExitStack()

    def __enter__(self) -> ImageView:
        with ExitStack() as stack:
            for path in self._lower:
                fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    tree = Tree(fd)
                finally:
                    os.close(fd)
                self._trees.append(tree)
                stack.enter_context(tree.walker)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._trees.clear()
        self._stack.close()

    def find(self, parts: Parts) -> tuple[int, os.stat_result] | None:
        """The descriptor of the directory that has what the image has of this name, valid until the next call, and the
        status of that; None if the image has nothing. Raises OSError and LayerError."""
        for tree in self._trees:
            status, goes_on = tree.find(parts)
            if status is not None:
                return tree.walker.directory(parts[:-1]), status
            if not goes_on:
                return None
        return None
