"""Putting what lies in a directory into an archive; shared by the capture and by the undo file."""

from __future__ import annotations

import os
import stat

from . import names, regular, xattrs
from .errors import failed
from .names import Parts, joined

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .member import LayerStats
    from .tarwrite import TarWriter


def directory(tar: TarWriter, parts: Parts, fd: int, attributes: dict[bytes, bytes]) -> None:
    """The open directory itself, without what is in it."""
    if parts:
        names.check_plain(parts[-1], joined(parts))
    tar.inode(joined(parts), os.fstat(fd), attributes)


def other(
    tar: TarWriter,
    stats: LayerStats,
    parts: Parts,
    directory_fd: int,
    status: os.stat_result,
    attributes: dict[bytes, bytes],
) -> None:
    """Anything but a directory, by its name in `directory_fd`; a socket is only noted in `stats`. Raises LayerError.

    A socket has no form in an archive, and one without its listener is of no use to anybody.
    """
    path = joined(parts)
    names.check_plain(parts[-1], path)
    mode = status.st_mode
    try:
        if stat.S_ISSOCK(mode):
            stats.sockets.append(os.fsdecode(path))
        elif stat.S_ISREG(mode):
            fd = regular.open_regular(parts[-1], os.O_RDONLY, directory_fd, known=status)
            try:
                tar.file(path, fd, attributes)
            finally:
                os.close(fd)
        elif stat.S_ISLNK(mode):
            tar.inode(path, status, attributes, link=os.readlink(parts[-1], dir_fd=directory_fd))
        else:
            tar.inode(path, status, attributes)
    except OSError as error:
        raise failed(path, "reading it", error) from error


def attributes_in(directory_fd: int, name: bytes, path: bytes) -> dict[bytes, bytes]:
    """Every extended attribute of `name` in a directory, not followed."""
    try:
        return xattrs.read(xattrs.place(directory_fd, name))
    except OSError as error:
        raise failed(path, "reading its extended attributes", error) from error


def attributes_at(fd: int, path: bytes) -> dict[bytes, bytes]:
    """Every extended attribute of an open file."""
    try:
        return xattrs.read(fd)
    except OSError as error:
        raise failed(path, "reading its extended attributes", error) from error
