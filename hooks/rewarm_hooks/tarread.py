"""Reading the members of a tar archive that may be hostile. Strict: what this reader does not know, it refuses by name.

It knows what `tarwrite` and the common layer writers make: POSIX ustar headers with octal numbers, pax extended
headers, GNU sparse format 1.0. tarfile is not used, since it takes a truncated archive for a complete one and guesses
where this refuses.
"""

from __future__ import annotations

import os

from . import member as kinds
from . import names, sparse, xattrs
from .errors import LayerError, shown
from .member import Member

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import BinaryIO

BLOCK = 512
_ZEROS = bytes(BLOCK)
_PAX_MAX = 16 << 20  # room for some hundred extended attributes of the greatest size
_ID_MAX = 2**32 - 2  # 2**32 - 1 means "leave it as it is" to chown
_SIZE_MAX = 2**63 - 1
_IGNORED = (b"atime", b"ctime", b"uname", b"gname", b"comment", b"hdrcharset", b"LIBARCHIVE.creationtime")
_KNOWN = (b"path", b"linkpath", b"size", b"uid", b"gid", b"mtime")
_SPARSE = (b"GNU.sparse.major", b"GNU.sparse.minor", b"GNU.sparse.name", b"GNU.sparse.realsize")
_XATTR = b"SCHILY.xattr."
_ARCHIVE = "archive"  # what an error names when there is no member to name

Pax = dict[bytes, bytes]


def members(layer: BinaryIO) -> Iterator[Member]:
    """Every member of a seekable archive in order. Raises LayerError at the first that is not well formed.

    The offsets in a Member's extents lie inside the archive. An archive without its end marker is truncated, and
    refused.
    """
    total = layer.seek(0, os.SEEK_END)
    offset = 0
    pax: Pax | None = None
    while True:
        layer.seek(offset)
        header = read(layer, BLOCK, _ARCHIVE)
        offset += BLOCK
        if header == _ZEROS:
            if pax is not None:
                raise LayerError(_ARCHIVE, f"an extended header without a member ends it at byte {offset}")
            if read(layer, BLOCK, _ARCHIVE) != _ZEROS:
                raise LayerError(_ARCHIVE, f"damaged: no second block of zeros at byte {offset}")
            return
        _check_block(header, offset - BLOCK)
        if header[156:157] == kinds.PAX:
            if pax is not None:
                raise LayerError(_ARCHIVE, f"two extended headers for one member at byte {offset}")
            size = _octal(header[124:136], "size", _ARCHIVE)
            if size > _PAX_MAX:
                raise LayerError(_ARCHIVE, f"an extended header of {size} bytes; at most {_PAX_MAX} are allowed")
            pax = _records(read(layer, size, _ARCHIVE))
            offset += _padded(size)
            continue
        member, stored = _member(layer, header, pax or {}, offset, total)
        pax = None
        offset += _padded(stored)
        yield member


def read(layer: BinaryIO, count: int, entry: bytes | str) -> bytes:
    """Exactly `count` bytes from where `layer` stands, or a LayerError that the archive is truncated."""
    pieces: list[bytes] = []
    while count:
        piece = layer.read(count)
        if not piece:
            raise LayerError(entry, "the archive is truncated")
        pieces.append(piece)
        count -= len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _member(layer: BinaryIO, header: bytes, pax: Pax, offset: int, total: int) -> tuple[Member, int]:
    """The member whose data begins at `offset`, and how many bytes of data the archive stores for it."""
    is_sparse = b"GNU.sparse.major" in pax
    name = _name(header, pax)
    kind = header[156:157].replace(b"\0", kinds.FILE)  # the old form of a regular file
    if kind not in b"0123456":
        raise LayerError(name, f"a member of type {shown(kind)}, which a layer may not hold")
    stored = (
        _decimal(pax[b"size"], "size", name, _SIZE_MAX) if b"size" in pax else _octal(header[124:136], "size", name)
    )
    if kind != kinds.FILE and (stored or is_sparse):
        raise LayerError(name, f"data in a member of type {shown(kind)}, which has none")
    if offset + _padded(stored) > total:
        raise LayerError(
            name, f"the archive is truncated {offset + _padded(stored) - total} bytes before the end of this member"
        )
    size = stored
    extents: tuple[kinds.Extent, ...] = ((0, stored, offset),) if stored else ()
    if is_sparse:
        if (pax[b"GNU.sparse.major"], pax.get(b"GNU.sparse.minor")) != (
            b"1",
            b"0",
        ) or b"GNU.sparse.realsize" not in pax:
            raise LayerError(name, "a sparse file in another form than GNU's 1.0")
        size = _decimal(pax[b"GNU.sparse.realsize"], "GNU.sparse.realsize", name, _SIZE_MAX)
        layer.seek(offset)
        extents = sparse.decode_map(name, lambda count: read(layer, count, name), offset, stored, size)
    mode = _octal(header[100:108], "mode", name)
    if mode > 0o7777:
        raise LayerError(name, f"a mode of {mode:o}; at most 7777 is allowed")
    member = Member(
        name,
        names.parse(name, directory=kind == kinds.DIRECTORY),
        kind,
        mode=mode,
        uid=_decimal(pax[b"uid"], "uid", name, _ID_MAX) if b"uid" in pax else _octal(header[108:116], "uid", name),
        gid=_decimal(pax[b"gid"], "gid", name, _ID_MAX) if b"gid" in pax else _octal(header[116:124], "gid", name),
        mtime=_time(pax[b"mtime"], name) if b"mtime" in pax else _octal(header[136:148], "mtime", name) * 10**9,
        size=size,
        extents=extents,
        link=_link(header, pax, kind, name),
        xattrs=_xattrs(pax, name),
        device=(_octal(header[329:337], "major", name), _octal(header[337:345], "minor", name)),
    )
    return member, stored


