"""Reading chunks over many streams: each once and verified, and every kind of damage named."""

from __future__ import annotations

import mmap
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import pytest
import zstandard

from rewarm.errors import RewarmError, SnapshotDamaged, StoreError
from rewarm.store.chunks import CHUNK, RAW, ZSTD, Chunk
from rewarm.store.entries import ChunkPack
from rewarm.store.parts import PART, STORE, divide
from rewarm.store.reader import ChunkReader, Stream
from support.packs import PackStore, Snapshot, read_all

MIB = 1 << 20


def make(root: Path, packs: int = 3, compress: bool = False, seed: int = 1) -> Snapshot:
    return Snapshot.make(root, packs, compress=compress, seed=seed)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("compress", [False, True])
def test_every_chunk_comes_out_once(tmp_path: Path, threads: int, compress: bool) -> None:
    snapshot = make(tmp_path, compress=compress)
    assert any(chunk.encoding == ZSTD for chunk in snapshot.chunks) is compress
    reader = read_all(snapshot, threads)
    assert reader.counters.store_bytes == sum(chunk.stored for chunk in snapshot.chunks)
    assert reader.counters.cache_bytes == 0


def test_no_file_stays_open(tmp_path: Path) -> None:
    snapshot = make(tmp_path, packs=20)
    before = len(os.listdir("/proc/self/fd"))
    reader = ChunkReader(snapshot.store, snapshot.packs, snapshot.chunks, stop=threading.Event(), threads=1)
    stream = reader.stream()
    buffer = memoryview(mmap.mmap(-1, CHUNK))
    most = 0
    while stream.next(buffer) is not None:
        most = max(most, len(os.listdir("/proc/self/fd")) - before)
    assert most <= 8
    assert len(os.listdir("/proc/self/fd")) <= before + 1
    reader.close()


def test_equal_chunks_of_a_table(tmp_path: Path) -> None:
    snapshot = make(tmp_path)
    again = snapshot._replace(chunks=[*snapshot.chunks, *snapshot.chunks[:5]], data=snapshot.data + snapshot.data[:5])
    read_all(again, 2)


def test_a_table_without_chunks(tmp_path: Path) -> None:
    reader = ChunkReader(PackStore(tmp_path), [], [], stop=threading.Event(), threads=2)
    assert reader.parallel == 2
    assert reader.stream().next(memoryview(bytearray(CHUNK))) is None


def test_cold_data_is_read_with_more_streams(tmp_path: Path) -> None:
    snapshot = make(tmp_path)
    with ChunkReader(snapshot.store, snapshot.packs, snapshot.chunks, stop=threading.Event(), threads=2) as reader:
        assert reader.parallel == 2
    snapshot.drop()
    with ChunkReader(snapshot.store, snapshot.packs, snapshot.chunks, stop=threading.Event(), threads=2) as reader:
        assert reader.parallel == 8
    read_all(snapshot, 8)


@pytest.mark.parametrize("compress", [False, True])
def test_cold_data_by_both_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compress: bool) -> None:
    monkeypatch.setattr("rewarm.store.probe.TRIAL", 2 * MIB)
    snapshot = make(tmp_path, packs=5, compress=compress)
    snapshot.drop()
    reader = read_all(snapshot, 3)
    assert reader._ways[0].settled


def test_a_pack_without_a_descriptor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Remote:
        """A pack of an object store: it can only be asked for bytes, and gives a few at a time."""

        def __init__(self, path: Path) -> None:
            self.data = path.read_bytes()
            self.size = len(self.data)

        def read_into(self, view: memoryview, offset: int) -> int:
            piece = self.data[offset : offset + min(len(view), 100_000)]
            view[: len(piece)] = piece
            return len(piece)

        def close(self) -> None:
            pass

    snapshot = make(tmp_path, compress=True)
    monkeypatch.setattr("support.packs.FilePack", Remote)
    assert read_all(snapshot, 2).parallel == 8


