"""Captures that die or run at the same time as others: real processes, killed by real signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rewarm.errors import StoreError
from rewarm.store.directory import DirectoryStore
from support.snapshots import MIB, manifest, pattern, tmpfs, tree, write_snapshot

CHILD = """
import sys, time
from pathlib import Path
from rewarm.store import writer as module
from rewarm.store.directory import DirectoryStore
from support.chunked import some
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
    for chunk in some(3):
        writer.add_chunk(chunk)
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
        assert {"lock", "large0", "shared", "chunks0"} == {path.name for path in workspace.iterdir()}
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
# Once, not in every child.
import rewarm.store.gc, rewarm.store.remove, rewarm.store.verify, rewarm.store.writer, zstandard
from rewarm.store.directory import DirectoryStore
from support.chunked import some, write_chunks
from support.snapshots import manifest, pattern, tree, write_snapshot

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
    work.mkdir(exist_ok=True)
    (work / "big").write_bytes(pattern(1 << 20, step))
    with store.writer("default", "model") as writer:
        writer.add_file("big", work / "big")
        writer.add_bytes("small", b"small")
        for chunk in (*some(2), *some(2, seed=step + 2)):  # two that "base" has, two new
            writer.add_chunk(chunk)
        writer.publish(manifest())
    (work / "big").unlink()

def collect():
    if step % 2:  # else the next capture does it
        store.gc()
        assert list((store.root / "v1" / "tmp").iterdir()) == []

def check():
    assert list(store.verify()) == []
    write_snapshot(store, work / f"after{step}", {"other": b"other"}, name="after")
    refs = store.list()
    packs = {entry.pack for ref in refs for entry in store.load(ref).files}
    packs |= {pack.digest for ref in refs for pack in store.load(ref).packs}
    expected = {f"v1/packs/{pack[:2]}/{pack}" for pack in packs}
    expected |= {f"v1/snapshots/{ref.namespace}/{ref.name}/{ref.id}.json" for ref in refs}
    assert tree(store.root) == expected, tree(store.root) ^ expected
    assert list(store.verify()) == []

step, visible = 0, 0
store.root.mkdir()
while True:
    step += 1
    assert forked(lambda: write_chunks(store, some(2), name="base")) == 0, step
    outcome = forked(lambda: capture(step))
    visible += any(ref.name == "model" for ref in store.list())
    assert forked(collect) == 0, step
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
