"""Device memory out of files: what is in the page cache as it is goes to the GPU without Python in between."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from rewarm.errors import GpuError, SnapshotDamaged
from rewarm.gpu import host
from rewarm.gpu.load import Load
from rewarm.gpu.pieces import WINDOW
from rewarm.store.cache import PackCache
from rewarm.store.chunks import ZSTD, Chunk
from rewarm.store.entries import ChunkPack
from rewarm.store.reader import ChunkReader
from rewarm.store.source import Source
from rewarm.trace import Trace
from rewarm_native import page_cache
from rewarm_native.cuda import CudaError
from rewarm_native.device import Lane
from support import faults, loads
from support.fake_gpu import FakeGpus
from support.loads import COUNT, DATA, GPU, pieces, right
from support.packs import PackStore, drop


@pytest.fixture
def gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpus]:
    with loads.gpus(tmp_path, monkeypatch) as found:
        yield found


def content(number: int, compressible: bool) -> bytes:
    half = WINDOW // 2
    return (bytes(half) if compressible else DATA[number][:half]) + DATA[number][half:]


class Files:
    """The chunks in packs, and what was taken straight from these."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compressed: Sequence[int] = ()) -> None:
        self.store = PackStore(tmp_path / "packs")
        self.packs: list[ChunkPack] = []
        chunks: dict[int, Chunk] = {}
        # In each pack three of DATA, those that are to be compressed in packs of their own.
        plain = [number for number in range(COUNT) if number not in compressed]
        shares = [*(plain[at : at + 3] for at in range(0, len(plain), 3)), *([number] for number in compressed)]
        for share in shares:
            compress = share[0] in compressed
            pack, its = self.store.add(len(self.packs), [content(number, compress) for number in share], compress)
            assert all((one.encoding == ZSTD) is compress for one in its)
            self.packs.append(pack)
            chunks |= dict(zip(share, its, strict=True))
        self.chunks = [chunks[number] for number in range(COUNT)]
        self.data = [content(number, number in compressed) for number in range(COUNT)]
        self.straight: list[int] = []
        """Windows of each such call."""
        self.others = 0
        upload, upload_file = Lane.upload, Lane.upload_file

        def one(lane: Lane, addresses: Sequence[int], data: memoryview, event: int, after: int | None = None) -> None:
            self.others += len(addresses)
            upload(lane, addresses, data, event, after)

        def many(lane: Lane, fd: int, runs: Sequence[tuple[int, int]], *rest: Any) -> tuple[int, int, bool]:
            done, slot, refused = upload_file(lane, fd, runs, *rest)
            self.straight.append(sum(count for _, count in runs[:done]))
            return done, slot, refused

        monkeypatch.setattr(Lane, "upload", one)
        monkeypatch.setattr(Lane, "upload_file", many)

    def path(self, number: int) -> Path:
        """Of the pack that has a chunk."""
        return self.store.pack_path(self.packs[self.chunks[number].pack].digest)

    def load(self, gpus: FakeGpus, threads: int, cache: PackCache | None = None) -> Load:
        """Started."""
        trace, stop = Trace(), threading.Event()
        reader = ChunkReader(self.store, self.packs, self.chunks, cache=cache, stop=stop, threads=threads)
        opening = host.Opening(str(gpus.libcuda), [GPU], str(gpus.directory), trace)
        opening.start()
        found = Load(reader, [chunk.digest for chunk in self.chunks], pieces(), opening, stop, trace)
        found.start()
        return found

    def loads(self, gpus: FakeGpus, threads: int, cache: PackCache | None = None) -> bool:
        """Whether what comes of it is right."""
        loaded = self.load(gpus, threads, cache)
        try:
            [places] = loaded.join().values()
            return right(pieces(), places, self.data)
        finally:
            loaded.abandon()


