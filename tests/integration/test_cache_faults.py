"""A cache that is full, gone or wrong under a restore makes it slower and nothing else; many restores share one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from rewarm.store.directory import DirectoryStore
from support import carving, faults
from support.carving import Snapshot, end, goes_on_right, is_right, linked, nothing_remains_of, works
from support.node import Node
from support.outcomes import said
from support.proc import command, wait_for
from support.share import Share
from support.snapshots import MIB, tmpfs


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory, prefix: Path) -> Iterator[Snapshot]:
    """20 MiB of memory in packs of 8. Not to be changed."""
    with Node(tmp_path_factory.mktemp("captured"), prefix) as node:
        yield carving.captured(node, 10)


@pytest.fixture
def node(nothing_left_behind: None, snapshot: Snapshot, tmp_path: Path, prefix: Path) -> Iterator[Node]:
    with Node(tmp_path / "node", prefix, store=snapshot.store, cache=str(tmp_path / "cache")) as one:
        yield one


def trace(node: Node, name: str) -> dict[str, int]:
    """How much a restore has read from where."""
    notes: dict[str, int] = json.loads((node.container_directory(name) / "trace.json").read_text())["otherData"]
    return notes


def copies(tmp_path: Path) -> list[Path]:
    """The packs that the cache holds."""
    return [path for path in (tmp_path / "cache" / "v1").glob("??/*") if path.parent.name != "tmp"]


@pytest.mark.parametrize("size", ["64k", "4m", "12m"])
def test_full(node: Node, snapshot: Snapshot, tmp_path: Path, size: str) -> None:
    """No room at all, for no pack, for one of them."""
    with tmpfs(tmp_path / "cache", f"size={size},mode=700"):
        works(node, snapshot, "one")
        works(node, snapshot, "two")


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def flipped(path: Path) -> None:
    faults.flip(path, path.stat().st_size // 2)


def zeroed(path: Path) -> None:
    size = path.stat().st_size
    path.write_bytes(b"")
    os.truncate(path, size)


def directory(path: Path) -> None:
    path.unlink()
    (path / "in the way").mkdir(parents=True)


def link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


WAYS = [emptied, flipped, zeroed, cut, directory, link, fifo, Path.unlink]


@pytest.mark.parametrize("change", WAYS, ids=lambda change: change.__name__)
def test_spoiled_before(node: Node, snapshot: Snapshot, tmp_path: Path, change: Callable[[Path], None]) -> None:
    works(node, snapshot, "one")
    found = copies(tmp_path)
    assert len(found) == len(carving.packs(node.store))
    for path in found:
        change(path)
    works(node, snapshot, "two")
    works(node, snapshot, "three")


@pytest.mark.parametrize("change", WAYS, ids=lambda change: change.__name__)
def test_spoiled_while_it_is_read(
    snapshot: Snapshot, tmp_path: Path, prefix: Path, change: Callable[[Path], None]
) -> None:
    """The cache itself is slow, so that there is a middle."""
    real = tmp_path / "cache"
    real.mkdir()
    with (
        Share(real, tmp_path / "slow", rate=24 * MIB) as slow,
        Node(tmp_path / "node", prefix, store=snapshot.store, cache=str(tmp_path / "slow")) as node,
    ):
        works(node, snapshot, "one")
        before = slow.read_so_far()
        made = snapshot.bundle(node.directory / "copy")
        process, container = node.runtime.spawn("create", "copy", made)
        wait_for("reading", lambda: slow.read_so_far() > before + 4 * MIB, interval=0.001)
        for path in copies(tmp_path):
            with suppress(FileNotFoundError):  # dropped already
                change(path)
        assert process.wait(30) == 0
        node.runtime.settle(container)
        assert is_right(node, snapshot, "copy") == "warm", node.outcome("copy")
        end(node, "copy")
        nothing_remains_of(node, made, "copy")


def take_away(directory: Path, how: str) -> None:
    """Delete a directory that others write to, and put something else in its place, unless it is `deleted`."""
    for number in range(100):
        gone = directory.with_name(f"gone-{number}")
        directory.rename(gone)
        try:
            if how == "a file":
                directory.touch(exist_ok=False)
            elif how == "a link":
                directory.symlink_to("/nowhere")
        except FileExistsError:
            continue  # the restore was faster, and has made a new one
        finally:
            shutil.rmtree(gone, ignore_errors=True)
        return
    raise AssertionError("a restore makes its cache faster than it can be taken away")


@pytest.mark.parametrize("how", ["deleted", "a file", "a link", "read-only", "filled up"])
def test_directory_under_a_restore(snapshot: Snapshot, tmp_path: Path, prefix: Path, how: str) -> None:
    """While packs come in from a slow share."""
    cache = tmp_path / "cache"
    with (
        tmpfs(cache, "size=64m,mode=700"),
        Share(snapshot.store, tmp_path / "share", rate=16 * MIB) as share,
        Node(tmp_path / "node", prefix, store=share.target, cache=str(cache / "packs")) as node,
    ):
        made = snapshot.bundle(node.directory / "copy")
        process, container = node.runtime.spawn("create", "copy", made)
        wait_for("fetching", lambda: list((cache / "packs" / "v1" / "tmp").glob("*")), interval=0.001)
        if how == "read-only":
            # A mount cannot become so while files are open for writing: one over it has the same effect on new ones.
            command("mount", "-t", "tmpfs", "-o", "ro", "tmpfs", cache / "packs")
        elif how == "filled up":
            command("mount", "-o", "remount,size=4m", cache, check=False)
            (cache / "hog").touch()
            subprocess.run(["dd", "if=/dev/zero", f"of={cache}/hog", "bs=64k"], stderr=subprocess.DEVNULL, check=False)
        else:
            take_away(cache / "packs", how)
        assert process.wait(30) == 0
        node.runtime.settle(container)
        if how == "read-only":
            command("umount", cache / "packs")
        assert is_right(node, snapshot, "copy") == "warm", node.outcome("copy")
        end(node, "copy")
        works(node, snapshot, "next")


# Many at once.


@pytest.mark.parametrize("count", [2, 10])
def test_at_once(node: Node, snapshot: Snapshot, count: int) -> None:
    """Each pack is read from the store once."""
    names = [f"copy-{number}" for number in range(count)]
    made = {name: snapshot.bundle(node.directory / name) for name in names}
    running = {name: node.runtime.spawn("create", name, made[name]) for name in names}
    for name, (process, container) in running.items():
        assert process.wait(60) == 0
        node.runtime.settle(container)
        assert node.outcome(name)["outcome"] == "warm", node.outcome(name)
    read = sum(trace(node, name)["store_bytes"] for name in names)
    stored = sum(path.stat().st_size for path in carving.packs(node.store))
    for name in names:
        is_right(node, snapshot, name)
        end(node, name)
        nothing_remains_of(node, made[name], name)
    assert read <= 1.05 * stored


def test_while_gc_runs(snapshot: Snapshot, tmp_path: Path, prefix: Path) -> None:
    """Which has something to do each time."""
    store = linked(snapshot.store, tmp_path / "store")
    over = threading.Event()
    errors: list[BaseException] = []

    def collect() -> None:
        number = 0
        try:
            while not over.is_set():
                for _ in range(20):
                    number += 1
                    path = store / "v1" / "packs" / "ab" / f"ab{number:062x}"
                    path.parent.mkdir(exist_ok=True)
                    path.write_bytes(b"nobody's")
                DirectoryStore(str(store)).gc()
                assert not path.exists()
        except BaseException as error:
            errors.append(error)

    with Node(tmp_path / "node", prefix, store=store) as node:
        thread = threading.Thread(target=collect)
        thread.start()
        try:
            for number in range(3):
                works(node, snapshot, f"copy-{number}")
        finally:
            over.set()
            thread.join()
        assert errors == []
        assert node.rewarm("verify").returncode == 0


def test_while_it_is_removed(snapshot: Snapshot, tmp_path: Path, prefix: Path) -> None:
    """At once, a little later, and when it is too late to matter: warm and right, or cold."""
    outcomes = []
    with Node(tmp_path / "node", prefix, store=tmp_path / "store") as node:
        for number in range(8):
            store = linked(snapshot.store, tmp_path / "store")
            made = snapshot.bundle(node.directory / f"copy-{number}")
            process, container = node.runtime.spawn("create", "copy", made)
            time.sleep(0.05 * number)
            opened = DirectoryStore(str(store))
            opened.remove(opened.list()[0])
            assert process.wait(60) == 0
            node.runtime.settle(container)
            outcome = node.outcome("copy")
            if outcome["outcome"] == "cold":
                said(outcome["reason"], "")
            outcomes.append(is_right(node, snapshot, "copy"))
            end(node, "copy")
            nothing_remains_of(node, made, "copy")
            shutil.rmtree(store)
    assert outcomes[0] == "cold" and set(outcomes) <= {"cold", "warm"}, outcomes


def test_goes_on_after_its_snapshot_is_gone(snapshot: Snapshot, tmp_path: Path, prefix: Path) -> None:
    """Restored and not yet started: nothing of the store is needed any more."""
    store = linked(snapshot.store, tmp_path / "store")
    with Node(tmp_path / "node", prefix, store=store) as node:
        container = node.runtime.create("copy", snapshot.bundle(node.directory / "copy"))
        shutil.rmtree(store)
        node.runtime.start("copy")
        goes_on_right(container, snapshot)
        end(node, "copy")
