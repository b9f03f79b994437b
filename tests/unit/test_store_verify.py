"""Verifying a store: every byte is read, and each finding names the snapshot, the file and the pack."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rewarm.errors import SnapshotNotFound
from rewarm.store.directory import DirectoryStore, SnapshotRef
from rewarm.store.manifest import FileEntry, digest_of
from support.snapshots import FILES, manifest, pattern, write_snapshot


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(str(tmp_path / "store"))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (flip, "was changed"),
        (shorten, "bytes"),
        (lengthen, "bytes"),
        (Path.unlink, "is missing"),
    ],
)
@pytest.mark.parametrize("file", ["checkpoint/pages-1.img", "rootfs-diff.tar"])
def test_a_damaged_pack_is_found(
    store: DirectoryStore, tmp_path: Path, damage: Callable[[Path], None], problem: str, file: str
) -> None:
    ref, written = write_snapshot(store, tmp_path / "1")
    entry = written.file(file)
    assert entry is not None
    damage(store.pack_path(entry.pack))
    findings = list(store.verify())
    assert {finding.object for finding in findings} == {
        f"{ref} {other.name}" for other in written.files if other.pack == entry.pack
    }
    assert all(problem in finding.problem and entry.pack in finding.problem for finding in findings)
    assert list(store.verify(ref)) == findings


def test_swapped_packs_are_found(store: DirectoryStore, tmp_path: Path) -> None:
    contents = {"a": pattern(1 << 20, 1), "b": pattern(1 << 20, 2)}
    ref, written = write_snapshot(store, tmp_path / "1", contents)
    first, second = (store.pack_path(entry.pack) for entry in written.files)
    first.rename(tmp_path / "x")
    second.rename(first)
    (tmp_path / "x").rename(second)
    assert [finding.object for finding in store.verify()] == [f"{ref} a", f"{ref} b"]


def plant(store: DirectoryStore, files: tuple[FileEntry, ...]) -> SnapshotRef:
    data = manifest(name="evil")._replace(files=files).to_bytes()
    ref = SnapshotRef("default", "evil", digest_of(data))
    directory = store.root / "v1" / "snapshots" / "default" / "evil"
    directory.mkdir()
    (directory / f"{ref.id}.json").write_bytes(data)
    return ref


def test_a_manifest_that_lies_about_a_good_pack_is_found(store: DirectoryStore, tmp_path: Path) -> None:
    _, written = write_snapshot(store, tmp_path / "1")
    pages = written.file("checkpoint/pages-1.img")
    core = written.file("checkpoint/core-1.img")
    assert pages is not None
    assert core is not None
    pack_size = sum(entry.size for entry in written.files if not entry.whole_pack)
    wrong_digest = FileEntry(name="part", size=pack_size, digest=pages.digest, pack=core.pack, offset=0)
    wrong_size = FileEntry(name="pages", size=pages.size + 1, digest=pages.digest, pack=pages.pack, offset=0)
    beyond = FileEntry(name="gone", size=0, digest=digest_of(b""), pack=pages.pack, offset=pages.size + 2)
    ref = plant(store, (wrong_digest, wrong_size))
    findings = {finding.object: finding.problem for finding in store.verify()}
    assert set(findings) == {f"{ref} part", f"{ref} pages"}
    assert "do not have its digest" in findings[f"{ref} part"]
    assert f"has {pages.size} bytes, the manifest says {pages.size + 1}" in findings[f"{ref} pages"]
    store.remove(ref)
    ref = plant(store, (beyond,))
    assert [finding.object for finding in store.verify()] == [f"{ref} gone"]


def test_a_shared_pack_is_read_once(store: DirectoryStore, tmp_path: Path) -> None:
    write_snapshot(store, tmp_path / "1")
    write_snapshot(store, tmp_path / "2", namespace="team")
    seen: list[int] = []
    assert list(store.verify(progress=seen.append)) == []
    assert sum(seen) == sum(map(len, FILES.values()))


def test_one_snapshot_that_is_not_there(store: DirectoryStore, tmp_path: Path) -> None:
    ref, _ = write_snapshot(store, tmp_path / "1")
    with pytest.raises(SnapshotNotFound):
        list(store.verify(ref._replace(id="0" * 64)))


def test_a_snapshot_removed_meanwhile_is_no_finding(store: DirectoryStore, tmp_path: Path) -> None:
    first, _ = write_snapshot(store, tmp_path / "1", {"a": b"1"}, name="a")
    second, _ = write_snapshot(store, tmp_path / "2", {"a": pattern(1 << 20), "b": pattern(1 << 20, 2)}, name="b")
    third, written = write_snapshot(store, tmp_path / "3", {"a": pattern(2 << 20, 8)}, name="c")

    def remove_while_it_reads(count: int) -> None:
        if count > 1 and third in store.list():  # in the first of the second snapshot's two packs
            store.remove(second)
            store.remove(third)

    assert list(store.verify(progress=remove_while_it_reads)) == []
    assert store.list() == [first]
    assert written.files