def reads(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each read in the usual way from now on, whether it was of cold data."""
    found: list[bool] = []
    read = Source.read

    def noted(source: Source, buffer: memoryview, size: int, offset: int, cold: bool) -> bool:
        found.append(cold)
        return read(source, buffer, size, offset, cold)

    monkeypatch.setattr(Source, "read", noted)
    return found


@pytest.mark.parametrize("threads", [1, 2, 12])
@pytest.mark.parametrize("compressed", [[], [0], [2, 7], [1, 3, 5, 11], range(COUNT)])
def test_straight_from_files(
    gpus: FakeGpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int, compressed: Sequence[int]
) -> None:
    """All that is in memory as it is, two windows at a time and more."""
    files = Files(tmp_path, monkeypatch, compressed)
    assert files.loads(gpus, threads)
    assert (sum(files.straight), files.others) == (COUNT - len(compressed), len(compressed))
    if threads == 1 and not compressed:
        assert max(files.straight) == 3


def test_what_is_not_in_memory_goes_by_buffers(gpus: FakeGpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = Files(tmp_path, monkeypatch)
    for number in (0, 5):
        drop(files.path(number))
    fd = os.open(files.path(0), os.O_RDONLY)
    assert not page_cache.is_cached(fd, 0), "the file system of the tests keeps everything in memory"
    os.close(fd)
    # Who looks beforehand would read otherwise: what is gone goes between the look and the read.
    monkeypatch.setattr(ChunkReader, "_is_warm", lambda *_: True)
    assert files.loads(gpus, 2)
    assert files.others > 0 and sum(files.straight) + files.others == COUNT


def test_what_was_missed_once_is_cold(gpus: FakeGpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking starts the read: a fast device has it there when somebody asks again."""
    files = Files(tmp_path, monkeypatch)
    for number in range(COUNT):
        drop(files.path(number))
    monkeypatch.setattr(ChunkReader, "_is_warm", lambda *_: True)
    asked = reads(monkeypatch)
    assert files.loads(gpus, 1)
    assert asked and all(asked)


def test_who_has_it_verified_gets_all_by_the_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody would look at what goes straight."""
    files = Files(tmp_path, monkeypatch)
    found: list[int] = []

    def straight(fd: int, runs: object) -> tuple[int, bool, memoryview]:
        raise AssertionError("it went past the stream that verifies")

    with ChunkReader(files.store, files.packs, files.chunks, stop=threading.Event(), threads=1) as reader:
        stream, buffer = reader.stream(straight=straight), memoryview(mmap.mmap(-1, 2 * WINDOW))
        while (item := stream.next_run(buffer)) is not None:
            found += item[0]
    assert sorted(found) == list(range(COUNT))


def test_files_that_cannot_be_asked(gpus: FakeGpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packs without a descriptor."""
    files = Files(tmp_path, monkeypatch)
    monkeypatch.setattr(Source, "descriptor", -1)
    assert files.loads(gpus, 2)
    assert (sum(files.straight), files.others) == (0, COUNT)


def test_a_file_system_that_cannot_say(gpus: FakeGpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked once for each file, which is not taken for cold for that."""
    files = Files(tmp_path, monkeypatch)
    calls: list[int] = []

    def refused(lane: Lane, fd: int, runs: object, addresses: object, size: int, buffers: object, slot: int) -> Any:
        calls.append(fd)
        return 0, slot, True

    monkeypatch.setattr(Lane, "upload_file", refused)
    colds = reads(monkeypatch)
    assert files.loads(gpus, 1)
    assert len(calls) == len(files.packs) and not colds[0] and files.others == COUNT


def test_what_is_damaged_in_a_file(gpus: FakeGpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = Files(tmp_path, monkeypatch)
    faults.flip(files.path(4), files.chunks[4].offset + 5)
    with pytest.raises(SnapshotDamaged, match="chunk 4 in pack"):
        files.loads(gpus, 2)


def test_a_file_that_is_too_short(gpus: FakeGpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It became so since it was opened: the usual way has the words for it."""
    files = Files(tmp_path, monkeypatch)
    opened = ChunkReader._open

    def cut(reader: ChunkReader, wanted: ChunkPack) -> Source:
        source = opened(reader, wanted)
        if wanted is files.packs[files.chunks[4].pack]:
            os.truncate(files.path(4), files.chunks[4].offset + 4096)
        return source

    monkeypatch.setattr(ChunkReader, "_open", cut)
    with pytest.raises(SnapshotDamaged, match=r"chunk 4 in pack .* ends at byte"):
        files.loads(gpus, 2)


def test_straight_from_the_cache(gpus: FakeGpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies there are not compressed. One that is damaged is read once more, from the store."""
    files = Files(tmp_path, monkeypatch, [1, 3])
    cache = PackCache(tmp_path / "cache", 1 << 30)
    assert files.loads(gpus, 2, cache)
    before = sum(files.straight)
    assert files.loads(gpus, 2, cache)
    assert sum(files.straight) - before == COUNT
    faults.flip(cache.path(files.packs[files.chunks[4].pack].digest), files.chunks[4].raw_offset + 5)
    assert files.loads(gpus, 2, cache)


def test_a_driver_that_fails_in_the_middle_of_a_file(
    gpus: FakeGpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = Files(tmp_path, monkeypatch)
    upload_file = Lane.upload_file

    def failing(lane: Lane, *arguments: Any) -> tuple[int, int, bool]:
        if files.straight:
            raise CudaError(700, "CUDA_ERROR_ILLEGAL_ADDRESS", "copy a file to the GPU", 0)
        return upload_file(lane, *arguments)

    monkeypatch.setattr(Lane, "upload_file", failing)
    with pytest.raises(GpuError, match=r"copy to .*ILLEGAL_ADDRESS"):
        files.loads(gpus, 1)
