"""The chunk table: where each chunk of a snapshot's memory lies. Its bytes, and a parser that believes nothing.

The table is the snapshot's file `memory/chunks`: one record of 64 bytes a chunk, in the order of the chunks' numbers.
Equal chunks have equal records: the same place may stand there many times, two places that overlap may not.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from rewarm.errors import SnapshotDamaged

if TYPE_CHECKING:
    from .entries import ChunkPack

PAGE = 4096
"""Bytes: places in packs and sizes of raw chunks are multiples of it, as O_DIRECT and page tables want them."""
CHUNK = 2 << 20
"""Bytes of memory in the largest chunk: one huge page of x86-64."""
CHUNKS = "memory/chunks"
"""The file of a snapshot that holds its chunk table."""
RAW, ZSTD = 0, 1
"""Encodings: the bytes themselves, or one zstd frame that is smaller than they are."""
RECORD = struct.Struct("<32sIIQIIQ")
"""digest (BLAKE3-256 of the raw bytes), pack, encoding, offset, stored, size, raw_offset."""
MAX_TABLE = 64 << 20
"""Bytes of the longest table: 2 TiB of memory. Python takes three times that to read one, and the part
of process memory is read twice."""

_NEXT_STEP = "remove the snapshot with `rewarm rm` and capture again"


class Chunk(NamedTuple):
    """`stored` bytes at `offset` of pack number `pack` of the manifest, which make `size` raw bytes with `digest`.

    `raw_offset` is the chunk's place in the pack's raw layout, in which every chunk of the pack lies uncompressed.
    """

    digest: bytes
    pack: int
    encoding: int
    offset: int
    stored: int
    size: int
    raw_offset: int


def pages(size: int) -> int:
    """`size` rounded up to whole pages, in bytes."""
    return -(-size // PAGE) * PAGE


def encode(chunks: Iterable[Chunk]) -> bytes:
    """The table's bytes."""
    return b"".join(RECORD.pack(*chunk) for chunk in chunks)


def count(data: bytes) -> int:
    """How many chunks there are, if the table is what it should be."""
    return len(data) // RECORD.size


def decode(data: bytes, packs: Sequence[ChunkPack], where: str, first: int = 0) -> list[Chunk]:
    """The chunks of a table from number `first` on, each inside its pack and none over a part of another of these.

    `where` names the snapshot in errors. Raises SnapshotDamaged that names the chunk and the field.
    """
    if len(data) % RECORD.size or len(data) > MAX_TABLE:
        raise _damaged(where, f"has {len(data)} bytes, not a multiple of {RECORD.size} up to {MAX_TABLE}")
    chunks = list(map(Chunk._make, RECORD.iter_unpack(memoryview(data)[first * RECORD.size :])))
    limits = [(pack.size, pack.raw_size) for pack in packs]
    places: dict[tuple[int, int], Chunk] = {}
    for number, chunk in enumerate(chunks, first):
        _, pack, encoding, offset, stored, size, raw_offset = chunk
        # All at once, since a table has thousands of records and a restore waits; the error's field is found later.
        if (
            pack >= len(limits)
            or not 0 < size <= CHUNK
            or (size | offset | raw_offset) % PAGE
            or offset + stored > limits[pack][0]
            or raw_offset + size > limits[pack][1]
            or not (stored == size if encoding == RAW else encoding == ZSTD and 0 < stored < size)
        ):
            _blame(chunk, number, limits, where)
        if places.setdefault((pack, offset), chunk) != chunk:
            raise _damaged(where, f"chunk {number}: field offset is that of another chunk in pack {pack}")
    _check_apart(places, where)
    return chunks


def _check_apart(places: dict[tuple[int, int], Chunk], where: str) -> None:
    """Chunks of one pack overlap neither as stored nor in the raw layout, and follow each other alike in both."""
    last, end, raw_end = -1, 0, 0
    for (pack, offset), chunk in sorted(places.items()):
        if pack != last:
            last, end, raw_end = pack, 0, 0
        for name, value, least in (("offset", offset, end), ("raw_offset", chunk.raw_offset, raw_end)):
            if value < least:
                cause = f"a chunk at offset {offset} of pack {pack}: field {name} {value} lies inside another chunk"
                raise _damaged(where, cause)
        end, raw_end = offset + chunk.stored, chunk.raw_offset + chunk.size


def _blame(chunk: Chunk, number: int, limits: Sequence[tuple[int, int]], where: str) -> NoReturn:
    """Say which field is wrong."""
    if chunk.pack >= len(limits):
        raise _damaged(where, f"chunk {number}: field pack is {chunk.pack}, the manifest has {len(limits)} packs")
    size, raw_size = limits[chunk.pack]
    if not 0 < chunk.size <= CHUNK or chunk.size % PAGE:
        raise _damaged(where, f"chunk {number}: field size is {chunk.size}, not a multiple of {PAGE} up to {CHUNK}")
    for name, value in (("offset", chunk.offset), ("raw_offset", chunk.raw_offset)):
        if value % PAGE:
            raise _damaged(where, f"chunk {number}: field {name} is {value}, not a multiple of {PAGE}")
    if chunk.encoding not in (RAW, ZSTD):
        raise _damaged(where, f"chunk {number}: field encoding is {chunk.encoding}, which is unknown")
    if chunk.offset + chunk.stored > size:
        raise _damaged(where, f"chunk {number}: field offset is {chunk.offset}, past its pack of {size} bytes")
    if chunk.raw_offset + chunk.size > raw_size:
        raise _damaged(where, f"chunk {number}: field raw_offset is {chunk.raw_offset}, past {raw_size} raw bytes")
    raise _damaged(where, f"chunk {number}: field stored is {chunk.stored} of {chunk.size} raw bytes")


def _damaged(where: str, cause: str) -> SnapshotDamaged:
    return SnapshotDamaged("read chunk table", where, cause, _NEXT_STEP)
