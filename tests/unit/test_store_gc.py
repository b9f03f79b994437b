"""gc: what no snapshot needs goes, what a snapshot or a live capture needs stays; real processes, real kills."""

from __future__ import annotations

import fcntl
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rewarm.errors import StoreError
from rewarm.store.directory import DirectoryStore
from rewarm.store.gc import GcStats
from rewarm.store.known import KnownChunks
from rewarm.store.manifest import digest_of
from support.chunked import pack_paths, read_chunks, some, write_chunks
from support.snapshots import manifest, tmpfs, tree, write_snapshot

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}

# A capture that has shared the chunks of others, and waits.
SHARING = """
import sys, time
from rewarm.store.directory import DirectoryStore
from support.chunked import some
from support.snapshots import manifest
store = DirectoryStore(sys.argv[1])
with store.writer("default", "sharing", compression="off") as writer:
    for chunk in [*some(5), *some(2, seed=2)]:
        writer.add_chunk(chunk)
    print("ready", flush=True)
    sys.stdin.readline()
    writer.publish(manifest("sharing"))
"""


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(str(tmp_path / "store"))


@contextmanager
def sharing(store: DirectoryStore) -> Iterator[subprocess.Popen[str]]:
    child = subprocess.Popen(
        [sys.executable, "-c", SHARING, str(store.root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


def plant(store: DirectoryStore, data: bytes) -> Path:
    path = store.pack_path(digest_of(data))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def test_nothing_to_do(store: DirectoryStore) -> None:
    with pytest.raises(StoreError, match="does not exist"):
        store.gc()
    store.root.mkdir()
    assert store.gc() == GcStats(0, 0, 0)
    assert list(store.root.iterdir()) == [], "an empty directory is no store"
    write_chunks(store, some(3))
    before = tree(store.root)
    assert store.gc() == store.gc(dry_run=True) == GcStats(0, 0, 0)
    assert tree(store.root) == before


def test_what_is_left_goes(store: DirectoryStore, tmp_path: Path) -> None:
    write_chunks(store, some(3))
    write_snapshot(store, tmp_path / "w", name="other")
    before = tree(store.root)
    plant(store, b"pack of nobody")
    plant(store, b"another")
    dead = store.root / "v1" / "tmp" / "dead"
    dead.mkdir()
    (dead / "lock").write_text("")
    (dead / "chunks0").write_bytes(bytes(1000))
    seen: list[int] = []
    expected = GcStats(14 + 7 + 1000, 2, 1)
    assert store.gc(dry_run=True) == expected
    assert (dead / "chunks0").exists()
    assert store.gc(seen.append) == expected
    assert sum(seen) == expected.freed_bytes
    assert tree(store.root) == before
    assert store.gc() == GcStats(0, 0, 0)
    assert list(store.verify()) == []


def test_a_dead_captures_refs_do_not_count(store: DirectoryStore) -> None:
    orphan = plant(store, b"pack of nobody")
    dead = store.root / "v1" / "tmp" / "dead"
    dead.mkdir(parents=True)
    (dead / "lock").write_text("")
    (dead / "refs").write_text(f"{orphan.name}\n")
    assert store.gc(dry_run=True).packs == 1
    assert store.gc().packs == 1
    assert not orphan.exists()
    ref, _ = write_chunks(store, some(3))
    dead.mkdir()
    (dead / "refs").write_text("\n".join(path.name for path in store.root.glob("v1/packs/*/*")))
    store.remove(ref)
    assert list(store.root.glob("v1/packs/*/*")) == [], "nor one that has no lock at all"


def test_links_among_the_workspaces_are_not_followed(store: DirectoryStore, tmp_path: Path) -> None:
    orphan = plant(store, b"pack of nobody")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "refs").write_text(f"{orphan.name}\n")
    with (outside / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        (store.root / "v1" / "tmp").mkdir(parents=True)
        (store.root / "v1" / "tmp" / "link").symlink_to(outside)
        assert store.gc(dry_run=True).packs == 1
        assert store.gc().packs == 1
    assert (outside / "refs").exists()


def test_refs_that_cannot_be_read_stop_it(store: DirectoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    ref, first = write_chunks(store, some(5), name="first")
    with sharing(store):
        refs = next(store.root.glob("v1/tmp/*/refs"))
        real = os.open

        def broken(path: str, *arguments: object, **options: object) -> int:
            if str(path) == str(refs):
                raise OSError(5, "injected")
            return real(path, *arguments, **options)  # type: ignore[arg-type]

        with monkeypatch.context() as patched:
            patched.setattr(os, "open", broken)
            with pytest.raises(StoreError, match=r"read .*refs"):
                store.gc()
            with pytest.raises(StoreError, match=r"read .*refs"):
                store.remove(ref)
        assert all(path.exists() for path in pack_paths(store, first))


def test_a_live_captures_refs_count(store: DirectoryStore) -> None:
    ref, first = write_chunks(store, some(5), name="first")
    with sharing(store) as child:
        store.remove(ref)
        assert store.gc() == GcStats(0, 0, 0)
        assert all(path.exists() for path in pack_paths(store, first))
        _, stderr = child.communicate("\n", timeout=60)
        assert child.returncode == 0, stderr
    (left,) = store.list()
    assert read_chunks(store, store.load(left)) == [*some(5), *some(2, seed=2)]
    assert list(store.verify()) == []
    store.remove(left)
    assert tree(store.root) == set()


def test_a_capture_that_died_keeps_nothing(store: DirectoryStore) -> None:
    ref, _ = write_chunks(store, some(5), name="first")
    with sharing(store) as child:
        store.remove(ref)
        child.kill()
        child.wait()
        found = store.gc()
    assert (found.packs, found.workspaces) == (1, 1)
    assert found.freed_bytes > 7 * 64 * 1024
    assert tree(store.root) == set()


def test_a_pack_that_vanishes_before_it_is_shared_is_written_again(
    store: DirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref, _ = write_chunks(store, some(5), name="first")
    read_tables = KnownChunks._read_tables

    def removed_meanwhile(self: KnownChunks) -> dict[bytes, int]:
        found = read_tables(self)
        store.remove(ref)
        return found

    monkeypatch.setattr(KnownChunks, "_read_tables", removed_meanwhile)
    _, found = write_chunks(store, some(5), name="second")
    assert read_chunks(store, found) == some(5)
    assert list(store.verify()) == []


def test_without_working_locks_a_capture_notices_that_its_packs_went(store: DirectoryStore) -> None:
    ref, first = write_chunks(store, some(5), name="first")
    with (
        pytest.raises(StoreError, match="is missing"),
        store.writer("default", "second", compression="off") as writer,
    ):
        for chunk in some(5):
            writer.add_chunk(chunk)
        for path in pack_paths(store, first):
            path.unlink()
        writer.publish(manifest("second"))
    assert store.list() == [ref]


def test_a_manifest_that_cannot_be_read_stops_it(store: DirectoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    orphan = plant(store, b"pack of nobody")
    loop = store.root / "v1" / "snapshots" / "default" / "x"
    loop.mkdir(parents=True)
    (loop / "y.json").write_text("")

    def broken(fd: int, limit: int) -> bytes:
        raise OSError(5, "injected")

    monkeypatch.setattr("rewarm.store.sweep.read_up_to", broken)
    for dry_run in (True, False):
        with pytest.raises(StoreError, match=r"read .*y\.json"):
            store.gc(dry_run=dry_run)
    assert orphan.exists()


CAPTURES = """
import sys
from rewarm.store.directory import DirectoryStore
from support.chunked import some, write_chunks
store, name, turns = DirectoryStore(sys.argv[1]), sys.argv[2], int(sys.argv[3])
for turn in range(turns):
    ref, _ = write_chunks(store, [*some(6), *some(4, seed=turn % 3)], name=name, compression="auto")
    if turn % 2:
        store.remove(ref)
"""
COLLECTS = """
import sys
from rewarm.store.directory import DirectoryStore
store = DirectoryStore(sys.argv[1])
while True:
    store.gc()
"""


def start(script: str, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", script, *words], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)


def check(store: DirectoryStore) -> None:
    """All that is listed is whole, and after a gc there is nothing else."""
    assert list(store.verify()) == []
    store.gc()
    found = [store.load(ref) for ref in store.list()]
    named = {pack.digest for one in found for pack in one.packs} | {entry.pack for one in found for entry in one.files}
    assert {path.name for path in store.root.glob("v1/packs/*/*")} == named
    assert list((store.root / "v1" / "tmp").iterdir()) == []
    assert list(store.verify()) == []


def test_captures_removals_and_gc_at_once(store: DirectoryStore, tmp_path: Path) -> None:
    with tmpfs(tmp_path / "mount", "size=1g") as mount:
        shared = DirectoryStore(str(mount / "store"))
        write_chunks(shared, some(6), name="kept")
        collector = start(COLLECTS, str(shared.root))
        captures = [start(CAPTURES, str(shared.root), name, "8") for name in ("a", "b", "c")]
        try:
            for child in captures:
                _, stderr = child.communicate(timeout=120)
                assert child.returncode == 0, stderr
            assert collector.poll() is None, collector.communicate()
        finally:
            for child in (collector, *captures):
                child.kill()
                child.communicate()
        assert len(shared.list()) == 13
        check(shared)


FORKS = """
import os, sys
import rewarm.store.gc, rewarm.store.remove, rewarm.store.verify, rewarm.store.writer, zstandard
from rewarm.store.directory import DirectoryStore
from support.chunked import some, write_chunks
store = DirectoryStore(sys.argv[1])

def capture(name, seed):
    ref, _ = write_chunks(store, [*some(6), *some(4, seed=seed)], name=name, compression="auto")
    if seed % 2:
        store.remove(ref)

def collect():
    while True:
        store.gc()

for line in sys.stdin:
    kind, number = line.split()
    child = os.fork()
    if child == 0:
        try:
            turn = int(number)
            while True:
                # The lock of a name is held until its capture is quite dead, a moment after the kill.
                collect() if kind == "gc" else capture(f"{kind}{number}", turn % 7 + 1)
                turn += 1
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(1)
    print(child, flush=True)
"""


def test_a_hundred_kills_at_random_moments(tmp_path: Path) -> None:
    """Two captures and a gc run; one of them at a time is killed and started anew. Nothing of it shows afterwards."""
    chance = random.Random(20)
    with tmpfs(tmp_path / "mount", "size=1g") as mount:
        store = DirectoryStore(str(mount / "store"))
        kept, _ = write_chunks(store, some(6), name="kept")
        nursery = subprocess.Popen(
            [sys.executable, "-c", FORKS, str(store.root)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
        )
        assert nursery.stdin is not None and nursery.stdout is not None
        alive: dict[str, int] = {}
        try:
            for kill in range(100):
                for kind in ("a", "b", "gc"):
                    if kind not in alive:
                        nursery.stdin.write(f"{kind} {kill}\n")
                        nursery.stdin.flush()
                        alive[kind] = int(nursery.stdout.readline())
                time.sleep(chance.uniform(0, 0.1))
                kind = chance.choice(("a", "b", "gc"))
                os.kill(alive.pop(kind), signal.SIGKILL)
                if kill % 20 == 19:
                    assert kept in store.list()
            # Those that are still there come to an end with their work, however busy the machine is.
            deadline = time.monotonic() + 60
            while len(store.list()) <= 3 and time.monotonic() < deadline and ("a" in alive or "b" in alive):
                time.sleep(0.1)
        finally:
            for pid in alive.values():
                os.kill(pid, signal.SIGKILL)
            nursery.kill()
            _, stderr = nursery.communicate()
        assert stderr == "", "no capture and no gc fails because another was killed"
        check(store)
        assert kept in store.list()
        assert len(store.list()) > 3
        _, found = write_chunks(store, some(6), name="after")
        assert read_chunks(store, found) == some(6)
        check(store)
