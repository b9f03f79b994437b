"""Reading a store: listing, finding and opening, and every way in which a store can be broken."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from rewarm.errors import SnapshotDamaged, SnapshotNotFound, StoreError
from rewarm.store.directory import DirectoryStore, SnapshotRef
from rewarm.store.manifest import Manifest, digest_of
from support.snapshots import manifest, tmpfs, write_snapshot


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(str(tmp_path / "store"))


def plant(store: DirectoryStore, data: bytes, name: str = "model", namespace: str = "default") -> SnapshotRef:
    """Put bytes where a manifest with their digest lies, as a hostile node could."""
    ref = SnapshotRef(namespace, name, digest_of(data))
    directory = store.root / "v1" / "snapshots" / namespace / name
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{ref.id}.json").write_bytes(data)
    return ref


def manifest_path(store: DirectoryStore, ref: SnapshotRef) -> Path:
    return store.root / "v1" / "snapshots" / ref.namespace / ref.name / f"{ref.id}.json"


def test_list_and_load(store: DirectoryStore, tmp_path: Path) -> None:
    first, written = write_snapshot(store, tmp_path / "1")
    second, _ = write_snapshot(store, tmp_path / "2", name="other", namespace="team")
    assert store.list() == [first, second]
    assert store.list("team") == [second]
    assert store.list("nobody") == []
    assert store.load(first) == written
    assert DirectoryStore(f"file://{store.root}").list() == [first, second]


def test_an_empty_store_has_nothing(store: DirectoryStore) -> None:
    store.root.mkdir()
    assert store.list() == []
    assert store.candidates("default", "model") == []
    assert list(store.verify()) == []
    with pytest.raises(SnapshotNotFound, match="no name or id in namespace default"):
        store.resolve("model")


@pytest.mark.parametrize("url", ["s3://bucket/x", "relative", "", "file://host/x"])
def test_a_store_that_is_no_directory_is_refused_by_name(url: str) -> None:
    with pytest.raises(StoreError, match="open store"):
        DirectoryStore(url)


def reading_fails(store: DirectoryStore, match: str) -> None:
    digest = "a" * 64
    ref = SnapshotRef("default", "model", digest)
    for read in (
        store.list,
        lambda: store.list("default"),
        lambda: store.candidates("default", "model"),
        lambda: store.load(ref),
        lambda: store.resolve("model"),
        lambda: store.open_pack(digest),
        lambda: store.remove(ref),
        lambda: list(store.verify()),
    ):
        with pytest.raises(StoreError, match=match) as caught:
            read()
        assert str(store.root) in str(caught.value)
        assert caught.value.next_step


def test_a_missing_store(store: DirectoryStore) -> None:
    reading_fails(store, "does not exist; create it or mount it")


def test_a_file_in_place_of_the_store(store: DirectoryStore) -> None:
    store.root.write_text("x")
    reading_fails(store, "is not a directory")


def test_a_fifo_in_place_of_the_store(store: DirectoryStore) -> None:
    os.mkfifo(store.root)
    reading_fails(store, "is not a directory")


def test_a_broken_link_in_place_of_the_store(store: DirectoryStore) -> None:
    store.root.symlink_to("/nonexistent/target")
    reading_fails(store, "is a broken symbolic link to /nonexistent/target")


def test_a_link_to_the_store_is_followed(store: DirectoryStore, tmp_path: Path) -> None:
    ref, _ = write_snapshot(store, tmp_path / "1")
    link = tmp_path / "link"
    link.symlink_to(store.root)
    assert DirectoryStore(str(link)).list() == [ref]


def test_a_file_in_place_of_a_directory_of_the_store(store: DirectoryStore) -> None:
    store.root.mkdir()
    (store.root / "v1").write_text("x")
    with pytest.raises(StoreError, match=r"list .*/v1/snapshots: is not a directory"):
        store.list()


def test_a_read_only_mount_can_be_read(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "mount", "size=8m") as mount:
        store = DirectoryStore(str(mount / "store"))
        ref, written = write_snapshot(store, tmp_path / "1")
        subprocess.run(["mount", "-o", "remount,ro", str(mount)], check=True)
        assert store.list() == [ref]
        assert store.load(ref) == written
        assert list(store.verify()) == []
        with pytest.raises(StoreError, match=r"mounted read-only; mount it writable"):
            store.remove(ref)
        assert store.list() == [ref]
        with (
            pytest.raises(StoreError, match=r"mounted read-only; mount it writable"),
            store.writer("default", "model"),
        ):
            pytest.fail("entered a writer on a read-only mount")


def test_directories_that_are_links_are_not_followed(store: DirectoryStore, tmp_path: Path) -> None:
    ref, written = write_snapshot(store, tmp_path / "1")
    snapshots = store.root / "v1" / "snapshots"
    (snapshots / "default").rename(tmp_path / "moved")
    (snapshots / "default").symlink_to(tmp_path / "moved")
    assert store.list() == []
    with pytest.raises(StoreError, match="is not a directory"):
        store.load(ref)
    pack = store.pack_path(written.files[0].pack)
    pack.parent.rename(tmp_path / "packs")
    pack.parent.symlink_to(tmp_path / "packs")
    with pytest.raises(StoreError, match="is not a directory"):
        store.open_pack(pack.name)


def test_strange_entries_are_passed_over(store: DirectoryStore, tmp_path: Path) -> None:
    ref, _ = write_snapshot(store, tmp_path / "1")
    directory = manifest_path(store, ref).parent
    for name in (".nfs0001", "README", f"{'A' * 64}.json", f"{ref.id}.json.bak", f"{'a' * 63}.json"):
        (directory / name).write_text("x")
    (directory.parent / ".hidden").mkdir()
    (directory.parent / "file").write_text("")
    (directory.parent.parent / "a b").mkdir()
    assert store.list() == [ref]
    assert list(store.verify()) == []


def test_newest_comes_first_and_damaged_last(store: DirectoryStore, tmp_path: Path) -> None:
    times = ["2026-01-01T00:00:00Z", "2026-03-01T00:00:00Z", "2026-02-01T00:00:00Z"]
    refs = [
        write_snapshot(store, tmp_path / str(number), {"a": b"x"}, created=time)[0] for number, time in enumerate(times)
    ]
    damaged = plant(store, b"{}")
    found = store.candidates("default", "model")
    assert [ref for ref, _ in found] == [refs[1], refs[2], refs[0], damaged]
    assert all(isinstance(item, Manifest) for _, item in found[:3])
    assert isinstance(found[3][1], SnapshotDamaged)
    assert "field version is missing" in str(found[3][1])


def test_resolve(store: DirectoryStore, tmp_path: Path) -> None:
    old, _ = write_snapshot(store, tmp_path / "1", {"a": b"x"}, created="2026-01-01T00:00:00Z")
    new, _ = write_snapshot(store, tmp_path / "2", {"a": b"x"}, created="2026-02-01T00:00:00Z")
    other, _ = write_snapshot(store, tmp_path / "3", {"a": b"x"}, namespace="team")
    assert store.resolve("model") == new
    assert store.resolve("model", "team") == other
    assert store.resolve(old.id[:6]) == old
    assert store.resolve(other.id, None) == other
    for text, namespace in ((old.id[:5], "default"), (other.id, "default"), ("", None), ("../x", None)):
        with pytest.raises(SnapshotNotFound):
            store.resolve(text, namespace)
    with pytest.raises(StoreError, match=r"several namespaces: default/model@.*, team/model@") as caught:
        store.resolve("model", None)
    assert "give more of the id" in str(caught.value)


def test_resolve_lists_ids_that_begin_alike(store: DirectoryStore, tmp_path: Path) -> None:
    store.root.mkdir()
    directory = store.root / "v1" / "snapshots" / "default" / "model"
    directory.mkdir(parents=True)
    for end in "01":
        (directory / f"{'abcdef' + end * 58}.json").write_text("x")
    with pytest.raises(
        StoreError, match="several ids begin so: default/model@abcdef000000, default/model@abcdef111111"
    ):
        store.resolve("abcdef")
    with pytest.raises(StoreError, match="all of them are damaged"):
        store.resolve("model")
    assert store.resolve("abcdef0").id.endswith("0")


def test_a_damaged_snapshot_is_still_found_by_name(store: DirectoryStore) -> None:
    ref = plant(store, b"junk")
    assert store.resolve("model") == ref
    store.remove(ref)
    assert store.list() == []


@pytest.mark.parametrize("cut", [0, 1, 100, -1])
def test_a_truncated_manifest(store: DirectoryStore, tmp_path: Path, cut: int) -> None:
    ref, _ = write_snapshot(store, tmp_path / "1")
    path = manifest_path(store, ref)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(SnapshotDamaged, match="is truncated or was changed"):
        store.load(ref)
    (finding,) = store.verify()
    assert finding.object == str(ref)
    assert "truncated" in finding.problem


def test_a_manifest_of_another_version(store: DirectoryStore) -> None:
    ref = plant(store, manifest().to_bytes().replace(b'"version":1', b'"version":2'))
    with pytest.raises(SnapshotDamaged, match=rf"read manifest {ref}: version 2 is unknown"):
        store.load(ref)


def test_a_manifest_at_another_snapshots_place(store: DirectoryStore) -> None:
    ref = plant(store, manifest(name="evil").to_bytes(), name="model")
    with pytest.raises(SnapshotDamaged, match="says that it is default/evil"):
        store.load(ref)


def test_a_manifest_of_100_megabytes_is_read_in_part(store: DirectoryStore) -> None:
    ref = plant(store, b"{}")
    with manifest_path(store, ref).open("r+b") as file:
        file.truncate(100 << 20)
    with pytest.raises(SnapshotDamaged, match="longer than 64 MiB"):
        store.load(ref)


@pytest.mark.parametrize("kind", ["fifo", "link", "device", "directory"])
def test_what_is_no_file_is_not_read_as_a_manifest_or_pack(store: DirectoryStore, tmp_path: Path, kind: str) -> None:
    ref, written = write_snapshot(store, tmp_path / "1")
    for path in (manifest_path(store, ref), store.pack_path(written.files[0].pack)):
        good = tmp_path / path.name
        path.rename(good)
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "link":
            path.symlink_to(good)  # to the right bytes: the type is what is refused
        elif kind == "directory":
            path.mkdir()
        else:
            os.mknod(path, 0o20666, os.makedev(1, 5))  # /dev/zero never ends
    with pytest.raises(SnapshotDamaged, match="is not a regular file"):
        store.load(ref)
    with pytest.raises(SnapshotDamaged, match="is not a regular file"):
        store.open_pack(written.files[0].pack)
    assert [finding.problem for finding in store.verify()] == ["is not a regular file"]


def test_a_snapshot_that_is_not_there(store: DirectoryStore, tmp_path: Path) -> None:
    ref, _ = write_snapshot(store, tmp_path / "1")
    for gone in (ref._replace(id="0" * 64), ref._replace(name="other"), ref._replace(namespace="other")):
        with pytest.raises(SnapshotNotFound, match="is not in the store; see `rewarm ls`"):
            store.load(gone)


@pytest.mark.parametrize("bad", ["../default", "a/b", "..", "x" * 300, "a\nb", ".x", "-x", ""])
def test_hostile_references_never_become_paths(store: DirectoryStore, tmp_path: Path, bad: str) -> None:
    ref, _ = write_snapshot(store, tmp_path / "1")
    for hostile in (ref._replace(name=bad), ref._replace(namespace=bad), ref._replace(id=bad)):
        for use in (store.load, store.remove):
            with pytest.raises(StoreError, match="use "):
                use(hostile)
    with pytest.raises(StoreError, match="use "):
        store.candidates("default", bad)
    with pytest.raises(StoreError, match="use "):
        store.list(bad)
    with pytest.raises(SnapshotDamaged, match="is not a digest"):
        store.pack_path(bad)
    assert store.list() == [ref]


def test_open_pack_gives_a_descriptor_that_children_do_not_inherit(store: DirectoryStore, tmp_path: Path) -> None:
    _, written = write_snapshot(store, tmp_path / "1")
    fd = store.open_pack(written.files[0].pack)
    try:
        assert not os.get_inheritable(fd)
        assert os.fstat(fd).st_size == sum(entry.size for entry in written.files if not entry.whole_pack)
    finally:
        os.close(fd)


def test_nothing_leaks_descriptors(store: DirectoryStore, tmp_path: Path) -> None:
    ref, written = write_snapshot(store, tmp_path / "1")
    hostile = written._replace(name="other").to_bytes()
    plant(store, hostile)
    os.mkfifo(store.root / "v1" / "snapshots" / "default" / "model" / f"{'0' * 64}.json")
    before = os.listdir("/proc/self/fd")
    store.candidates("default", "model")
    list(store.verify())
    store.load(ref)
    with pytest.raises(SnapshotDamaged):
        store.open_pack("0" * 64)
    write_snapshot(store, tmp_path / "2")
    store.remove(ref)
    assert os.listdir("/proc/self/fd") == before
