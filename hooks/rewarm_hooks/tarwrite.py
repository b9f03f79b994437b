"""Writing tar members in the POSIX pax format, forward only, the same bytes for the same input.

Written here and not by the standard library's tarfile because that cannot write sparse files and takes as long to
import as a small diff takes to apply.
"""

from __future__ import annotations

import os
import stat

from . import member as kinds
from . import sparse
from .errors import LayerError, failed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import BinaryIO

    from .member import LayerStats

BLOCK = 512
_PIECE = 1 << 20
_ID_MAX = 0o7777777
_SIZE_MAX = 0o77777777777


class TarWriter:
    """Members into `out`, counted in `stats`. Nothing is complete before `finish`."""

    def __init__(self, out: BinaryIO, stats: LayerStats) -> None:
        self._out = out
        self._stats = stats
        self._links: dict[tuple[int, int], bytes] = {}  # (device, inode) of a file -> the first of its names

    def inode(self, name: bytes, status: os.stat_result, attributes: dict[bytes, bytes], *, link: bytes = b"") -> None:
        """A directory, symbolic link (to `link`), FIFO or device with the metadata of `status`."""
        mode = status.st_mode
        kind = _KINDS[stat.S_IFMT(mode)]
        is_device = stat.S_ISCHR(mode) or stat.S_ISBLK(mode)
        device = (os.major(status.st_rdev), os.minor(status.st_rdev)) if is_device else (0, 0)
        if kind == kinds.DIRECTORY and not name.endswith(b"/"):
            name += b"/"
        self._header(name, kind, status, attributes, link=link, device=device)
        self._stats.entries += 1

    def file(self, name: bytes, fd: int, attributes: dict[bytes, bytes]) -> None:
        """A regular file: its data (holes left out) and metadata; a hard link if another name of it was written before.

        Raises LayerError if it gets shorter meanwhile.
        """
        status = os.fstat(fd)
        identity = (status.st_dev, status.st_ino)
        self._stats.entries += 1
        # Whatever the link count says: a name that was unlinked and is written again is no longer counted.
        first = self._links.setdefault(identity, name)
        if first != name:
            self._header(name, kinds.LINK, status, {}, link=first)
            return
        try:
            data = sparse.data_of(fd, status)
        except OSError as error:
            raise failed(name, "finding its holes", error) from error
        length = sum(part[1] for part in data)
        if length == status.st_size:
            self._header(name, kinds.FILE, status, attributes, stored=length)
        else:
            mapped = sparse.encode_map(data, status.st_size)
            self._header(name, kinds.FILE, status, attributes, stored=len(mapped) + length, sparse_size=status.st_size)
            self._write(mapped)
        self._copy(name, fd, data)
        self._write(b"\0" * (-length % BLOCK))
        self._stats.data_bytes += length

    def marker(self, name: bytes) -> None:
        """An empty file: a whiteout or an opaque marker."""
        if not _plain(name):
            self._write(_pax([(b"path", name)]))
        self._write(_block(name, kinds.FILE, 0, 0, 0, 0, 0))

    def finish(self) -> None:
        """The end of the archive: two blocks of zeros."""
        self._write(b"\0" * (2 * BLOCK))

    def _header(
        self,
        name: bytes,
        kind: bytes,
        status: os.stat_result,
        attributes: dict[bytes, bytes],
        *,
        stored: int = 0,
        link: bytes = b"",
        sparse_size: int | None = None,
        device: tuple[int, int] = (0, 0),
    ) -> None:
        uid, gid, mtime = status.st_uid, status.st_gid, status.st_mtime_ns
        records: list[tuple[bytes, bytes]] = []
        short = name
        if sparse_size is not None:
            short = b"GNUSparseFile.0/" + name.rpartition(b"/")[2]  # what a reader without sparse support gets
            records += [
                (b"GNU.sparse.major", b"1"),
                (b"GNU.sparse.minor", b"0"),
                (b"GNU.sparse.name", name),
                (b"GNU.sparse.realsize", b"%d" % sparse_size),
            ]
        elif not _plain(name):
            records.append((b"path", name))
        if link and not _plain(link):
            records.append((b"linkpath", link))
        seconds, fraction = divmod(mtime, 10**9)
        if fraction or not 0 <= seconds <= _SIZE_MAX:
            records.append((b"mtime", _decimal(mtime)))
        records += [(key, b"%d" % value) for key, value in ((b"uid", uid), (b"gid", gid)) if value > _ID_MAX]
        if stored > _SIZE_MAX:
            records.append((b"size", b"%d" % stored))
        for attribute, value in sorted(attributes.items()):
            # GNU tar's way to keep a "=" in the name from ending the keyword
            records.append((b"SCHILY.xattr." + attribute.replace(b"%", b"%25").replace(b"=", b"%3D"), value))
        if records:
            self._write(_pax(records))
        clipped = min(max(seconds, 0), _SIZE_MAX)
        mode = stat.S_IMODE(status.st_mode)
        self._write(_block(short, kind, mode, uid, gid, stored, clipped, link=link, device=device))

    def _copy(self, name: bytes, fd: int, data: list[tuple[int, int]]) -> None:
        for offset, length in data:
            end = offset + length
            while offset < end:
                try:
                    piece = os.pread(fd, min(_PIECE, end - offset), offset)
                except OSError as error:
                    raise failed(name, "reading it", error) from error
                if not piece:
                    raise LayerError(name, f"it became shorter than {end} bytes while it was read")
                self._write(piece)
                offset += len(piece)

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:  # an unbuffered file may take less than it is given
            view = view[self._out.write(view) :]