def _name(header: bytes, pax: Pax) -> bytes:
    for key in (b"GNU.sparse.name", b"path"):
        if key in pax:
            return pax[key]
    prefix = _text(header[345:500], "prefix")
    name = _text(header[:100], "name")
    return prefix + b"/" + name if prefix else name


def _link(header: bytes, pax: Pax, kind: bytes, name: bytes) -> bytes:
    link = pax[b"linkpath"] if b"linkpath" in pax else _text(header[157:257], "link")
    if kind not in (kinds.LINK, kinds.SYMLINK):
        if link:
            raise LayerError(name, "a link target in a member that is no link")
        return b""
    if not link or b"\0" in link or len(link) > 4095:
        raise LayerError(name, "a link target that is empty, holds a NUL byte or is longer than 4095 bytes")
    return link


def _xattrs(pax: Pax, name: bytes) -> dict[bytes, bytes]:
    found: dict[bytes, bytes] = {}
    for key, value in pax.items():
        if key.startswith(_XATTR):
            attribute = key.removeprefix(_XATTR).replace(b"%3D", b"=").replace(b"%25", b"%")
            xattrs.check(name, attribute, value)
            found[attribute] = value
    return found


def _records(body: bytes) -> Pax:
    """The "<length> <key>=<value>\\n" records of an extended header. Unknown and repeated keys are refused by name."""
    found: Pax = {}
    position = 0
    while position < len(body):
        space = body.find(b" ", position, position + 10)
        digits = body[position:space] if space > 0 else b""
        end = position + int(digits) if digits.isdigit() else -1
        key, equals, value = body[space + 1 : end - 1].partition(b"=") if space < end - 1 else (b"", b"", b"")
        if not key or not equals or end > len(body) or body[end - 1 : end] != b"\n":
            raise LayerError(_ARCHIVE, "damaged: an extended header with a record that is not well formed")
        if key in found:
            raise LayerError(value if key == b"path" else _ARCHIVE, f"an extended header with two records {shown(key)}")
        if not (key in _KNOWN or key in _SPARSE or key in _IGNORED or key.startswith(_XATTR)):
            raise LayerError(found.get(b"path", b"archive"), f"an extended header with an unknown record {shown(key)}")
        found[key] = value
        position = end
    return found


def _check_block(header: bytes, at: int) -> None:
    checksum = sum(header[:148]) + 8 * 0x20 + sum(header[156:])
    if header[257:265] != b"ustar\00000":
        raise LayerError(_ARCHIVE, f"no POSIX tar header at byte {at}")
    if _octal(header[148:156], "checksum", _ARCHIVE) != checksum:
        raise LayerError(_ARCHIVE, f"damaged: the header at byte {at} has a wrong checksum")


def _text(field: bytes, what: str) -> bytes:
    text, _, rest = field.partition(b"\0")
    if rest.strip(b"\0"):
        raise LayerError(text, f"a NUL byte in the {what}")
    return text


def _octal(field: bytes, what: str, entry: bytes | str) -> int:
    digits = field.rstrip(b"\0 ").lstrip(b" ")
    if not digits:
        return 0
    if digits.strip(b"01234567"):
        raise LayerError(entry, f"a {what} that is no octal number")
    return int(digits, 8)


def _decimal(text: bytes, what: str, entry: bytes, most: int) -> int:
    if not text.isdigit() or len(text) > 20 or int(text) > most:
        raise LayerError(entry, f"a {what} of {shown(text)}; a number from 0 to {most} is allowed")
    return int(text)


def _time(text: bytes, entry: bytes) -> int:
    """ns since the epoch of "[-]seconds[.fraction]"; digits beyond the ninth are dropped."""
    negative = text.startswith(b"-")
    seconds, _, fraction = text.removeprefix(b"-").partition(b".")
    if not seconds.isdigit() or len(seconds) > 15 or (fraction and not fraction.isdigit()):
        raise LayerError(entry, f"an mtime of {shown(text)}")
    nanoseconds = int(seconds) * 10**9 + int(fraction[:9].ljust(9, b"0"))
    return -nanoseconds if negative else nanoseconds


def _padded(size: int) -> int:
    return size + -size % BLOCK
