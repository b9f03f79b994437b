"""The snapshot's file `memory/places`: where in which process each chunk goes.

Record N belongs to chunk N of `memory/chunks`. A chunk is the pages of a window of 2 MiB of one mapping, without those
that are not there and those that need not be; the mask says which they are. The file is hostile input.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from operator import itemgetter
from typing import NamedTuple

PLACES = "memory/places"
PAGE = 4096
WINDOW = 2 << 20
MASK_BYTES = WINDOW // PAGE // 8
FORCED = 1
"""Flag of a chunk whose mapping the process itself may not write."""
TOP = 1 << 47
"""End of a process's addresses on x86-64 with four levels of page tables, which is what CRIU restores."""

_FULL = b"\xff" * MASK_BYTES
_RECORD = struct.Struct(f"<IIQ{MASK_BYTES}s")


class Place(NamedTuple):
    """Where a chunk goes: process (its number in the container's pid namespace), address of the window, its pages."""

    pid: int
    flags: int
    base: int
    mask: bytes

    @property
    def forced(self) -> bool:
        return bool(self.flags & FORCED)

    @property
    def bits(self) -> int:
        """The mask as a number: bit N is the page at `base` + N * PAGE."""
        return int.from_bytes(self.mask, "little")

    @property
    def span(self) -> tuple[int, int]:
        """The first address and the one after the last."""
        if self.mask == _FULL:  # of most chunks, and a large snapshot has thousands
            return self.base, self.base + WINDOW
        bits = self.bits
        return self.base + ((bits & -bits).bit_length() - 1) * PAGE, self.base + bits.bit_length() * PAGE


class Bad(ValueError):
    """What is wrong with the file, naming the record."""


def encode(places: Iterable[Place]) -> bytes:
    return b"".join(_RECORD.pack(*place) for place in places)


def count(data: bytes) -> int:
    """How many places there are, if the file is what it should be."""
    return len(data) // _RECORD.size


def decode(data: bytes, sizes: list[int]) -> list[Place]:
    """The places of chunks of these sizes (bytes). Raises Bad for all that a capture would not have written."""
    if len(data) != len(sizes) * _RECORD.size:
        raise Bad(f"it has {len(data)} bytes for {len(sizes)} chunks of {_RECORD.size} bytes each")
    found = [Place(*record) for record in _RECORD.iter_unpack(data)]
    for number, (place, size) in enumerate(zip(found, sizes, strict=True)):
        pages = WINDOW // PAGE if place.mask == _FULL else place.bits.bit_count()
        if place.flags & ~FORCED:
            raise Bad(f"place {number} has unknown flags {place.flags:#x}")
        if not pages or pages * PAGE != size:
            raise Bad(f"place {number} has {pages} pages, its chunk {size} bytes")
        if place.base % PAGE or place.span[1] > TOP:
            raise Bad(f"place {number} at {place.base:#x} is unaligned or beyond the address space")
    _check_overlaps(found)
    return found


def _check_overlaps(places: list[Place]) -> None:
    """No address is in two chunks: which of them would count is not for threads to decide."""
    end = 0
    last = -1
    for place in sorted(places, key=itemgetter(0, 2)):  # by process and address
        first, after = place.span
        if place.pid == last and first < end:
            raise Bad(f"two places overlap in process {place.pid} at {first:#x}")
        last, end = place.pid, after
