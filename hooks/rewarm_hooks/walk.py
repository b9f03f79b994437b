"""Walking a directory tree that may hold hostile links, without ever leaving it.

Every component is opened by itself with O_NOFOLLOW | O_DIRECTORY relative to the directory before it, so neither a
symbolic link nor `..` is ever resolved by the kernel. A directory on another device than the root's is a mount and is
refused: on overlayfs all directories have one st_dev, and no hook may write into a volume that is mounted below the
root.

A walk holds one open descriptor however deep the tree is (a container can make trees deeper than the descriptor
limit), at the price of walking down again from the root when it moves sideways.
"""

from __future__ import annotations

import errno
import os
import stat

from .errors import LayerError, failed, shown
from .names import Parts, joined

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

Children = list[tuple[bytes, os.stat_result]]


class Walker:
    """Opens directories below a root. A context manager; the root descriptor itself stays the caller's.

    It remembers the directory that it opened last: a directory that is removed must not be the last one asked for.
    """

    def __init__(self, root_fd: int) -> None:
        self._root = os.open(".", _DIRECTORY, dir_fd=root_fd)  # the caller's may be an O_PATH descriptor
        self._device = os.fstat(self._root).st_dev
        self._parts: Parts = ()
        self._fd = self._root

    def __enter__(self) -> Walker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._forget()
        os.close(self._root)

    def _forget(self) -> None:
        if self._fd != self._root:
            os.close(self._fd)
        self._fd = self._root
        self._parts = ()

    def directory(self, parts: Parts, entry: bytes | None = None) -> int:
        """A descriptor of directory `parts`, valid until the next call. LayerError names `entry`, or the directory.

        A component that is not there, is a symbolic link or is any other thing than a directory is an error.
        """
        known = len(self._parts)
        if parts[:known] != self._parts:
            self._forget()
            known = 0
        for depth in range(known, len(parts)):
            fd = self._step(parts, depth, joined(parts) if entry is None else entry)
            self._close_current()
            self._fd = fd
            self._parts = parts[: depth + 1]
        return self._fd

    def find(self, parts: Parts, entry: bytes | None = None) -> os.stat_result | None:
        """The status of what `parts` names, not followed; None if its directory has no such name.

        LayerError names `entry`, or the name itself, if its directory cannot be opened or it is a mounted directory.
        """
        entry = joined(parts) if entry is None else entry
        try:
            if not parts:
                return os.fstat(self._root)
            status = os.stat(parts[-1], dir_fd=self.directory(parts[:-1], entry), follow_symlinks=False)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise failed(entry, "looking at it", error) from error
        self._check_device(status, parts, entry)
        return status

    def _close_current(self) -> None:
        if self._fd != self._root:
            os.close(self._fd)

    def _step(self, parts: Parts, depth: int, entry: bytes) -> int:
        name = joined(parts[: depth + 1])
        try:
            fd = os.open(parts[depth], _DIRECTORY, dir_fd=self._fd)
        except OSError as error:
            if error.errno in (errno.ENOTDIR, errno.ELOOP):
                raise LayerError(
                    entry, f"{shown(name)} in the root filesystem is a link or a file, no directory"
                ) from error
            raise failed(entry, f"opening directory {shown(name)}", error) from error
        try:
            self._check_device(os.fstat(fd), parts[: depth + 1], entry)
        except LayerError:
            os.close(fd)
            raise
        return fd

    def _check_device(self, status: os.stat_result, parts: Parts, entry: bytes) -> None:
        if stat.S_ISDIR(status.st_mode) and status.st_dev != self._device:
            raise LayerError(
                entry, f"{shown(joined(parts))} is a mount: only the root filesystem itself may be changed"
            )


def children(directory_fd: int) -> Children:
    """(name, status) of everything in a directory, in the order of the names' bytes. Nothing is followed."""
    with os.scandir(directory_fd) as found:
        names = sorted(os.fsencode(entry.name) for entry in found)
    return [(name, os.stat(name, dir_fd=directory_fd, follow_symlinks=False)) for name in names]


def tree(walker: Walker, top: Parts) -> Iterator[tuple[Parts, int, Children]]:
    """Each directory from `top` down, parents first, siblings in order: (its path, its descriptor, its children).

    The descriptor is the walker's: it is valid until the generator goes on.
    """
    pending = [top]
    while pending:
        parts = pending.pop()
        fd = walker.directory(parts)
        try:
            found = children(fd)
        except OSError as error:
            raise failed(joined(parts), "reading the directory", error) from error
        yield parts, fd, found
        pending += [(*parts, name) for name, status in reversed(found) if stat.S_ISDIR(status.st_mode)]


def remove(walker: Walker, parts: Parts, *, keep_top: bool = False) -> None:
    """Delete what `parts` names, a directory with all that is in it (keep_top: only what is in it).

    OSError and LayerError (a mount below it) go to the caller; what was deleted by then stays deleted.
    """
    status = walker.find(parts)
    if status is None:
        return
    if not stat.S_ISDIR(status.st_mode):
        os.unlink(parts[-1], dir_fd=walker.directory(parts[:-1]))
        return
    pending = [parts]
    while pending:
        current = pending[-1]
        fd = walker.directory(current)
        below: list[Parts] = []
        for name, child in children(fd):
            if stat.S_ISDIR(child.st_mode):
                below.append((*current, name))
            else:
                os.unlink(name, dir_fd=fd)
        if below:
            pending += below
            continue
        pending.pop()
        if current != parts or not keep_top:
            os.rmdir(current[-1], dir_fd=walker.directory(current[:-1]))  # and remembers no directory that is gone
