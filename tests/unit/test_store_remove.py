"""Removing snapshots: shared packs stay, whatever cannot be read keeps its packs, and nothing else is deleted."""

from __future__ import annotations

import fcntl
import os
import threading
from pathlib import Path

import pytest

from rewarm.errors import SnapshotNotFound, StoreError
from rewarm.store import locks
from rewarm.store.directory import DirectoryStore
from rewarm.store.manifest import digest_of
from support.snapshots import MIB, pattern, tree, write_snapshot


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(str(tmp_path / "store"))


def test_packs_that_another_snapshot_names_stay(store: DirectoryStore, tmp_path: Path) -> None:
    shared = pattern(MIB, 1)
    first, one = write_snapshot(store, tmp_path / "1", {"a": shared, "b": pattern(MIB, 2), "c": b"only one"})
    second, two = write_snapshot(store, tmp_path / "2", {"a": shared, "b": pattern(MIB, 3)}, namespace="team")
    freed = store.remove(first)
    assert freed == MIB + len(b"only one")
    assert store.list() == [second]
    assert list(store.verify()) == []
    kept = {entry.pack for entry in two.files}
    assert {path.name for path in (store.root / "v1" / "packs").glob("*/*")} == kept
    assert {entry.pack for entry in one.files} - kept
    assert not (store.root / "v1" / "snapshots" / "default").exists()
    store.remove(second)
    assert tree(store.root) == set()


def test_a_snapshot_that_is_not_there(store: DirectoryStore, tmp_path: Path) -> None:
    ref, _ = write_snapshot(store, tmp_path / "1")
    store.remove(ref)
    with pytest.raises(SnapshotNotFound, match="is not in the store"):
        store.remove(ref)


def test_a_manifest_that_cannot_be_parsed_keeps_its_packs(store: DirectoryStore, tmp_path: Path) -> None:
    """It may be of a newer version of rewarm that shares the store."""
    ref, _ = write_snapshot(store, tmp_path / "1")
    pack = pattern(100)
    other = digest_of(pack)
    store.pack_path(other).parent.mkdir(exist_ok=True)
    store.pack_path(other).write_bytes(pack)
    newer = f'{{"version":2,"chunks":["{other}"]'.encode()
    directory = store.root / "v1" / "snapshots" / "default" / "newer"
    directory.mkdir()
    (directory / f"{digest_of(newer)}.json").write_bytes(newer)
    store.remove(ref)
    assert [path.name for path in (store.root / "v1" / "packs").glob("*/*")] == [other]


def test_a_manifest_that_was_renamed_keeps_its_packs(store: DirectoryStore, tmp_path: Path) -> None:
    kept, _ = write_snapshot(store, tmp_path / "1", {"a": b"kept"}, name="kept")
    ref, _ = write_snapshot(store, tmp_path / "2", {"a": b"gone"})
    directory = store.root / "v1" / "snapshots" / "default"
    (directory / "kept").rename(directory / ".backup")
    store.remove(ref)
    (directory / ".backup").rename(directory / "kept")
    assert store.list() == [kept]
    assert list(store.verify()) == []


def test_a_store_that_was_copied_without_its_locks(store: DirectoryStore, tmp_path: Path) -> None:
    ref, _ = write_snapshot(store, tmp_path / "1")
    (store.root / "v1" / "locks").rename(tmp_path / "locks")
    store.remove(ref)
    assert tree(store.root) == set()


def test_strange_entries_among_the_packs_stay(store: DirectoryStore, tmp_path: Path) -> None:
    ref, _ = write_snapshot(store, tmp_path / "1")
    packs = store.root / "v1" / "packs"
    outside = tmp_path / "outside"
    outside.mkdir()
    victim = outside / ("ee" + "0" * 62)
    victim.write_text("precious")
    if not (packs / "ee").exists():
        (packs / "ee").symlink_to(outside)
    (packs / "notes").write_text("")
    (packs / "dd").mkdir(exist_ok=True)
    (packs / "dd" / ("dd" + "0" * 62)).mkdir()
    (packs / "dd" / "README").write_text("")
    store.remove(ref)
    assert victim.read_text() == "precious"
    assert (packs / "notes").exists()
    assert (packs / "dd" / "README").exists()
    write_snapshot(store, tmp_path / "2", {"a": b"works still"}, name="other")


def test_a_manifest_that_is_a_pipe_or_link_is_removed_and_does_not_hang(store: DirectoryStore, tmp_path: Path) -> None:
    ref, written = write_snapshot(store, tmp_path / "1")
    path = store.root / "v1" / "snapshots" / "default" / "model" / f"{ref.id}.json"
    path.unlink()
    os.mkfifo(path)
    other, _ = write_snapshot(store, tmp_path / "2", {"a": b"x"}, name="other")
    store.remove(other)
    assert store.list() == [ref]
    store.remove(ref)
    assert tree(store.root) == set()
    assert written.files


def test_a_removal_waits_for_a_publish_but_not_forever(
    store: DirectoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref, _ = write_snapshot(store, tmp_path / "1")
    fd = os.open(store.root / "v1" / "locks" / "store", os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_SH)
    timer = threading.Timer(0.3, os.close, [fd])
    timer.start()
    store.remove(ref)
    timer.join()
    ref, _ = write_snapshot(store, tmp_path / "2")
    monkeypatch.setattr(locks.wait_lock, "__kwdefaults__", {"shared": False, "patience": 0.1})
    with (store.root / "v1" / "locks" / "store").open("r+") as held:
        fcntl.flock(held, fcntl.LOCK_SH)
        with pytest.raises(StoreError, match="another capture or removal has held it"):
            store.remove(ref)
    assert store.list() == [ref]
    assert list(store.verify()) == []
