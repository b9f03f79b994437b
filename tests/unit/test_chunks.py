"""The chunk table: its bytes, and what a hostile one may not say."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewarm.errors import SnapshotDamaged
from rewarm.store import chunks
from rewarm.store.chunks import CHUNK, MAX_TABLE, PAGE, RAW, RECORD, ZSTD, Chunk, decode, encode, pages
from rewarm.store.entries import ChunkPack

PACKS = (ChunkPack("a" * 64, 4 * CHUNK, 4 * CHUNK), ChunkPack("b" * 64, CHUNK + PAGE, 2 * CHUNK))
GOOD = [
    Chunk(b"\1" * 32, 0, RAW, 0, CHUNK, CHUNK, 0),
    Chunk(b"\2" * 32, 0, RAW, CHUNK, PAGE, PAGE, CHUNK),
    Chunk(b"\3" * 32, 1, ZSTD, 0, 5, CHUNK, 0),
    Chunk(b"\4" * 32, 1, ZSTD, PAGE, CHUNK - 1, CHUNK, CHUNK),
    Chunk(b"\1" * 32, 0, RAW, 0, CHUNK, CHUNK, 0),
]


def refused(data: bytes, packs: tuple[ChunkPack, ...] = PACKS) -> str:
    with pytest.raises(SnapshotDamaged) as caught:
        decode(data, packs, "default/model@123")
    assert str(caught.value).startswith("read chunk table default/model@123: ")
    return caught.value.cause


def test_a_record_is_what_the_format_says() -> None:
    chunk = Chunk(bytes(range(32)), 1, ZSTD, 0x1122334455667000, 0x89A, 0x1000, 0xAABBCCDDEEFF0000)
    numbers = struct.pack("<IIQIIQ", 1, 1, 0x1122334455667000, 0x89A, 0x1000, 0xAABBCCDDEEFF0000)
    assert encode([chunk]) == bytes(range(32)) + numbers
    assert RECORD.size == len(encode([chunk])) == 64


def test_the_rest_of_a_table() -> None:
    """Its numbers are those of the whole, and what it has not to look at may be anything."""
    data = encode(GOOD)
    assert chunks.count(data) == len(GOOD)
    assert [decode(data, PACKS, "x", first) for first in range(6)] == [GOOD[first:] for first in range(6)]
    bad = encode([GOOD[0]._replace(pack=9), *GOOD[1:4], GOOD[4]._replace(size=1)])
    assert decode(bad[: -RECORD.size], PACKS, "x", 1) == GOOD[1:4]
    with pytest.raises(SnapshotDamaged, match="chunk 4: field size"):
        decode(bad, PACKS, "x", 1)


def test_round_trip() -> None:
    assert decode(encode(GOOD), PACKS, "x") == GOOD
    assert decode(encode(reversed(GOOD)), PACKS, "x") == GOOD[::-1]
    assert decode(b"", (), "x") == []


def test_pages() -> None:
    assert [pages(size) for size in (0, 1, 4096, 4097)] == [0, 4096, 4096, 8192]


@pytest.mark.parametrize("size", [1, 63, 65, 64 * 5 - 1])
def test_a_table_that_was_cut(size: int) -> None:
    assert "not a multiple of 64" in refused(encode(GOOD)[:size])


def test_a_table_that_is_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_TABLE % RECORD.size == 0
    monkeypatch.setattr(chunks, "MAX_TABLE", 4 * RECORD.size)
    assert "has 320 bytes" in refused(encode(GOOD))


FIELDS = [
    ("pack", 2, "field pack is 2, the manifest has 2 packs"),
    ("pack", 0xFFFFFFFF, "field pack is"),
    ("encoding", 2, "field encoding is 2"),
    ("encoding", 0xFFFFFFFF, "field encoding"),
    ("encoding", ZSTD, "field stored"),
    ("offset", 1, "field offset is 1, not a multiple"),
    ("offset", 512, "not a multiple"),
    ("offset", 4 * CHUNK, "field offset is 8388608, past its pack"),
    ("offset", 3 * CHUNK + PAGE, "past its pack"),
    ("offset", 1 << 63, "past its pack"),
    ("offset", (1 << 64) - PAGE, "past its pack"),
    ("stored", 0, "field stored is 0"),
    ("stored", CHUNK - 1, "field stored"),
    ("stored", 0xFFFFFFFF, "past its pack"),
    ("size", 0, "field size is 0"),
    ("size", 4095, "field size is 4095"),
    ("size", CHUNK + PAGE, "field size"),
    ("size", 0xFFFFF000, "field size"),
    ("raw_offset", 2048, "field raw_offset is 2048, not a multiple"),
    ("raw_offset", 1 << 63, "field raw_offset is 9223372036854775808, past"),
    ("raw_offset", (1 << 64) - PAGE, "field raw_offset"),
    ("raw_offset", 4 * CHUNK, "field raw_offset is 8388608, past 8388608 raw bytes"),
]


@pytest.mark.parametrize(("field", "value", "cause"), FIELDS)
def test_a_bad_field_is_named_with_its_chunk(field: str, value: int, cause: str) -> None:
    bad = GOOD[0]._replace(**{field: value})  # type: ignore[arg-type]
    found = refused(encode([*GOOD[1:4], bad]))
    assert found.startswith("chunk 3: ")
    assert cause in found


def test_a_compressed_chunk_is_smaller_than_it_was() -> None:
    assert "field stored" in refused(encode([GOOD[2]._replace(stored=CHUNK)]), PACKS)
    assert "field stored is 0" in refused(encode([GOOD[2]._replace(stored=0)]))
    assert "field stored" in refused(encode([GOOD[2]._replace(stored=PAGE, size=PAGE)]))


@pytest.mark.parametrize(
    "second",
    [
        Chunk(b"\2" * 32, 0, RAW, PAGE, CHUNK, CHUNK, CHUNK),
        Chunk(b"\2" * 32, 0, RAW, CHUNK - PAGE, PAGE, PAGE, CHUNK),
        Chunk(b"\2" * 32, 0, RAW, CHUNK, PAGE, PAGE, CHUNK - PAGE),
        Chunk(b"\2" * 32, 0, RAW, CHUNK, PAGE, PAGE, 0),
    ],
)
def test_chunks_that_overlap(second: Chunk) -> None:
    assert "lies inside another chunk" in refused(encode([GOOD[0], second]))
    assert "lies inside another chunk" in refused(encode([second, GOOD[0]]))


def test_two_chunks_at_one_place() -> None:
    assert "is that of another chunk in pack 0" in refused(encode([GOOD[0], GOOD[0]._replace(digest=b"\7" * 32)]))
    smaller = GOOD[0]._replace(stored=PAGE, size=PAGE)
    assert "chunk 1: field offset is that of another" in refused(encode([GOOD[0], smaller]))


def test_no_packs_at_all() -> None:
    assert "the manifest has 0 packs" in refused(encode(GOOD), ())


@given(st.binary(max_size=640))
def test_noise_is_refused_or_makes_good_chunks(data: bytes) -> None:
    try:
        found = decode(data, PACKS, "x")
    except SnapshotDamaged:
        return
    for chunk in found:
        assert chunk.offset + chunk.stored <= PACKS[chunk.pack].size
        assert chunk.raw_offset + chunk.size <= PACKS[chunk.pack].raw_size


@given(st.integers(0, 64 * len(GOOD) - 1), st.integers(1, 255))
def test_a_flipped_byte_never_crashes(position: int, mask: int) -> None:
    data = bytearray(encode(GOOD))
    data[position] ^= mask
    try:
        decode(bytes(data), PACKS, "x")
    except SnapshotDamaged as error:
        assert "chunk" in error.cause
