"""Writing snapshots: all or nothing, whatever fails or dies in between."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rewarm.errors import StoreError
from rewarm.store import writer as writer_module
from rewarm.store.directory import DirectoryStore, SnapshotRef
from rewarm.store.manifest import digest_of
from rewarm.store.workspace import sync_directory
from support.snapshots import FILES, MIB, manifest, pattern, tmpfs, tree, write_snapshot

CHILD = """
import sys, time
from pathlib import Path
from rewarm.store import writer as module
from rewarm.store.directory import DirectoryStore
from support.snapshots import manifest

store, work, stage = DirectoryStore(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]

def stop():
    print("ready", flush=True)
    time.sleep(600)

if stage == "manifest":  # killed between the last pack and the manifest
    rename = module.SnapshotWriter._rename
    def slow(self, source, target):
        if target.suffix == ".json":
            stop()
        rename(self, source, target)
    module.SnapshotWriter._rename = slow
if stage == "leaving":  # stands still for a second when all but the workspace's directory is removed
    def hook(event, args):
        if event == "os.rmdir":
            print("ready", flush=True)
            time.sleep(1)
    sys.addaudithook(hook)
with store.writer("default", "model") as writer:
    for number, name in enumerate(["big", "small"]):
        writer.add_file(name, work / name)
    if stage == "files":
        stop()
    if stage != "leaving":
        writer.publish(manifest())
"""


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


def start_child(store: DirectoryStore, work: Path, stage: str) -> subprocess.Popen[str]:
    path = os.pathsep.join(sys.path)
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(store.root), str(work), stage],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    return child


@pytest.fixture(params=["files", "manifest"])
def child(request: pytest.FixtureRequest, store: DirectoryStore, work: Path) -> Iterator[subprocess.Popen[str]]:
    process = start_child(store, work, request.param)
    yield process
    process.kill()
    process.communicate()


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
        (replace(good, created="now"), "field created"),
        (replace(good, memory_bytes=-1), "field memory_bytes"),
        (replace(good, requires=replace(good.requires, image="\udcff")), "surrogate|JSON"),
        (replace(good, memory_bytes=float("nan")), "JSON"),  # type: ignore[arg-type]
        (replace(good, source={"x": object()}), "JSON"),  # type: ignore[dict-item]
        (replace(good, name="other"), "is for default/other"),
        (replace(good, namespace="other"), "is for other/model"),
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


def test_a_second_capture_of_one_name_is_refused(
    store: DirectoryStore, work: Path, child: subprocess.Popen[str]
) -> None:
    message = f"another capture of model is running \\(pid {child.pid} on {os.uname().nodename}\\)"
    with pytest.raises(StoreError, match=message), store.writer("default", "model"):
        pytest.fail("entered")
    with pytest.raises(StoreError, match="another capture of model"), store.writer("default", "model"):
        pytest.fail("entered")


def test_captures_of_other_names_run_at_the_same_time(store: DirectoryStore, work: Path, tmp_path: Path) -> None:
    child = start_child(store, work, "files")
    try:
        refs = [
            write_snapshot(store, tmp_path / "1", name="other")[0],
            write_snapshot(store, tmp_path / "2", namespace="team")[0],
        ]
        store.remove(refs.pop())
        assert store.list() == refs
        (workspace,) = (store.root / "v1" / "tmp").iterdir()
        assert {"lock", "large0", "shared"} == {path.name for path in workspace.iterdir()}
    finally:
        child.kill()
        child.communicate()


def test_a_killed_capture_leaves_nothing_that_matters(
    store: DirectoryStore, work: Path, tmp_path: Path, child: subprocess.Popen[str]
) -> None:
    kept, _ = write_snapshot(store, tmp_path / "1", name="kept")
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert store.list() == [kept]
    assert list(store.verify()) == []
    assert any((store.root / "v1" / "tmp").iterdir())
    ref, _ = write_snapshot(store, tmp_path / "2", {"a": b"new"})
    expected = {f"v1/snapshots/default/{one.name}/{one.id}.json" for one in (ref, kept)}
    for one in (ref, kept):
        expected |= {f"v1/packs/{entry.pack[:2]}/{entry.pack}" for entry in store.load(one).files}
    assert tree(store.root) == expected
    assert list((store.root / "v1" / "tmp").iterdir()) == []
    assert list(store.verify()) == []


STEPS = """
import os, signal, sys
from pathlib import Path
import rewarm.store.remove, rewarm.store.verify, rewarm.store.writer  # once, not in every child
from rewarm.store.directory import DirectoryStore
from support.snapshots import pattern, tree, write_snapshot

