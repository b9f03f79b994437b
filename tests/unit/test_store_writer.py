"""Writing snapshots: all or nothing, whatever fails or dies in between."""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path

import pytest

from rewarm.errors import StoreError
from rewarm.store import writer as writer_module
from rewarm.store.directory import DirectoryStore, SnapshotRef
from rewarm.store.manifest import digest_of
from rewarm.store.workspace import sync_directory
from support.snapshots import FILES, MIB, manifest, pattern, tmpfs, tree, write_snapshot


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(str(tmp_path / "store"))


@pytest.fixture
def work(tmp_path: Path) -> Path:
    path = tmp_path / "work"
    path.mkdir()
    (path / "big").write_bytes(pattern(2 * MIB, 7))
    (path / "small").write_bytes(b"small")
    return path


def test_what_is_written_is_where_the_format_says(store: DirectoryStore, tmp_path: Path) -> None:
    ref, written = write_snapshot(store, tmp_path / "1")
    small = {entry.pack for entry in written.files if entry.size < MIB}
    large = [entry for entry in written.files if entry.size >= MIB]
    assert len(small) == 1
    assert [(entry.name, entry.pack, entry.offset) for entry in large] == [
        ("checkpoint/pages-1.img", digest_of(FILES["checkpoint/pages-1.img"]), 0)
    ]
    packs = {f"v1/packs/{pack[:2]}/{pack}" for pack in [*small, large[0].pack]}
    assert tree(store.root) == {f"v1/snapshots/default/model/{ref.id}.json", *packs}
    for pack in packs:
        assert digest_of((store.root / pack).read_bytes()) == pack[-64:]
    for entry in written.files:
        data = store.pack_path(entry.pack).read_bytes()
        assert data[entry.offset : entry.offset + entry.size] == FILES[entry.name]
        assert entry.digest == digest_of(FILES[entry.name])
    assert written.id == ref.id
    assert store.load(ref) == written
    assert list(store.verify()) == []


def test_nobody_else_may_read_what_was_in_memory(store: DirectoryStore, tmp_path: Path) -> None:
    write_snapshot(store, tmp_path / "1")
    assert stat.S_IMODE(store.root.stat().st_mode) == 0o700
    for path in store.root.rglob("*"):
        assert path.stat().st_mode & 0o077 == 0, path


def test_a_large_file_is_linked_not_copied_on_one_file_system(store: DirectoryStore, work: Path) -> None:
    inode = (work / "big").stat().st_ino
    with store.writer("default", "model") as writer:
        writer.add_file("big", work / "big")
        _, written = writer.publish(manifest())
    assert store.pack_path(written.files[0].pack).stat().st_ino == inode
    (work / "big").unlink()
    assert list(store.verify()) == []


def test_a_large_file_is_copied_from_another_file_system(store: DirectoryStore, tmp_path: Path) -> None:
    with tmpfs(tmp_path / "mount", "size=8m") as mount:
        ref, _ = write_snapshot(store, mount / "1")
    assert list(store.verify(ref)) == []
    assert len(store.list()) == 1


def test_only_empty_files_and_none_at_all(store: DirectoryStore, tmp_path: Path) -> None:
    write_snapshot(store, tmp_path / "1", {"a": b"", "b": b""}, name="empty")
    write_snapshot(store, tmp_path / "2", {}, name="none")
    write_snapshot(store, tmp_path / "3", {"a": b"x", "b": b""}, name="one")
    assert list(store.verify()) == []


def test_equal_files_share_a_pack(store: DirectoryStore, tmp_path: Path) -> None:
    data = pattern(MIB)
    _, written = write_snapshot(store, tmp_path / "1", {"a": data, "b": data})
    assert len({entry.pack for entry in written.files}) == 1
    assert list(store.verify()) == []


def test_progress_counts_every_byte(store: DirectoryStore, work: Path) -> None:
    seen: list[int] = []
    with store.writer("default", "model", seen.append) as writer:
        writer.add_file("big", work / "big")
        writer.add_file("small", work / "small")
    assert sum(seen) == 2 * MIB + 5


def test_leaving_without_publish_leaves_nothing(store: DirectoryStore, work: Path) -> None:
    with store.writer("default", "model") as writer:
        writer.add_file("big", work / "big")
        assert tree(store.root)
    assert tree(store.root) == set()
    assert (work / "big").exists()
    with pytest.raises(ZeroDivisionError), store.writer("default", "model") as writer:
        writer.add_file("big", work / "big")
        raise ZeroDivisionError
    assert tree(store.root) == set()


