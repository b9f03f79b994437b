"""Sparse files: where a file has data, and the map of GNU's sparse format 1.0, which GNU tar, Go, Python and
libarchive read.

In that format the pax records GNU.sparse.{major,minor,name,realsize} announce it, and the member's data begins with
the map: decimal lines "<number of extents>", then "<offset>" and "<length>" of each, filled up with NUL to a whole
block.
"""

from __future__ import annotations

import errno
import os

from .errors import LayerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .member import Extent

_BLOCK = 512
_EXTENTS_MAX = 1 << 20  # bounds the memory that a hostile map can take


def data_of(fd: int, status: os.stat_result) -> list[tuple[int, int]]:
    """(offset, length) in bytes of each part of the file that is not a hole, by SEEK_DATA and SEEK_HOLE."""
    size = status.st_size
    if size == 0:
        return []
    if status.st_blocks * 512 >= size:  # no room for a hole of a block
        return [(0, size)]
    found: list[tuple[int, int]] = []
    position = 0
    while position < size:
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole is left
                break
            raise
        if start >= size:
            break
        position = min(os.lseek(fd, start, os.SEEK_HOLE), size)
        found.append((start, position - start))
    return joined(found, _EXTENTS_MAX)


def joined(data: list[tuple[int, int]], most: int) -> list[tuple[int, int]]:
    """`data` with the smallest holes taken as data where that is needed to have at most `most` (at least 1) extents."""
    gap = 4096
    while len(data) > most:
        fewer = data[:1]
        for offset, length in data[1:]:
            start, before = fewer[-1]
            if offset - start - before <= gap:
                fewer[-1] = (start, offset + length - start)
            else:
                fewer.append((offset, length))
        data, gap = fewer, gap * 2
    return data


def encode_map(data: list[tuple[int, int]], size: int) -> bytes:
    """The map of a file of `size` bytes. GNU tar takes the file's size from an empty extent at its end."""
    extents = list(data)
    if not extents or sum(extents[-1]) < size:
        extents.append((size, 0))
    text = b"".join(b"%d\n" % number for number in (len(extents), *(n for extent in extents for n in extent)))
    return text + b"\0" * (-len(text) % _BLOCK)


def decode_map(name: bytes, read: Callable[[int], bytes], at: int, stored: int, size: int) -> tuple[Extent, ...]:
    """The extents of member `name`, whose `stored` bytes begin at `at` in the archive and unpack to `size` bytes.

    read(n) gives the next n bytes of the member. The map must be in order, without overlap, inside the file, and
    account for exactly the bytes that are stored: so the data of a member is never more than the archive holds. Else
    LayerError.
    """
    lines: list[bytes] = []
    rest = b""
    used = 0
    wanted = 1
    while len(lines) < wanted:
        if len(rest) > 20:
            raise LayerError(name, "its sparse map holds something that is not a number")
        if used + _BLOCK > stored:
            raise LayerError(name, "its sparse map is longer than the member")
        used += _BLOCK
        *whole, rest = (rest + read(_BLOCK)).split(b"\n")
        lines += whole
        if wanted == 1 and lines:
            count = _number(name, lines[0])
            # two lines of at least two bytes each; and what `encode_map` adds at the end
            if count > min(stored // 4, _EXTENTS_MAX + 1):
                raise LayerError(name, f"its sparse map claims {count} extents in {stored} bytes")
            wanted = 1 + 2 * count
    numbers = [_number(name, line) for line in lines[1:wanted]]
    extents: list[Extent] = []
    end = 0
    source = at + used
    for offset, length in zip(numbers[::2], numbers[1::2], strict=True):
        if offset < end or offset + length > size:
            raise LayerError(name, f"its sparse map has {length} bytes at {offset}: out of order, or not in the file")
        end = offset + length
        if length:
            extents.append((offset, length, source))
        source += length
    if source != at + stored:
        raise LayerError(name, f"its sparse map accounts for {source - at} of {stored} stored bytes")
    return tuple(extents)


def _number(name: bytes, text: bytes) -> int:
    if not text.isdigit() or len(text) > 19:
        raise LayerError(name, "its sparse map holds something that is not a number")
    return int(text)