_KINDS = {
    stat.S_IFDIR: kinds.DIRECTORY,
    stat.S_IFLNK: kinds.SYMLINK,
    stat.S_IFIFO: kinds.FIFO,
    stat.S_IFCHR: kinds.CHAR,
    stat.S_IFBLK: kinds.BLOCK_DEVICE,
}


def _plain(name: bytes) -> bool:
    """Whether a name needs no pax record."""
    return len(name) <= 100 and name.isascii()


def _decimal(nanoseconds: int) -> bytes:
    sign = b"-" if nanoseconds < 0 else b""
    seconds, fraction = divmod(abs(nanoseconds), 10**9)
    return b"%s%d.%09d" % (sign, seconds, fraction)


def _pax(records: list[tuple[bytes, bytes]]) -> bytes:
    """An extended header with `records`; names that are not UTF-8 are announced, as POSIX wants it."""
    names = (b"path", b"linkpath", b"GNU.sparse.name")
    if not all(_utf8(value) for key, value in records if key in names):
        records = [(b"hdrcharset", b"BINARY"), *records]
    body = b"".join(_record(key, value) for key, value in records)
    return _block(b"PaxHeaders/x", kinds.PAX, 0o644, 0, 0, len(body), 0) + body + b"\0" * (-len(body) % BLOCK)


def _utf8(value: bytes) -> bool:
    try:
        value.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _record(key: bytes, value: bytes) -> bytes:
    text = b" %s=%s\n" % (key, value)
    length = len(text) + 1
    while len(b"%d" % length) + len(text) != length:  # the length counts its own digits
        length = len(b"%d" % length) + len(text)
    return b"%d%s" % (length, text)


def _block(
    name: bytes,
    kind: bytes,
    mode: int,
    uid: int,
    gid: int,
    size: int,
    mtime: int,
    *,
    link: bytes = b"",
    device: tuple[int, int] = (0, 0),
) -> bytes:
    """A ustar header block. What does not fit its fields is cut here and stands in full in the pax header before it."""
    numbers = b"%07o\0%07o\0%07o\0" % (mode, min(uid, _ID_MAX), min(gid, _ID_MAX))
    size = size if size <= _SIZE_MAX else 0
    head = _ascii(name).ljust(100, b"\0") + numbers + b"%011o\0%011o\0" % (size, mtime)
    tail = kind + _ascii(link).ljust(100, b"\0") + b"ustar\00000".ljust(72, b"\0") + b"%07o\0%07o\0" % device
    tail = tail.ljust(BLOCK - 156, b"\0")
    checksum = sum(head) + sum(tail) + 8 * 0x20
    return head + b"%06o\0 " % checksum + tail


def _ascii(text: bytes) -> bytes:
    return text[:100].decode("ascii", "replace").encode("ascii", "replace")