def test_a_writer_publishes_once(store: DirectoryStore, work: Path) -> None:
    with store.writer("default", "model") as writer:
        writer.publish(manifest())
        for use in (lambda: writer.add_file("x", work / "small"), lambda: writer.publish(manifest())):
            with pytest.raises(StoreError, match="has published"):
                use()
    assert len(store.list()) == 1
    with pytest.raises(StoreError, match="never entered"):
        store.writer("default", "model").add_file("x", work / "small")


@pytest.mark.parametrize("bad", ["/", "a/b", "..", "x" * 300, "a\nb", ".x", "-x", ""])
def test_hostile_names_are_refused_before_anything_is_made(store: DirectoryStore, bad: str) -> None:
    for namespace, name in ((bad, "model"), ("default", bad)):
        with pytest.raises(StoreError, match="use 1 to 128 of"):
            store.writer(namespace, name)
    assert not store.root.exists()


def test_names_of_128_characters_work(store: DirectoryStore, tmp_path: Path) -> None:
    ref, _ = write_snapshot(store, tmp_path / "1", name="n" * 128, namespace="s" * 128)
    assert store.list() == [ref]


@pytest.mark.parametrize("bad", ["/x", "../x", "a//b", "", "a b", "x" * 600])
def test_bad_file_names_are_refused(store: DirectoryStore, work: Path, bad: str) -> None:
    with store.writer("default", "model") as writer, pytest.raises(StoreError, match="add file"):
        writer.add_file(bad, work / "small")


def test_a_file_twice_is_refused(store: DirectoryStore, work: Path) -> None:
    with store.writer("default", "model") as writer:
        writer.add_file("x", work / "small")
        with pytest.raises(StoreError, match="is in the snapshot already"):
            writer.add_file("x", work / "small")


def test_what_is_no_file_is_refused(store: DirectoryStore, work: Path) -> None:
    os.mkfifo(work / "fifo")
    (work / "link").symlink_to(work / "small")
    with store.writer("default", "model") as writer:
        for name in ("fifo", "link", "."):
            with pytest.raises(StoreError, match="is not a regular file"):
                writer.add_file("x", work / name)
        with pytest.raises(StoreError, match="No such file"):
            writer.add_file("x", work / "missing")


def test_a_manifest_that_no_reader_would_take_is_not_published(store: DirectoryStore, work: Path) -> None:
    good = manifest()
    for bad, cause in (
        (good._replace(created="now"), "field created"),
        (good._replace(memory_bytes=-1), "field memory_bytes"),
        (good._replace(requires=good.requires._replace(image="\udcff")), "surrogate|JSON"),
        (good._replace(memory_bytes=float("nan")), "JSON"),  # type: ignore[arg-type]
        (good._replace(source={"x": object()}), "JSON"),  # type: ignore[dict-item]
        (good._replace(name="other"), "is for default/other"),
        (good._replace(namespace="other"), "is for other/model"),
    ):
        with pytest.raises(StoreError, match=cause), store.writer("default", "model") as writer:
            writer.add_file("big", work / "big")
            writer.publish(bad)
        assert tree(store.root) == set()


def test_a_file_that_is_written_after_it_was_added_is_noticed(store: DirectoryStore, work: Path) -> None:
    with pytest.raises(StoreError, match="changed while it was captured"), store.writer("default", "model") as writer:
        writer.add_file("big", work / "big")
        time.sleep(0.02)  # the kernel's file times go by ticks of its clock
        with (work / "big").open("r+b") as file:
            file.write(b"changed")
        writer.publish(manifest())
    assert tree(store.root) == set()


def test_a_full_file_system(tmp_path: Path, work: Path) -> None:
    with tmpfs(tmp_path / "mount", "size=3m") as mount:
        store = DirectoryStore(str(mount / "store"))
        ref, _ = write_snapshot(store, tmp_path / "1", {"big": pattern(MIB)}, name="kept")
        before = tree(store.root)
        with pytest.raises(StoreError, match="no space is left; free space there, or remove snapshots"):
            write_snapshot(store, tmp_path / "2", {"big": pattern(3 * MIB)})
        assert tree(store.root) == before
        assert list(store.verify()) == []
        write_snapshot(store, tmp_path / "3", {"big": pattern(MIB, 3)})
        assert store.list()[0] == ref


