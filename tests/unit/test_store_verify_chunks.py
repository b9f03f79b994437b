"""Verifying packs of chunks: every byte counts, and the finding says which snapshots are hit."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rewarm.store import chunk_writer, chunks, entries
from rewarm.store.chunks import CHUNKS, PAGE, Chunk
from rewarm.store.directory import DirectoryStore
from rewarm.store.manifest import Manifest
from support.chunked import KIB, flip, noise, pack_paths, some, table, text, write_chunks


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(str(tmp_path / "store"))


def problems(store: DirectoryStore) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for finding in store.verify():
        found.setdefault(finding.object, []).append(finding.problem)
    return found


def test_a_damaged_chunk_is_named_with_the_snapshots_it_hits(store: DirectoryStore) -> None:
    a, first = write_chunks(store, some(6), name="a")
    b, _ = write_chunks(store, [noise(PAGE, 1), *some(6)[3:]], name="b")
    c, _ = write_chunks(store, some(6, seed=2), name="c")
    hit = table(store, first)[4]
    flip(pack_paths(store, first)[0], hit.offset + 5)
    found = problems(store)
    assert set(found) == {f"{a} {CHUNKS}", f"{b} {CHUNKS}"}
    digest = first.packs[0].digest
    message = f"pack {digest} was changed: its chunk 4 does not have its digest; it hits chunks"
    assert found[f"{a} {CHUNKS}"] == [f"{message} 4 of the snapshot"]
    assert found[f"{b} {CHUNKS}"] == [f"{message} 2 of the snapshot"]
    assert list(store.verify(c)) == []


def make_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("compression", ["off", "zstd"])
def test_every_byte_counts(store: DirectoryStore, compression: str) -> None:
    _, found = write_chunks(store, [text(8 * KIB, 1), noise(PAGE, 2), text(12 * KIB, 3)], compression=compression)
    (path,) = pack_paths(store, found)
    size = path.stat().st_size
    for offset in [*range(0, size, 97), *range(size - 200, size)]:
        flip(path, offset)
        assert list(store.verify()), offset
        flip(path, offset)
    assert list(store.verify()) == []


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda path, size: os.truncate(path, size - 1), "footer is not there"),
        (lambda path, size: os.truncate(path, PAGE), "footer is not there"),
        (lambda path, size: os.truncate(path, 0), "too few for a chunk pack"),
        (lambda path, size: os.truncate(path, size + 1), "footer is not there"),
        (lambda path, size: os.truncate(path, 10 << 30), "footer is not there"),
        (lambda path, size: path.unlink(), "is missing"),
        (lambda path, size: flip(path, size - 60), "its index was changed"),
        (lambda path, size: make_pipe(path), "is not a regular file"),
    ],
)
def test_a_damaged_pack(store: DirectoryStore, change: object, problem: str) -> None:
    ref, found = write_chunks(store, some(3))
    (path,) = pack_paths(store, found)
    path.chmod(0o600)
    change(path, path.stat().st_size)  # type: ignore[operator]
    (finding,) = store.verify()
    assert finding.object == f"{ref} {CHUNKS}"
    assert problem in finding.problem and found.packs[0].digest in finding.problem


def test_swapped_packs(store: DirectoryStore) -> None:
    _, first = write_chunks(store, some(3), name="a")
    _, second = write_chunks(store, some(3, seed=2), name="b")
    (one,), (two,) = pack_paths(store, first), pack_paths(store, second)
    data = one.read_bytes()
    for path, content in ((one, two.read_bytes()), (two, data)):
        path.chmod(0o600)
        path.write_bytes(content)
    assert [problem.partition(": ")[2][:42] for texts in problems(store).values() for problem in texts] == [
        "its index was changed: it belongs to pack "
    ] * 2


def test_data_of_one_pack_in_another_of_equal_layout(store: DirectoryStore) -> None:
    a, first = write_chunks(store, some(3), name="a")
    _, second = write_chunks(store, some(3, seed=2), name="b")
    (one,), (two,) = pack_paths(store, first), pack_paths(store, second)
    one.chmod(0o600)
    one.write_bytes(two.read_bytes()[: 3 * 64 * KIB] + one.read_bytes()[3 * 64 * KIB :])
    (texts,) = problems(store).values()
    assert "its chunk 0 does not have its digest; its chunk 1" in texts[0]
    assert "it hits chunks 0, 1, 2 of the snapshot" in texts[0]
    assert {name.split()[0] for name in problems(store)} == {str(a)}


def test_a_frame_that_is_no_frame(store: DirectoryStore) -> None:
    _, found = write_chunks(store, [text(8 * KIB, 1)], compression="zstd")
    flip(pack_paths(store, found)[0], 0)
    (finding,) = store.verify()
    assert "its chunk 0 cannot be decompressed" in finding.problem


def test_a_damaged_table_is_found_once(store: DirectoryStore) -> None:
    ref, found = write_chunks(store, some(3))
    entry = found.file(CHUNKS)
    assert entry is not None
    flip(store.pack_path(entry.pack), entry.offset)
    assert {name: len(texts) for name, texts in problems(store).items()} == {
        f"{ref} {CHUNKS}": 1,
        f"{ref} checkpoint/core-1.img": 1,
    }


def test_a_pack_of_files_that_grew_is_found_and_the_chunks_are_read_all_the_same(store: DirectoryStore) -> None:
    ref, found = write_chunks(store, some(3))
    entry = found.file(CHUNKS)
    assert entry is not None
    path = store.pack_path(entry.pack)
    path.chmod(0o600)
    path.write_bytes(path.read_bytes() + b"x")
    assert {name: len(texts) for name, texts in problems(store).items()} == {
        f"{ref} {CHUNKS}": 1,
        f"{ref} checkpoint/core-1.img": 1,
    }
    flip(pack_paths(store, found)[0], 5)
    assert len(problems(store)[f"{ref} {CHUNKS}"]) == 2


@pytest.mark.parametrize(
    "lie",
    [
        {"digest": b"\7" * 32},
        {"offset": 2 * 64 * KIB + PAGE},
        {"size": PAGE, "stored": PAGE},
        {"raw_offset": 2 * 64 * KIB + PAGE, "size": PAGE, "stored": PAGE},
        {"encoding": 1, "stored": PAGE},
    ],
)
def test_a_table_that_does_not_match_the_index(
    store: DirectoryStore, monkeypatch: pytest.MonkeyPatch, lie: dict[str, object]
) -> None:
    real = chunks.encode

    def lying(listed: list[Chunk]) -> bytes:
        return real([*listed[:2], listed[2]._replace(**lie)])  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(chunk_writer, "encode", lying)
        ref, found = write_chunks(store, some(3))
    (finding,) = store.verify()
    assert finding.object == f"{ref} {CHUNKS}"
    cause = f"chunks 2 are not where the index of pack {found.packs[0].digest} says"
    assert finding.problem == cause or "past" in finding.problem


def test_a_manifest_that_lies_about_a_pack(store: DirectoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    real = entries.ChunkPack

    def lying(digest: str, size: int, raw_size: int) -> object:
        return real(digest, size + 1, raw_size + PAGE)

    with monkeypatch.context() as patched:
        patched.setattr(chunk_writer, "ChunkPack", lying)
        _, found = write_chunks(store, some(3))
    (texts,) = problems(store).values()
    size = pack_paths(store, found)[0].stat().st_size
    assert f"has {size} bytes, the manifest says {size + 1}" in texts[0]
    assert "raw bytes, the manifest says" in texts[1]


def test_a_shared_pack_is_read_once_and_all_is_counted(store: DirectoryStore) -> None:
    written: list[Manifest] = []
    for name in ("a", "b"):
        written.append(write_chunks(store, some(4), name=name, compression="zstd")[1])
    seen: list[int] = []
    assert list(store.verify(progress=seen.append)) == []
    sizes = {entry.pack: 0 for found in written for entry in found.files}
    for found in written:
        for entry in found.files:
            sizes[entry.pack] = max(sizes[entry.pack], entry.offset + entry.size)
        sizes.update((pack.digest, pack.size) for pack in found.packs)
    assert sum(seen) == sum(sizes.values())
