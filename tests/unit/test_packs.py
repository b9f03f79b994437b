"""The index of a pack of chunks: its bytes and name, and the lies that it is caught at."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from rewarm.errors import SnapshotDamaged
from rewarm.store import packs
from rewarm.store.chunks import CHUNK, PAGE, RAW, ZSTD
from rewarm.store.directory import DirectoryStore
from rewarm.store.packs import MAX_COUNT, Record, footer_bytes, index_bytes, layout, name_of, read_index, size_limits
from support.chunked import some, write_chunks
from support.snapshots import write_snapshot

RECORDS = [
    Record(b"\1" * 32, RAW, CHUNK, CHUNK),
    Record(b"\2" * 32, ZSTD, 5, PAGE),
    Record(b"\3" * 32, ZSTD, PAGE + 1, CHUNK),
]
END = CHUNK + PAGE + 2 * PAGE


def reader(data: bytes) -> Callable[[int, int], bytes]:
    def read(offset: int, length: int) -> bytes:
        assert 0 <= length <= 1 << 20 and offset >= 0
        return data[offset : offset + length]

    return read


def pack(index: bytes, end: int = END, says: int | None = None) -> bytes:
    return bytes(end) + index + footer_bytes(end if says is None else says)


def refused(data: bytes, digest: str = "") -> str:
    with pytest.raises(SnapshotDamaged) as caught:
        read_index(reader(data), len(data), digest)
    return caught.value.cause


def header(count: int, zero: int = 0, magic: bytes = b"RWCHUNK1") -> bytes:
    return struct.pack("<8sII", magic, count, zero)


def entry(encoding: int = RAW, stored: int = CHUNK, size: int = CHUNK, zero: int = 0) -> bytes:
    return struct.pack("<32sIIII", b"\1" * 32, encoding, stored, size, zero)


def test_round_trip() -> None:
    index = index_bytes(RECORDS)
    data = pack(index)
    name = name_of(index)
    assert read_index(reader(data), len(data)) == read_index(reader(data), len(data), name) == RECORDS
    assert layout(RECORDS) == [(0, 0), (CHUNK, CHUNK), (CHUNK + PAGE, CHUNK + PAGE)]
    assert len(index) == 16 + 3 * 48 and data[-16:] == struct.pack("<Q8s", END, b"RWCHUNK1")


def test_the_name_is_not_the_digest_of_any_file() -> None:
    index = index_bytes(RECORDS)
    assert name_of(index) == blake3(index, derive_key_context="rewarm chunk pack v1").hexdigest()
    assert name_of(index) != blake3(index).hexdigest()


@pytest.mark.parametrize("size", [0, 1, 15, 31, 32, 4096, END, END + 16, END + 100])
def test_a_pack_that_was_cut(size: int) -> None:
    assert refused(pack(index_bytes(RECORDS))[:size])


def test_a_pack_that_grew() -> None:
    assert "footer is not there" in refused(pack(index_bytes(RECORDS)) + b"x")


def test_a_pack_that_shrinks_while_it_is_read() -> None:
    data = pack(index_bytes(RECORDS))
    with pytest.raises(SnapshotDamaged, match="became shorter"):
        read_index(lambda offset, length: data[offset : offset + length][: 100 if length > 16 else 16], len(data))
    with pytest.raises(SnapshotDamaged, match="footer"):
        read_index(lambda offset, length: b"", len(data))


def test_another_name() -> None:
    assert "it belongs to pack" in refused(pack(index_bytes(RECORDS)), "0" * 64)


@pytest.mark.parametrize(
    ("says", "cause"),
    [(END + PAGE, "cannot be"), (END - 1, "cannot be"), (1 << 63, "cannot be"), ((1 << 64) - 1, "cannot be")],
)
def test_a_footer_that_lies(says: int, cause: str) -> None:
    assert cause in refused(pack(index_bytes(RECORDS), says=says))


def test_a_footer_that_points_before_the_index() -> None:
    assert "chunks in" in refused(pack(index_bytes(RECORDS), says=END - PAGE))
    assert "cannot be" in refused(bytes(4 << 20) + index_bytes(RECORDS) + footer_bytes(0))


@pytest.mark.parametrize(
    ("index", "end", "cause"),
    [
        (header(0xFFFFFFFF) + entry(), CHUNK, "4294967295 chunks in 64 bytes"),
        (header(2) + entry(), CHUNK, "2 chunks in 64 bytes"),
        (header(0) + entry(), CHUNK, "0 chunks"),
        (header(0), 0, "0 chunks"),
        (header(1, zero=1) + entry(), CHUNK, "its index says"),
        (header(1, magic=b"RWCHUNK2") + entry(), CHUNK, "its index says"),
        (header(1) + entry()[:-1], CHUNK, "1 chunks in 63 bytes"),
        (header(1) + entry(zero=1), CHUNK, "chunk 0 of its index"),
        (header(1) + entry(encoding=2), CHUNK, "encoding 2"),
        (header(1) + entry(stored=PAGE), PAGE, "chunk 0"),
        (header(1) + entry(size=0, stored=0), 0, "chunk 0"),
        (header(1) + entry(size=PAGE - 1, stored=PAGE - 1), PAGE, "chunk 0"),
        (header(1) + entry(size=CHUNK + PAGE, stored=CHUNK + PAGE), CHUNK + PAGE, "chunk 0"),
        (header(1) + entry(encoding=ZSTD), CHUNK, "chunk 0"),
        (header(1) + entry(encoding=ZSTD, stored=0), 0, "chunk 0"),
        (header(1) + entry(encoding=ZSTD, stored=0xFFFFFFFF, size=0xFFFFF000), CHUNK, "chunk 0"),
        (header(1) + entry(), CHUNK + PAGE, "its chunks have 2097152 bytes, its index is at 2101248"),
        (header(2) + entry() + entry(), CHUNK, "its chunks have 4194304 bytes"),
        (header(33) + entry(encoding=ZSTD, stored=1) * 33, 33 * PAGE, "raw bytes, more than"),
    ],
)
def test_an_index_that_lies(index: bytes, end: int, cause: str) -> None:
    data = pack(index, end)
    assert cause in refused(data)
    assert cause in refused(data, name_of(index)), "also under its own name"


def zeros_before(footer: bytes) -> Callable[[int, int], bytes]:
    return lambda offset, length: footer if length == len(footer) else bytes(length)


def test_a_huge_file_costs_no_memory() -> None:
    """A file that is all index, or that claims to be, is not read."""
    size = 10 << 30
    tracemalloc.start()
    for start in (0, 1 << 30, size - 16 - 16 - 48 * (MAX_COUNT + 1)):
        with pytest.raises(SnapshotDamaged):
            read_index(zeros_before(footer_bytes(start)), size)
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


def test_the_largest_index_is_accepted() -> None:
    records = [Record(number.to_bytes(32, "big"), RAW, PAGE, PAGE) for number in range(MAX_COUNT)]
    index = index_bytes(records)
    data = pack(index, MAX_COUNT * PAGE)
    assert read_index(reader(data), len(data)) == records
    assert size_limits(packs.MAX_RAW)[1] == len(data)


def test_a_file_pack_in_a_chunk_packs_place_and_the_other_way_round(store: DirectoryStore, tmp_path: Path) -> None:
    ref, written = write_snapshot(store, tmp_path / "w", name="files")
    _, chunked = write_chunks(store, some(3))
    chunk_pack = store.pack_path(chunked.packs[0].digest)
    file_pack = store.pack_path(written.files[-1].pack)
    content = file_pack.read_bytes()
    file_pack.chmod(0o600)
    file_pack.write_bytes(chunk_pack.read_bytes())
    assert any(f"{ref} " in finding.object for finding in store.verify(ref))
    chunk_pack.chmod(0o600)
    chunk_pack.write_bytes(content)
    opened = store.open_chunk_pack(chunked.packs[0].digest)
    with pytest.raises(SnapshotDamaged, match="footer"):
        read_index(opened.read, opened.size, chunked.packs[0].digest)
    opened.close()


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(str(tmp_path / "store"))


@given(st.integers(0, len(index_bytes(RECORDS)) + 15), st.integers(1, 255))
def test_a_flipped_byte_of_index_or_footer_is_found_by_the_name(position: int, mask: int) -> None:
    index = index_bytes(RECORDS)
    data = bytearray(pack(index))
    data[END + position] ^= mask
    refused(bytes(data), name_of(index))
