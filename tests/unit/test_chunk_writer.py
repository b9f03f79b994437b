"""Chunks into packs: from many threads, once each over all snapshots, verified before they are shared."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rewarm.errors import SnapshotDamaged, StoreError
from rewarm.store import chunk_writer, known, writer
from rewarm.store import chunks as chunks_module
from rewarm.store.chunks import CHUNK, CHUNKS, PAGE, RAW, ZSTD
from rewarm.store.compression import Sample
from rewarm.store.directory import DirectoryStore
from rewarm.store.manifest import digest_of
from rewarm.store.packs import MAX_RAW, read_index
from support.chunked import KIB, flip, noise, pack_paths, read_chunks, some, table, text, write_chunks
from support.snapshots import MIB, manifest, pattern, tmpfs, tree, write_snapshot


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(str(tmp_path / "store"))


def test_what_is_written_is_what_the_format_says(store: DirectoryStore) -> None:
    chunks = [noise(PAGE, 1), noise(CHUNK, 2), noise(3 * PAGE, 3)]
    ref, found = write_chunks(store, chunks)
    (pack,) = found.packs
    data = store.pack_path(pack.digest).read_bytes()
    assert data.startswith(b"".join(chunks))
    assert (pack.size, pack.raw_size) == (len(data), sum(map(len, chunks)))
    records = read_index(lambda offset, length: data[offset : offset + length], len(data), pack.digest)
    assert [record.digest.hex() for record in records] == [digest_of(chunk) for chunk in chunks]
    assert [entry.digest for entry in table(store, found)] == [record.digest for record in records]
    assert read_chunks(store, found) == chunks
    assert store.load(ref) == found
    assert list(store.verify()) == []
    assert {path.stat().st_mode & 0o777 for path in pack_paths(store, found)} == {0o400}


def test_a_snapshot_without_chunks_has_neither_table_nor_packs(store: DirectoryStore, tmp_path: Path) -> None:
    _, found = write_snapshot(store, tmp_path / "w")
    assert found.packs == () and found.file(CHUNKS) is None
    with pytest.raises(SnapshotDamaged, match="is not in the snapshot"):
        store.read_file(found, CHUNKS)


def test_many_threads(store: DirectoryStore) -> None:
    chunks = some(300, 32 * KIB) + some(100, 32 * KIB) + [text(CHUNK, number) for number in range(40)]
    numbers: dict[int, int] = {}
    seen: list[int] = []
    with store.writer("default", "model", seen.append, compression="zstd") as made:
        made.expect(1)

        def add(index: int) -> None:
            numbers[made.add_chunk(memoryview(chunks[index]))] = index

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(add, range(len(chunks))))
        _, found = made.publish(manifest())
    assert sorted(numbers) == list(range(len(chunks)))
    assert [chunks[numbers[number]] for number in range(len(chunks))] == read_chunks(store, found)
    assert len({(chunk.pack, chunk.offset) for chunk in table(store, found)}) == 340
    assert sum(seen) == sum(map(len, chunks)) + 64 * len(chunks)
    assert len(found.packs) > 5
    assert list(store.verify()) == []


def test_chunks_lie_in_the_order_of_the_calls(store: DirectoryStore) -> None:
    _, found = write_chunks(store, some(50))
    places = [(chunk.pack, chunk.offset) for chunk in table(store, found)]
    assert places == sorted(places)


@pytest.mark.parametrize(
    ("total", "size"),
    [
        (None, MAX_RAW),
        (0, 8 * MIB),
        (256 * MIB, 8 * MIB),
        (300 * MIB, 10 * MIB),
        (1 << 30, 32 * MIB),
        (1 << 40, 64 * MIB),
    ],
)
def test_the_size_of_packs(store: DirectoryStore, total: int | None, size: int) -> None:
    with store.writer("default", "model", compression="off") as made:
        if total is not None:
            made.expect(total)
        for number in range(size // CHUNK + 1):
            made.add_chunk(text(CHUNK, number))
        _, found = made.publish(manifest())
    assert [pack.raw_size for pack in found.packs] == [size, CHUNK]


@pytest.mark.parametrize("size", [0, 1, PAGE - 1, PAGE + 1, CHUNK + PAGE, 2 * CHUNK])
def test_a_chunk_of_a_bad_size_is_refused_and_nothing_else(store: DirectoryStore, size: int) -> None:
    with store.writer("default", "model") as made:
        with pytest.raises(StoreError, match=f"add chunk of {size} bytes: must have a multiple of 4096 bytes"):
            made.add_chunk(bytes(size))
        assert made.add_chunk(noise(PAGE, 1)) == 0
        made.publish(manifest())
    assert list(store.verify()) == []


def test_the_writers_own_file_cannot_be_added(store: DirectoryStore, tmp_path: Path) -> None:
    with store.writer("default", "model") as made:
        with pytest.raises(StoreError, match="in the snapshot already"):
            made.add_bytes(CHUNKS, b"")
        with pytest.raises(StoreError, match="in the snapshot already"):
            made.add_file(CHUNKS, tmp_path)
        with pytest.raises(StoreError, match="is not a plain relative path"):
            made.add_bytes("../x", b"")


@pytest.mark.parametrize("size", [0, 5, MIB - 1, MIB, 3 * MIB + 1])
def test_files_from_memory(store: DirectoryStore, size: int) -> None:
    data = pattern(size)
    with store.writer("default", "model") as made:
        made.add_bytes("a/file", data)
        made.add_bytes("other", b"x")
        _, found = made.publish(manifest())
    assert store.read_file(found, "a/file") == data
    assert store.read_file(found, "other") == b"x"
    assert list(store.verify()) == []


def test_a_file_that_was_changed_is_not_read(store: DirectoryStore, tmp_path: Path) -> None:
    _, found = write_snapshot(store, tmp_path / "w")
    entry = found.file("rootfs-diff.tar")
    assert entry is not None
    path = store.pack_path(entry.pack)
    flip(path, entry.offset)
    with pytest.raises(SnapshotDamaged, match=r"'rootfs-diff.tar' of default/model: its bytes in pack .* were changed"):
        store.read_file(found, "rootfs-diff.tar")
    os.truncate(path, entry.offset + 1)
    with pytest.raises(SnapshotDamaged, match="is short"):
        store.read_file(found, "rootfs-diff.tar")
    path.unlink()
    with pytest.raises(SnapshotDamaged, match="is missing"):
        store.read_file(found, "rootfs-diff.tar")


def test_unknown_compression(store: DirectoryStore) -> None:
    with pytest.raises(StoreError, match="use one of auto, zstd, off"):
        store.writer("default", "model", compression="lz4")


# Failures


def test_a_failed_chunk_cannot_be_published(store: DirectoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    with store.writer("default", "model", compression="off") as made:
        made.add_chunk(noise(PAGE, 1))
        with monkeypatch.context() as patched:
            patched.setattr(os, "pwrite", fail)
            with pytest.raises(StoreError, match="input/output"):
                made.add_chunk(noise(PAGE, 2))
        for use in (lambda: made.add_chunk(noise(PAGE, 3)), lambda: made.publish(manifest())):
            with pytest.raises(StoreError, match="one before it could not be written"):
                use()
    assert tree(store.root) == set()


def fail(*arguments: object) -> int:
    raise OSError(5, "injected")


def test_a_sync_that_fails_is_not_published(store: DirectoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    with store.writer("default", "model", compression="off") as made:
        made.add_chunk(noise(PAGE, 1))
        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(StoreError, match=r"write .*chunks0: could not be read or written"):
            made.publish(manifest())
    monkeypatch.undo()
    assert tree(store.root) == set()


def test_a_full_store(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "mount", "size=12m") as mount:
        store = DirectoryStore(str(mount / "store"))
        ref, _ = write_chunks(store, some(4), name="kept")
        with store.writer("default", "model", compression="off") as made, ThreadPoolExecutor(4) as pool:
            results = [pool.submit(made.add_chunk, noise(CHUNK, number)) for number in range(12)]
            errors = [result.exception() for result in results]
            assert any("no space is left" in str(error) for error in errors)
            with pytest.raises(StoreError, match="could not be written"):
                made.publish(manifest())
        assert store.list() == [ref]
        assert list((store.root / "v1" / "tmp").iterdir()) == []
        assert list(store.verify()) == []
        write_chunks(store, some(4, seed=9))


def test_leaving_waits_for_the_threads_that_still_write(store: DirectoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A descriptor that is closed under them would make them write into another file."""
    inside, go_on = threading.Event(), threading.Event()
    pwrite = os.pwrite

    def slow(fd: int, data: bytes, offset: int) -> int:
        inside.set()
        assert go_on.wait(30)
        return pwrite(fd, data, offset)

    with ThreadPoolExecutor(1) as pool:
        with store.writer("default", "model", compression="off") as made:
            monkeypatch.setattr(os, "pwrite", slow)
            result = pool.submit(made.add_chunk, noise(PAGE, 1))
            assert inside.wait(30)
            with pytest.raises(StoreError, match="1 of them are still being added"):
                made.publish(manifest())
            threading.Timer(0.2, go_on.set).start()
        assert go_on.is_set()
        assert result.result() == 0
    assert tree(store.root) == set()