def test_no_inodes_left_at_any_step(tmp_path: Path) -> None:
    """Each step that makes a file or directory fails in turn; the store is as before each time."""
    failures = 0
    with tmpfs(tmp_path / "mount", "size=8m,nr_inodes=64") as mount:
        store = DirectoryStore(str(mount / "store"))
        write_snapshot(store, tmp_path / "kept", {"a": b"x"}, name="kept")
        store.root.joinpath("v1/locks/names/default/model").touch()
        before = tree(store.root)
        fillers: list[Path] = []
        try:
            while True:
                fillers.append(mount / f"filler{len(fillers)}")
                fillers[-1].touch()
        except OSError:
            fillers.pop()
        while fillers:
            contents = {"big": pattern(MIB, 9), "small": b"s"}
            try:
                write_snapshot(store, tmp_path / f"w{len(fillers)}", contents, namespace="default")
            except StoreError as error:
                assert "no space is left" in str(error)
                failures += 1
                assert tree(store.root) == before
                assert list(store.verify()) == []
                fillers.pop().unlink()
            else:
                break
        assert len(store.list()) == 2
        assert list(store.verify()) == []
    assert failures >= 7


@pytest.mark.parametrize("fail_at", range(1, 13))
def test_every_failure_while_publishing_takes_back_what_was_placed(
    store: DirectoryStore, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail_at: int
) -> None:
    """A rename or directory sync that fails: these cannot be made to fail one by one by a real file system."""
    write_snapshot(store, tmp_path / "1", {"a": b"x"}, name="kept")
    before = tree(store.root)
    calls = 0

    def failing(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == fail_at:
            raise StoreError("sync", "x", "injected")

    rename, sync = writer_module.SnapshotWriter._rename, sync_directory

    def slow_rename(self: writer_module.SnapshotWriter, source: Path, target: Path) -> None:
        failing()
        rename(self, source, target)
        failing()

    def slow_sync(path: Path) -> None:
        failing()
        sync(path)
        failing()

    monkeypatch.setattr(writer_module.SnapshotWriter, "_rename", slow_rename)
    monkeypatch.setattr(writer_module, "sync_directory", slow_sync)
    with pytest.raises(StoreError, match="injected"), store.writer("default", "model") as writer:
        writer.add_file("big", work / "big")
        writer.add_file("small", work / "small")
        writer.publish(manifest())
    assert calls == fail_at
    assert tree(store.root) == before
    assert not (store.root / "v1/snapshots/default/model").exists()


def test_a_parent_that_does_not_exist_is_not_made(tmp_path: Path) -> None:
    store = DirectoryStore(str(tmp_path / "not-mounted" / "store"))
    with pytest.raises(StoreError, match=r"parent .*not-mounted does not exist"), store.writer("default", "model"):
        pytest.fail("entered")
    assert list(tmp_path.iterdir()) == []


def test_a_broken_link_is_not_written_through(store: DirectoryStore, tmp_path: Path) -> None:
    store.root.symlink_to(tmp_path / "target")
    with pytest.raises(StoreError, match="is a broken symbolic link"), store.writer("default", "model"):
        pytest.fail("entered")
    assert not (tmp_path / "target").exists()


def test_a_file_in_place_of_the_store_or_a_directory_of_it(store: DirectoryStore) -> None:
    store.root.write_text("")
    with pytest.raises(StoreError, match="is not a directory"), store.writer("default", "model"):
        pytest.fail("entered")
    store.root.unlink()
    store.root.mkdir()
    (store.root / "v1").symlink_to("/tmp")
    with pytest.raises(StoreError, match="is not a directory; move it away"), store.writer("default", "model"):
        pytest.fail("entered")


def test_capturing_again_mends_a_damaged_pack(store: DirectoryStore, tmp_path: Path) -> None:
    old, written = write_snapshot(store, tmp_path / "1", created="2026-01-01T00:00:00Z")
    large = next(entry for entry in written.files if entry.whole_pack)
    path = store.pack_path(large.pack)
    path.chmod(0o600)
    path.write_bytes(b"damaged")
    assert list(store.verify())
    new, _ = write_snapshot(store, tmp_path / "2")
    assert list(store.verify()) == []
    assert {ref.id for ref in store.list()} == {old.id, new.id}


def test_packs_that_another_node_swept_fail_the_publish(
    store: DirectoryStore, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without working locks on a shared file system a removal elsewhere may run between packs and manifest."""
    rename = writer_module.SnapshotWriter._rename

    def swept(self: writer_module.SnapshotWriter, source: Path, target: Path) -> None:
        if target.suffix == ".json":
            for pack in (store.root / "v1" / "packs").glob("*/*"):
                pack.unlink()
        rename(self, source, target)

    monkeypatch.setattr(writer_module.SnapshotWriter, "_rename", swept)
    with pytest.raises(StoreError, match="is missing"), store.writer("default", "model") as writer:
        writer.add_file("big", work / "big")
        writer.publish(manifest())
    assert store.list() == []


def test_references_print_short(store: DirectoryStore) -> None:
    assert str(SnapshotRef("default", "model", "0123456789abcdef" * 4)) == "default/model@0123456789ab"