store, work = DirectoryStore(sys.argv[1]), Path(sys.argv[2])
WATCHED = {"open", "os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir", "os.listdir", "os.scandir", "os.chmod",
           "os.truncate", "fcntl.flock", "shutil.rmtree"}

def forked(work):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def capture(step):
    left = step
    def hook(event, args):
        nonlocal left
        if event in WATCHED:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    write_snapshot(store, work / f"victim{step}", {"big": pattern(1 << 20, step), "small": b"small"})

def check():
    assert list(store.verify()) == []
    write_snapshot(store, work / f"after{step}", {"other": b"other"}, name="after")
    refs = store.list()
    packs = {entry.pack for ref in refs for entry in store.load(ref).files}
    expected = {f"v1/packs/{pack[:2]}/{pack}" for pack in packs}
    expected |= {f"v1/snapshots/{ref.namespace}/{ref.name}/{ref.id}.json" for ref in refs}
    assert tree(store.root) == expected, tree(store.root) ^ expected
    assert list(store.verify()) == []

step, visible = 0, 0
store.root.mkdir()
while True:
    step += 1
    outcome = forked(lambda: capture(step))
    visible += any(ref.name == "model" for ref in store.list())
    assert forked(check) == 0, step
    for ref in store.list():
        assert forked(lambda: store.remove(ref)) == 0, step
    assert tree(store.root) == set(), step
    if outcome == 0:
        break
    assert outcome == -signal.SIGKILL, outcome
print(step, visible)
"""


def test_a_capture_killed_at_any_step_is_all_or_nothing(tmp_path: Path) -> None:
    """SIGKILL before each open, rename, link, mkdir, removal and lock of a capture in turn, until one gets through."""
    with tmpfs(tmp_path / "mount", "size=1g") as mount:  # some thousand syncs take long on a disk
        result = subprocess.run(
            [sys.executable, "-c", STEPS, str(mount / "store"), str(mount / "work")],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
        )
    assert result.returncode == 0, result.stderr[-2000:]
    steps, visible = map(int, result.stdout.split())
    assert steps > 30, steps
    assert 1 < visible < steps // 2, visible


def test_left_over_entries_of_any_kind_are_removed(store: DirectoryStore, tmp_path: Path) -> None:
    write_snapshot(store, tmp_path / "1", {"a": b"x"})
    before = tree(store.root)
    tmp = store.root / "v1" / "tmp"
    (tmp / "file").write_text("x")
    (tmp / "link").symlink_to("/")
    (tmp / "dead" / "below").mkdir(parents=True)
    (tmp / "dead" / "below" / "x").write_text("x")
    (tmp / "dead" / "lock").write_text("")
    with store.writer("default", "model"):
        pass
    assert tree(store.root) == before
    assert list(tmp.iterdir()) == []


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


def test_many_processes_capture_and_remove_at_once(store: DirectoryStore, tmp_path: Path) -> None:
    """Captures that share all their packs, against removals: whatever is listed in the end is whole."""
    script = """
import sys
from pathlib import Path
from rewarm.errors import SnapshotNotFound
from rewarm.store.directory import DirectoryStore
from support.snapshots import write_snapshot
store, work, name = DirectoryStore(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
for turn in range(6):
    ref, _ = write_snapshot(store, work / f"{name}{turn}", name=name)
    store.load(ref)
    if turn % 2:
        store.remove(ref)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(store.root), str(tmp_path / "w"), name],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in ("a", "b", "c", "d")
    ]
    for process in children:
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 0, stderr
    assert len(store.list()) == 12
    assert list(store.verify()) == []
    packs = {entry.pack for ref in store.list() for entry in store.load(ref).files}
    assert {path.name for path in (store.root / "v1" / "packs").glob("*/*")} == packs


def test_a_writer_that_is_just_leaving_is_not_taken_for_dead(store: DirectoryStore, work: Path) -> None:
    """Its workspace, half removed, has no lock file any more."""
    child = start_child(store, work, "leaving")
    with store.writer("default", "other") as writer:
        writer.publish(manifest(name="other"))
    _, stderr = child.communicate(timeout=60)
    assert child.returncode == 0, stderr
    assert [ref.name for ref in store.list()] == ["other"]
    assert list((store.root / "v1" / "tmp").iterdir()) == []


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