def test_a_writer_that_is_not_open(store: DirectoryStore) -> None:
    made = store.writer("default", "model")
    for use in (lambda: made.add_chunk(bytes(PAGE)), lambda: made.expect(5), lambda: made.add_bytes("a", b"")):
        with pytest.raises(StoreError, match="never entered"):
            use()


# Compression


def measured(monkeypatch: pytest.MonkeyPatch, rate: float) -> list[Path]:
    calls: list[Path] = []

    def read_rate(directory: Path) -> float:
        calls.append(directory)
        return rate

    monkeypatch.setattr(writer, "read_rate", read_rate)
    return calls


@pytest.mark.parametrize(("rate", "encoding"), [(50e6, ZSTD), (1e12, RAW)])
def test_auto_follows_the_storage(
    store: DirectoryStore, monkeypatch: pytest.MonkeyPatch, rate: float, encoding: int
) -> None:
    calls = measured(monkeypatch, rate)
    chunks = [text(CHUNK, number) for number in range(10)]
    _, found = write_chunks(store, chunks, compression="auto")
    assert {chunk.encoding for chunk in table(store, found)} == {encoding}
    assert len(calls) == 1, "once a capture"
    assert read_chunks(store, found) == chunks
    assert list(store.verify()) == []


def test_auto_decides_for_each_pack(store: DirectoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    measured(monkeypatch, 50e6)
    chunks = [noise(CHUNK, 0), text(CHUNK, 1), text(CHUNK, 2), text(CHUNK, 3)]
    chunks += [text(CHUNK, 4), text(CHUNK, 5), noise(CHUNK, 6), text(CHUNK, 7)]
    with store.writer("default", "model", compression="auto") as made:
        made.expect(0)
        for chunk in chunks:
            made.add_chunk(chunk)
        _, found = made.publish(manifest())
    encodings = [chunk.encoding for chunk in table(store, found)]
    assert encodings == [RAW, RAW, RAW, RAW, ZSTD, ZSTD, RAW, ZSTD], "never compressed into something larger"
    assert read_chunks(store, found) == chunks


def test_auto_with_many_threads_and_storage_that_cannot_be_measured(
    store: DirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(directory: Path) -> float:
        raise StoreError("measure", str(directory), "no")

    monkeypatch.setattr(writer, "read_rate", broken)
    with store.writer("default", "model") as made:
        made.expect(0)
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(made.add_chunk, [text(64 * KIB, number) for number in range(500)]))
        _, found = made.publish(manifest())
    assert {chunk.encoding for chunk in table(store, found)} == {RAW}


def test_threads_that_wait_for_a_decision_end_when_its_maker_fails(
    store: DirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(frame: bytes, size: int) -> float:
        raise MemoryError

    monkeypatch.setattr(chunk_writer, "_seconds_to_undo", broken)
    with store.writer("default", "model") as made, ThreadPoolExecutor(8) as pool:
        results = [pool.submit(made.add_chunk, text(64 * KIB, number)) for number in range(20)]
        assert all(isinstance(result.exception(60), (MemoryError, StoreError)) for result in results)


def test_zstd_leaves_what_does_not_shrink(store: DirectoryStore) -> None:
    _, found = write_chunks(store, [noise(CHUNK, 1), text(PAGE, 1), text(2 * PAGE, 2)], compression="zstd")
    assert [chunk.encoding for chunk in table(store, found)] == [RAW, RAW, ZSTD], "one page cannot become less"


def test_the_threads_of_a_restore_count(store: DirectoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    measured(monkeypatch, 100e6)
    seen: list[tuple[Sample, float, int]] = []

    def worth(sample: Sample, rate: float, threads: int) -> bool:
        seen.append((sample, rate, threads))
        return False

    monkeypatch.setattr(chunk_writer, "worth", worth)
    with store.writer("default", "model", threads=7) as made:
        made.add_chunk(text(CHUNK, 1))
        made.add_chunk(text(CHUNK, 2))
    assert {threads for _, _, threads in seen} == {7} and {rate for _, rate, _ in seen} == {100e6}
    assert {sample.raw for sample, _, _ in seen} == {CHUNK, 2 * CHUNK}, "each of the two, and both together"


# Sharing


def test_equal_chunks_of_all_snapshots_are_stored_once(store: DirectoryStore) -> None:
    chunks = some(20)
    _, first = write_chunks(store, chunks, name="a")
    before = tree(store.root)
    with store.writer("team", "b", compression="off") as made:
        for chunk in chunks:
            made.add_chunk(chunk)
        made.add_bytes("checkpoint/core-1.img", b"core of a")
        ref, second = made.publish(manifest("b", "team"))
    assert second.packs == first.packs
    added = tree(store.root) - before
    core = second.file("checkpoint/core-1.img")
    assert core is not None
    assert added <= {f"v1/snapshots/team/b/{ref.id}.json", f"v1/packs/{core.pack[:2]}/{core.pack}"}
    assert made.new_bytes < len(second.to_bytes()) + 64 * 20 + 100
    assert read_chunks(store, second) == chunks
    assert list(store.verify()) == []


def test_new_and_shared_chunks_of_one_snapshot(store: DirectoryStore) -> None:
    _, first = write_chunks(store, some(10), name="a", compression="zstd")
    chunks = [*some(3, seed=2), *some(5), *some(3, seed=2), text(CHUNK, 1)]
    with store.writer("default", "b", compression="zstd") as made:
        for chunk in chunks:
            made.add_chunk(chunk)
        _, second = made.publish(manifest("b"))
    assert [pack.digest for pack in second.packs][1:] == [first.packs[0].digest]
    assert read_chunks(store, second) == chunks
    assert second.packs[0].size < made.new_bytes < second.packs[0].size + 10000
    assert list(store.verify()) == []


def test_chunks_of_a_compressed_pack_are_shared(store: DirectoryStore) -> None:
    chunks = [text(CHUNK, number) for number in range(3)]
    _, first = write_chunks(store, chunks, name="a", compression="zstd")
    _, second = write_chunks(store, chunks, name="b", compression="off")
    assert second.packs == first.packs
    assert read_chunks(store, second) == chunks


def test_one_snapshot_is_removed_and_the_other_is_whole(store: DirectoryStore) -> None:
    a, _ = write_chunks(store, some(10), name="a")
    b, _ = write_chunks(store, [*some(10)[4:], *some(4, seed=2)], name="b")
    c, found = write_chunks(store, [*some(4, seed=2), *some(4, seed=3)], name="c")
    store.remove(a)
    assert list(store.verify()) == []
    store.remove(b)
    assert list(store.verify()) == []
    assert read_chunks(store, found) == [*some(4, seed=2), *some(4, seed=3)]
    store.remove(c)
    assert tree(store.root) == set()


@pytest.mark.parametrize("compression", ["off", "zstd"])
def test_capturing_again_writes_a_damaged_chunk_anew(store: DirectoryStore, compression: str) -> None:
    chunks = [text(CHUNK, 1), *some(3), text(CHUNK, 2)]
    _, first = write_chunks(store, chunks, name="a", compression=compression)
    damaged = table(store, first)[0]
    flip(pack_paths(store, first)[0], damaged.offset + damaged.stored // 2)
    b, second = write_chunks(store, chunks, name="b", compression=compression)
    assert len(second.packs) == 2
    assert read_chunks(store, second) == chunks
    assert len({chunk.pack for chunk in table(store, second)}) == 2, "the others are shared"
    findings = list(store.verify())
    assert {finding.object.split()[0].split("@")[0] for finding in findings} == {"default/a", "default/b"}
    assert "none of the snapshot's chunks" in next(f.problem for f in findings if f.object.startswith(str(b)))


@pytest.mark.parametrize("damage", ["index", "footer", "cut", "gone", "longer", "link", "empty"])
def test_a_damaged_pack_is_mended_by_capturing_again(store: DirectoryStore, tmp_path: Path, damage: str) -> None:
    chunks = some(5)
    write_chunks(store, chunks, name="a")
    _, first = write_chunks(store, chunks, name="a")
    (path,) = pack_paths(store, first)
    size = path.stat().st_size
    if damage == "index":
        flip(path, size - 40)
    elif damage == "footer":
        flip(path, size - 3)
    elif damage == "cut":
        os.truncate(path, size - 1)
    elif damage == "gone":
        path.unlink()
    elif damage == "longer":
        os.truncate(path, size + 4096)
    elif damage == "empty":
        os.truncate(path, 0)
    else:
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    assert list(store.verify()) != []
    write_chunks(store, chunks, name="b")
    assert list(store.verify()) == [], "the new pack has the same name and lies in its place"


def test_snapshots_that_cannot_be_read_are_passed_over(store: DirectoryStore, tmp_path: Path) -> None:
    chunks = some(5)
    a, _ = write_chunks(store, chunks, name="a")
    b, second = write_chunks(store, some(5, seed=2), name="b")
    path = store.root / "v1" / "snapshots" / "default" / "a" / f"{a.id}.json"
    path.chmod(0o600)
    path.write_bytes(b"{}")
    entry = second.file(CHUNKS)
    assert entry is not None
    flip(store.pack_path(entry.pack), entry.offset)
    _, third = write_chunks(store, [*chunks, *some(5, seed=2)], name="c")
    assert len(third.packs) == 1
    assert read_chunks(store, third) == [*chunks, *some(5, seed=2)]
    assert b in store.list()


def test_a_snapshot_whose_table_lies_about_a_pack(
    store: DirectoryStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its table is good by itself, but says that a pack has a chunk that it has not, and elsewhere."""
    lie = noise(64 * KIB, 77)
    real = chunks_module.encode

    def lying(chunks: object) -> bytes:
        listed = list(chunks)  # type: ignore[call-overload]
        first = listed[0]._replace(digest=bytes.fromhex(digest_of(lie)))
        return real([first, *listed[1:]])

    with monkeypatch.context() as patched:
        patched.setattr(chunk_writer, "encode", lying)
        ref, _ = write_chunks(store, some(3), name="liar")
    assert [finding.object for finding in store.verify()] == [f"{ref} {CHUNKS}"]
    _, found = write_chunks(store, [lie, *some(3)], name="honest")
    assert read_chunks(store, found) == [lie, *some(3)]
    store.remove(ref)
    assert list(store.verify()) == []


def test_a_store_whose_snapshots_cannot_be_listed(store: DirectoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: DirectoryStore, namespace: str | None = None) -> object:
        raise StoreError("list", "x", "no")

    write_chunks(store, some(3), name="a")
    with monkeypatch.context() as patched:
        patched.setattr(DirectoryStore, "list", broken)
        write_chunks(store, some(3), name="b")
    assert list(store.verify()) == []


def test_no_more_chunks_are_looked_for_than_memory_takes(
    store: DirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_chunks(store, some(3), name="a")
    write_chunks(store, some(3, seed=2), name="b")
    monkeypatch.setattr(known, "MAX_KNOWN", 2)
    _, found = write_chunks(store, some(3, seed=2), name="c")
    assert list(store.verify()) == []
    assert read_chunks(store, found) == some(3, seed=2)