def full(tmp_path: Path, count: int = 6, compress: bool = False) -> Snapshot:
    """One pack of whole chunks."""
    store, source = PackStore(tmp_path), random.Random(3)
    data = [source.randbytes(CHUNK // 2) + bytes(CHUNK // 2) for _ in range(count)]
    pack, chunks = store.add(0, data, compress)
    return Snapshot(store, [pack], chunks, data)


def runs(reader: ChunkReader, stream: Stream, windows: int) -> Iterator[list[int]]:
    """The numbers of what comes at once; what it is was compared."""
    buffer = memoryview(mmap.mmap(-1, windows * CHUNK))
    while (item := stream.next_run(buffer)) is not None:
        yield list(item[0])


@pytest.mark.parametrize("verify", [True, False])
def test_chunks_that_lie_together_come_at_once(tmp_path: Path, verify: bool) -> None:
    snapshot = full(tmp_path)
    with ChunkReader(snapshot.store, snapshot.packs, snapshot.chunks, stop=threading.Event(), threads=1) as reader:
        stream, buffer = reader.stream(verify=verify), memoryview(mmap.mmap(-1, 3 * CHUNK))
        found = []
        while (item := stream.next_run(buffer)) is not None:
            numbers, view = item
            assert view == b"".join(snapshot.data[number] for number in numbers)
            found.append(list(numbers))
    assert list(chain.from_iterable(found)) == list(range(6))
    assert max(len(one) for one in found) == 3  # parts are of half the snapshot for one stream


def test_what_is_not_together_comes_alone(tmp_path: Path) -> None:
    """Compressed chunks, and shorter ones: they are not where the next one would be."""
    snapshot = full(tmp_path, compress=True)
    with ChunkReader(snapshot.store, snapshot.packs, snapshot.chunks, stop=threading.Event(), threads=1) as reader:
        assert list(runs(reader, reader.stream(), 3)) == [[number] for number in range(6)]
    mixed = make(tmp_path / "mixed", packs=1)
    with ChunkReader(mixed.store, mixed.packs, mixed.chunks, stop=threading.Event(), threads=1) as reader:
        stream, buffer = reader.stream(), memoryview(mmap.mmap(-1, 4 * CHUNK))
        while (item := stream.next_run(buffer)) is not None:
            assert item[1] == b"".join(mixed.data[number] for number in item[0])
            assert all(mixed.chunks[number].size == CHUNK for number in item[0][:-1])


def test_one_of_several_is_damaged(tmp_path: Path) -> None:
    """The error names it, not the first that was read with it."""
    snapshot = full(tmp_path)
    flip(snapshot.store.pack_path(snapshot.packs[0].digest), snapshot.chunks[1])
    reader = ChunkReader(snapshot.store, snapshot.packs, snapshot.chunks, stop=threading.Event(), threads=1)
    with reader, pytest.raises(SnapshotDamaged, match="chunk 1 in pack"):
        list(runs(reader, reader.stream(), 3))


def test_unverified_and_again(tmp_path: Path) -> None:
    """Without `verify` a damaged chunk comes as it is; read again it is an error, and what is right comes."""
    snapshot = full(tmp_path)
    path = snapshot.store.pack_path(snapshot.packs[0].digest)
    flip(path, snapshot.chunks[4])
    with ChunkReader(snapshot.store, snapshot.packs, snapshot.chunks, stop=threading.Event(), threads=1) as reader:
        assert list(chain.from_iterable(runs(reader, reader.stream(verify=False), 3))) == list(range(6))
        assert list(chain.from_iterable(runs(reader, reader.again([2, 5]), 3))) == [2, 5]
        with pytest.raises(SnapshotDamaged, match="chunk 4 in pack"):
            list(runs(reader, reader.again([3, 4]), 3))
        flip(path, snapshot.chunks[4])
        assert list(chain.from_iterable(runs(reader, reader.again([4]), 3))) == [4]


def test_a_read_of_several_fails(tmp_path: Path) -> None:
    """The error names the first that cannot be read."""
    snapshot = full(tmp_path)
    truncate(snapshot.store.pack_path(snapshot.packs[0].digest), snapshot.chunks[1])
    packs = [snapshot.packs[0]._replace(size=snapshot.chunks[1].offset + 1)]
    reader = ChunkReader(snapshot.store, packs, snapshot.chunks, stop=threading.Event(), threads=1)
    with reader, pytest.raises(SnapshotDamaged, match="chunk 1 in pack"):
        list(runs(reader, reader.stream(verify=False), 3))


def test_a_larger_buffer_for_one(tmp_path: Path) -> None:
    snapshot = full(tmp_path)
    with ChunkReader(snapshot.store, snapshot.packs, snapshot.chunks, stop=threading.Event(), threads=1) as reader:
        stream, buffer = reader.stream(), memoryview(mmap.mmap(-1, 3 * CHUNK))
        found = []
        while (item := stream.next(buffer)) is not None:
            assert item[1] == snapshot.data[item[0]]
            found.append(item[0])
    assert found == list(range(6))


@pytest.mark.parametrize("compress", [True, False])
def test_whether_there_is_more_to_do_than_reading(tmp_path: Path, compress: bool) -> None:
    snapshot = full(tmp_path, compress=compress)
    with ChunkReader(snapshot.store, snapshot.packs, snapshot.chunks, stop=threading.Event(), threads=1) as reader:
        assert reader.plain is not compress


@pytest.mark.parametrize("compressed", [0, 2, 3, 16])
def test_a_few_that_are_compressed_do_not_count(tmp_path: Path, compressed: int) -> None:
    snapshot = full(tmp_path, compress=False)
    chunks = [
        snapshot.chunks[0]._replace(encoding=ZSTD if number < compressed else RAW, stored=4096) for number in range(16)
    ]
    with ChunkReader(snapshot.store, snapshot.packs, chunks, stop=threading.Event(), threads=1) as reader:
        assert reader.plain is (compressed <= 2)


def test_stop_ends_a_stream(tmp_path: Path) -> None:
    snapshot = make(tmp_path)
    stop = threading.Event()
    with ChunkReader(snapshot.store, snapshot.packs, snapshot.chunks, stop=stop, threads=1) as reader:
        stream, buffer = reader.stream(), memoryview(mmap.mmap(-1, CHUNK))
        assert stream.next(buffer) is not None
        stop.set()
        assert stream.next(buffer) is None
        assert reader.stream().next(buffer) is None


def flip(path: Path, chunk: Chunk) -> None:
    with path.open("r+b") as file:
        file.seek(chunk.offset + chunk.stored // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def truncate(path: Path, chunk: Chunk) -> None:
    os.truncate(path, chunk.offset + 1)


def grow(path: Path, chunk: Chunk) -> None:
    with path.open("ab") as file:
        file.write(bytes(100))


def zeros(path: Path, chunk: Chunk) -> None:
    path.unlink()
    path.touch()
    os.truncate(path, 10 << 30)


def zeros_of_that_size(path: Path, chunk: Chunk) -> None:
    size = path.stat().st_size
    os.truncate(path, 0)
    os.truncate(path, size)


def missing(path: Path, chunk: Chunk) -> None:
    path.unlink()


DAMAGE = [flip, truncate, grow, zeros, zeros_of_that_size, missing]


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("compress", [False, True])
def test_damage_is_found_and_named(tmp_path: Path, damage: Callable[[Path, Chunk], None], compress: bool) -> None:
    snapshot = make(tmp_path, compress=compress)
    number = len(snapshot.chunks) // 2
    digest = snapshot.packs[snapshot.chunks[number].pack].digest
    damage(snapshot.store.pack_path(digest), snapshot.chunks[number])
    with pytest.raises(SnapshotDamaged, match=digest) as caught:
        read_all(snapshot, 2)
    if damage is flip:
        assert f"chunk {number} " in str(caught.value)


def test_packs_that_were_swapped(tmp_path: Path) -> None:
    snapshot = make(tmp_path)
    one, two = (snapshot.store.pack_path(pack.digest) for pack in snapshot.packs[:2])
    content = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(content)
    with pytest.raises(SnapshotDamaged):
        read_all(snapshot, 2)


@pytest.mark.parametrize("damage", DAMAGE[1:])
def test_damage_while_it_is_read(tmp_path: Path, damage: Callable[[Path, Chunk], None]) -> None:
    """The pack is open already: what was read is right, and what is not is found."""
    snapshot = make(tmp_path, packs=1)
    path = snapshot.store.pack_path(snapshot.packs[0].digest)
    with ChunkReader(snapshot.store, snapshot.packs, snapshot.chunks, stop=threading.Event(), threads=1) as reader:
        stream, buffer = reader.stream(), memoryview(mmap.mmap(-1, CHUNK))
        seen = 0
        try:
            while (item := stream.next(buffer)) is not None:
                assert item[1] == snapshot.data[item[0]]
                seen += 1
                if seen == 2:
                    damage(path, snapshot.chunks[3])
        except SnapshotDamaged as error:
            assert seen < len(snapshot.chunks)
            assert snapshot.packs[0].digest in str(error)
        else:  # a file that has no name any more can still be read, and one that grew is as good as before
            assert seen == len(snapshot.chunks)
            assert damage in (grow, zeros, missing)
    assert stream.next(buffer) is None


def test_an_input_output_error_names_chunk_and_pack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = make(tmp_path)

    def fails(fd: int, buffers: Sequence[memoryview], offset: int, flags: int = 0) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("rewarm.store.source.os.preadv", fails)
    with pytest.raises(StoreError, match=r"chunk \d+ in pack [0-9a-f]{64}.*input/output error"):
        read_all(snapshot, 2)


@pytest.mark.parametrize(
    "stored, cause",
    [
        (zstandard.ZstdCompressor().compress(bytes(MIB + 4096)), "more than"),
        (zstandard.ZstdCompressor().compress(bytes(1 << 30)), "more than"),
        (zstandard.ZstdCompressor().compress(bytes(MIB - 4096)), "not 1048576"),
        (zstandard.ZstdCompressor().compress(bytes(MIB))[:-3], "zstd frame"),
        (b"\x28\xb5\x2f\xfd\x00\xf8" + bytes(100), "zstd frame"),
        (b"\x28\xb5\x2f\xfd\xff" + b"\xff" * 100, "zstd frame"),
        (random.Random(1).randbytes(1000), "zstd frame"),
        (zstandard.ZstdCompressor().compress(b"x" * MIB), "digest"),
    ],
)
def test_hostile_frames(tmp_path: Path, stored: bytes, cause: str) -> None:
    store = PackStore(tmp_path)
    pack, (chunk,) = store.add(0, [bytes(MIB)], compress=True)
    whole = bytearray(store.pack_path(pack.digest).read_bytes())
    whole[: max(len(stored), 4096)] = stored + bytes(max(0, 4096 - len(stored)))
    store.pack_path(pack.digest).write_bytes(whole)
    changed = ChunkPack(pack.digest, len(whole), pack.raw_size)
    snapshot = Snapshot(store, [changed], [chunk._replace(stored=len(stored))], [bytes(MIB)])
    with pytest.raises(SnapshotDamaged, match=cause):
        read_all(snapshot, 1)


def test_a_store_that_hangs_holds_only_its_reader(tmp_path: Path) -> None:
    """A FUSE store whose server stands still: `next` waits, and goes on when it does."""
    snapshot = make(tmp_path / "store")
    mount = tmp_path / "mount"
    mount.mkdir()
    server = subprocess.Popen(["bindfs", "-f", tmp_path / "store", mount])
    try:
        deadline = time.monotonic() + 10
        while not os.path.ismount(mount):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        shared = snapshot._replace(store=PackStore(mount))
        with ChunkReader(shared.store, shared.packs, shared.chunks, stop=threading.Event(), threads=1) as reader:
            assert reader.parallel == 8
            stream, buffer = reader.stream(), memoryview(mmap.mmap(-1, CHUNK))
            assert stream.next(buffer) is not None
            server.send_signal(signal.SIGSTOP)
            got: list[int] = []

            def rest() -> None:
                while (item := stream.next(buffer)) is not None:
                    assert item[1] == snapshot.data[item[0]]
                    got.append(item[0])

            thread = threading.Thread(target=rest)
            thread.start()
            thread.join(0.5)
            assert thread.is_alive()
            server.send_signal(signal.SIGCONT)
            thread.join(20)
            assert len(got) == len(snapshot.chunks) - 1
    finally:
        server.send_signal(signal.SIGCONT)
        subprocess.run(["umount", "-l", mount], check=False)
        server.terminate()
        server.wait(10)


def test_parts_follow_the_packs(tmp_path: Path) -> None:
    chunks = [
        Chunk(b"", pack, 0, place * CHUNK, CHUNK, CHUNK, place * CHUNK) for pack in range(4) for place in range(32)
    ]
    order = list(range(len(chunks)))
    random.Random(3).shuffle(order)
    parts = divide(chunks, order, 2, STORE)
    assert [number for part in parts for number in part.numbers] == list(range(len(chunks)))
    assert all(part.end - part.start <= PART for part in parts)
    assert all({chunks[number].pack for number in part.numbers} == {part.pack} for part in parts)
    assert len(divide(chunks[:32], range(32), 16, STORE)) == 32
    apart = [chunks[0], chunks[20]]
    assert len(divide(apart, range(2), 1, STORE)) == 2


def test_errors_reach_the_caller_once(tmp_path: Path) -> None:
    snapshot = make(tmp_path)
    for pack in snapshot.packs:
        snapshot.store.pack_path(pack.digest).unlink()
    with ChunkReader(snapshot.store, snapshot.packs, snapshot.chunks, stop=threading.Event(), threads=1) as reader:
        stream, buffer = reader.stream(), memoryview(mmap.mmap(-1, CHUNK))
        with pytest.raises(RewarmError):
            stream.next(buffer)
        assert stream.next(buffer) is None
