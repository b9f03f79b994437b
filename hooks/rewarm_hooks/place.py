"""Making one member in a directory: its content, then its metadata in the only order that keeps all of it.

The order: data; owner (chown clears setuid bits and security.capability); mode; xattrs (ACLs last decide the mode's
group bits, as they did in the original); times (everything above disturbs them). Nothing is ever written through an
existing file.
"""

from __future__ import annotations

import os
import stat

from . import member as kinds
from . import xattrs
from .errors import failed
from .member import Member
from .tarread import read

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import BinaryIO

_PIECE = 1 << 20
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_SPECIAL = {kinds.FIFO: stat.S_IFIFO, kinds.CHAR: stat.S_IFCHR, kinds.BLOCK_DEVICE: stat.S_IFBLK}


def make(member: Member, directory_fd: int, layer: BinaryIO) -> None:
    """Make anything but a directory or hard link in a directory that has nothing of its name. Raises LayerError."""
    name = member.parts[-1]
    try:
        if member.kind == kinds.FILE:
            fd = os.open(name, _NEW, 0o600, dir_fd=directory_fd)
            try:
                _fill(member, fd, layer)
                metadata(member, fd)
            finally:
                os.close(fd)
            return
        if member.kind == kinds.SYMLINK:
            os.symlink(member.link, name, dir_fd=directory_fd)
        else:
            os.mknod(name, _SPECIAL[member.kind] | 0o600, os.makedev(*member.device), dir_fd=directory_fd)
        os.chown(name, member.uid, member.gid, dir_fd=directory_fd, follow_symlinks=False)
        if member.kind != kinds.SYMLINK:
            _chmod(name, member.mode, directory_fd)
        xattrs.write(member.name, xattrs.place(directory_fd, name), member.xattrs)
        os.utime(name, ns=(member.mtime, member.mtime), dir_fd=directory_fd, follow_symlinks=False)
    except OSError as error:
        raise failed(member.name, "making it", error) from error


def metadata(member: Member, fd: int) -> None:
    """Give an open file or directory the member's owner, mode, xattrs and mtime; atime becomes the mtime."""
    try:
        os.fchown(fd, member.uid, member.gid)
        os.fchmod(fd, member.mode)
        xattrs.write(member.name, fd, member.xattrs)
        os.utime(fd, ns=(member.mtime, member.mtime))
    except OSError as error:
        raise failed(member.name, "setting its metadata", error) from error


def _fill(member: Member, fd: int, layer: BinaryIO) -> None:
    """Write the data; what no extent covers stays a hole."""
    for offset, length, source in member.extents:
        layer.seek(source)
        os.lseek(fd, offset, os.SEEK_SET)
        while length:
            piece = memoryview(read(layer, min(length, _PIECE), member.name))
            length -= len(piece)
            while piece:
                piece = piece[os.write(fd, piece) :]
    os.ftruncate(fd, member.size)


def _chmod(name: bytes, mode: int, directory_fd: int) -> None:
    """chmod that follows no link: fchmodat has no such flag before Linux 6.6, but takes the /proc name of an O_PATH
    descriptor.
    """
    fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory_fd)
    try:
        os.chmod(b"/proc/self/fd/%d" % fd, mode)
    finally:
        os.close(fd)
