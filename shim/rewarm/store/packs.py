"""Chunk packs: the file format, its index and its name.

A pack begins with its chunks, each at an offset that is a multiple of 4096 with zeros between, and ends with

    index    magic, u32 number of chunks, u32 zero, then for each: digest, u32 encoding, u32 stored, u32 size, u32 zero
    footer   u64 offset of the index, magic

Numbers are little-endian. Where a chunk lies follows from the sizes of those before it. The pack's name is a BLAKE3
of the index alone, under a context of its own: the index has the digest of every chunk, and no file pack can have
that name.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from blake3 import blake3

from rewarm.errors import SnapshotDamaged

from .chunks import CHUNK, PAGE, RAW, ZSTD, pages

MAGIC = b"RWCHUNK1"
MAX_RAW = 64 << 20
"""Raw bytes in one pack, each chunk rounded up to whole pages."""
MAX_COUNT = MAX_RAW // PAGE
HEADER = struct.Struct("<8sII")
ENTRY = struct.Struct("<32sIIII")
FOOTER = struct.Struct("<Q8s")
CONTEXT = "rewarm chunk pack v1"

_NEXT_STEP = "capture it again"


class Record(NamedTuple):
    """One chunk of a pack: `stored` bytes that make `size` raw bytes with this BLAKE3-256."""

    digest: bytes
    encoding: int
    stored: int
    size: int


class Place(NamedTuple):
    """Where a chunk lies, in bytes: in the pack, and in the pack's raw layout."""

    offset: int
    raw_offset: int


def index_bytes(records: Sequence[Record]) -> bytes:
    """The index; the pack's name is `name_of` these bytes."""
    entries = b"".join(ENTRY.pack(*record, 0) for record in records)
    return HEADER.pack(MAGIC, len(records), 0) + entries


def footer_bytes(offset: int) -> bytes:
    """The footer of a pack whose index lies at `offset`."""
    return FOOTER.pack(offset, MAGIC)


def name_of(index: bytes) -> str:
    """The name of the pack with this index: 64 hex digits."""
    return blake3(index, derive_key_context=CONTEXT).hexdigest()


def layout(records: Iterable[Record]) -> list[Place]:
    """The place of each chunk."""
    places = []
    offset = raw_offset = 0
    for record in records:
        places.append(Place(offset, raw_offset))
        offset += pages(record.stored)
        raw_offset += pages(record.size)
    return places


def data_size(records: Iterable[Record]) -> int:
    """Bytes of the pack before its index."""
    return sum(pages(record.stored) for record in records)


def raw_size(records: Iterable[Record]) -> int:
    """Bytes of the pack's raw layout."""
    return sum(pages(record.size) for record in records)


def size_limits(raw_bytes: int) -> tuple[int, int]:
    """The least and the most bytes that a pack with so large a raw layout can have."""
    around = HEADER.size + FOOTER.size
    return around + ENTRY.size + PAGE, around + raw_bytes // PAGE * ENTRY.size + raw_bytes


def read_index(read: Callable[[int, int], bytes], size: int, digest: str = "") -> list[Record]:
    """The index of a pack of `size` bytes, every field checked; also its name, if `digest` is given.

    `read(offset, length)` returns the bytes there, fewer at the end. It is called for at most 800 KB. Raises
    SnapshotDamaged, and what `read` raises.
    """
    where = digest or "chunk pack"
    if size < HEADER.size + FOOTER.size:
        raise _damaged(where, f"has {size} bytes, too few for a chunk pack")
    end = size - FOOTER.size
    footer = read(end, FOOTER.size)
    if len(footer) != FOOTER.size or footer[-len(MAGIC) :] != MAGIC:
        raise _damaged(where, "is no chunk pack: its footer is not there")
    start = FOOTER.unpack(footer)[0]
    if not HEADER.size <= end - start <= HEADER.size + MAX_COUNT * ENTRY.size or start % PAGE:
        raise _damaged(where, f"its footer says that the index is at {start}, which cannot be")
    index = read(start, end - start)
    if len(index) != end - start:
        raise _damaged(where, "became shorter while it was read")
    # The name first: what follows then says what the writer did, not what a disk did.
    if digest and name_of(index) != digest:
        raise _damaged(where, f"its index was changed: it belongs to pack {name_of(index)[:12]}…")
    magic, count, zero = HEADER.unpack_from(index)
    if magic != MAGIC or zero or len(index) != HEADER.size + count * ENTRY.size or not count:
        raise _damaged(where, f"its index says {count} chunks in {len(index)} bytes")
    records = []
    for number, (chunk, encoding, stored, raw, rest) in enumerate(ENTRY.iter_unpack(index[HEADER.size :])):
        good = stored == raw if encoding == RAW else encoding == ZSTD and 0 < stored < raw
        if not good or rest or not 0 < raw <= CHUNK or raw % PAGE:
            cause = f"chunk {number} of its index has encoding {encoding}, {stored} bytes stored, {raw} bytes raw"
            raise _damaged(where, cause)
        records.append(Record(chunk, encoding, stored, raw))
    if data_size(records) != start:
        raise _damaged(where, f"its chunks have {data_size(records)} bytes, its index is at {start}")
    if raw_size(records) > MAX_RAW:
        raise _damaged(where, f"has {raw_size(records)} raw bytes, more than {MAX_RAW}")
    return records


def _damaged(where: str, cause: str) -> SnapshotDamaged:
    return SnapshotDamaged("read chunk pack", where, cause, _NEXT_STEP)
