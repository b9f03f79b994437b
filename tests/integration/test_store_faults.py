"""Every file of a snapshot, damaged in every way, and changed under a running restore; a store that is full."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from rewarm.store.directory import DirectoryStore
from support import carving, counter, faults
from support.carving import Snapshot, is_right, linked, stays_cold, works
from support.node import Node
from support.outcomes import said
from support.proc import command, wait_for
from support.share import Share
from support.snapshots import MIB, tmpfs, tree

TEN_GB = 10 * 10**9


class Two(NamedTuple):
    """A snapshot, and another of the same program with other memory. Neither is to be changed."""

    one: Snapshot
    other: Snapshot


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, prefix: Path) -> Iterator[Two]:
    with (
        Node(tmp_path_factory.mktemp("one"), prefix) as one,
        Node(tmp_path_factory.mktemp("other"), prefix) as other,
    ):
        yield Two(*(carving.captured(node, 12, diff_mib=2, program=carving.KINDS) for node in (one, other)))


@pytest.fixture(scope="module")
def vast(tmp_path_factory: pytest.TempPathFactory, prefix: Path) -> Iterator[Snapshot]:
    """With a large file."""
    with Node(tmp_path_factory.mktemp("vast"), prefix) as node:
        yield carving.captured(node, 4, diff_mib=65)


@pytest.fixture
def node(nothing_left_behind: None, two: Two, tmp_path: Path, prefix: Path) -> Iterator[Node]:
    """A node with a store of hard links: files are to be replaced, not changed."""
    with Node(tmp_path / "node", prefix, store=linked(two.one.store, tmp_path / "store")) as one:
        yield one


def manifest(store: Path) -> Path:
    (path,) = store.glob("v1/snapshots/default/counter/*.json")
    return path


def pack_of(name: str) -> Callable[[Path], Path]:
    return lambda store: faults.entry(store, name)[1]


def sysv(store: Path) -> Path:
    """Pages of memory that are not carved, in a pack of their own."""
    opened, _, found = faults.only(store)
    (entry,) = (e for e in found.files if e.whole_pack and e.name.startswith("checkpoint/pages-"))
    return opened.pack_path(entry.pack)


KINDS: dict[str, Callable[[Path], Path]] = {
    "manifest": manifest,
    "shared pack": pack_of("checkpoint/core-1.img"),
    "first chunks": lambda store: carving.packs(store)[0],
    "last chunks": lambda store: carving.packs(store)[-1],
    "pages": sysv,
    "rootfs diff": pack_of("rootfs-diff.tar"),
}


def damage(path: Path, how: str, another: Path) -> None:
    """Put something else in the place of a file."""
    data = path.read_bytes()
    path.unlink()
    if how == "flipped":
        middle = len(data) // 2
        path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    elif how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "swapped":
        path.write_bytes(another.read_bytes())
    elif how == "zeros":
        path.touch()
        os.truncate(path, TEN_GB)


WAYS = ("flipped", "truncated", "missing", "swapped", "zeros")


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_file(node: Node, two: Two, kind: str, how: str) -> None:
    path = KINDS[kind](node.store)
    damage(path, how, KINDS[kind](two.other.store))
    named = ["default/counter"] if kind == "manifest" else [path.name, "capture it again"]
    stays_cold(node, two.one.bundle(node.directory / "copy"), *named)


@pytest.mark.parametrize("how", WAYS)
def test_large_file(vast: Snapshot, tmp_path: Path, prefix: Path, how: str) -> None:
    with Node(tmp_path / "node", prefix, store=linked(vast.store, tmp_path / "store")) as node:
        path = pack_of("rootfs-diff.tar")(node.store)
        another = tmp_path / "another"
        another.write_bytes(os.urandom(path.stat().st_size))
        damage(path, how, another)
        stays_cold(node, vast.bundle(node.directory / "copy"), path.name, "capture it again")


@pytest.mark.parametrize("how", ["flipped", "truncated", "missing", "swapped", "zeros"])
def test_each_small_file(node: Node, two: Two, how: str) -> None:
    """Each file in the shared pack in turn: tables, images, whatever there is."""
    pack = KINDS["shared pack"](node.store)
    whole = pack.read_bytes()
    _, _, found = faults.only(node.store)
    entries = [entry for entry in found.files if entry.pack == pack.name and entry.size]
    names = {entry.name for entry in entries}
    assert {"memory/chunks", "memory/places", "checkpoint/mm-1.img", "checkpoint/pagemap-1.img"} <= names
    made = two.one.bundle(node.directory / "copy")
    for number, entry in enumerate(entries):
        at = (0, entry.size // 2, entry.size - 1)[number % 3]
        data = whole[entry.offset : entry.offset + entry.size]
        if how == "flipped":
            data = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        elif how == "zeros":
            data = bytes(entry.size)
        elif how == "swapped":
            data = other_bytes(two.other.store, entry.name)
        # Cut short or left out, what follows moves up: as a writer that forgets would have it.
        data = {"truncated": data[:-1], "missing": b""}.get(how, data)
        pack.unlink()
        pack.write_bytes(whole[: entry.offset] + data + whole[entry.offset + entry.size :])
        stays_cold(node, made, "pack" if len(data) != entry.size else entry.name, "capture it again")


def other_bytes(store: Path, name: str) -> bytes:
    """The file of that name, or of its kind where names have numbers, in another snapshot; changed at its end, since it
    may be the same there."""
    opened, _, found = faults.only(store)
    kind = re.sub(r"[0-9]+\.img$", "", name)
    same = sorted(
        (one.name for one in found.files if one.name.startswith(kind) and one.size), key=lambda one: one != name
    )
    data = opened.read_file(found, same[0]) if same else b"x"
    return data[:-1] + bytes([data[-1] ^ 1])


def test_packs_of_one_snapshot_swapped(node: Node, two: Two) -> None:
    first, second, *_ = carving.packs(node.store)
    first.rename(first.with_suffix(".old"))
    second.rename(first)
    first.with_suffix(".old").rename(second)
    stays_cold(node, two.one.bundle(node.directory / "copy"), "pack", "capture it again")


def test_undamaged(node: Node, two: Two) -> None:
    """So that what is tested here fails for its own reason."""
    works(node, two.one)


# Packs that change while they are read: from a slow share, from behind which they are changed.


def zeros_behind(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(bytes(path.stat().st_size - file.tell()))


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x" * MIB)


@pytest.mark.parametrize(
    ("change", "outcomes"),
    [
        (lambda path: os.truncate(path, 4096), {"cold"}),
        (zeros_behind, {"cold"}),
        (Path.unlink, {"cold", "warm"}),
        # What is behind the chunks is never read; a pack that was not open yet has the wrong size.
        (grow, {"cold", "warm"}),
    ],
    ids=["shrinks", "changes", "vanishes", "grows"],
)
def test_pack_changes(
    two: Two, tmp_path: Path, prefix: Path, change: Callable[[Path], None], outcomes: set[str]
) -> None:
    store = faults.copied(two.one.store, tmp_path / "store")
    found = carving.packs(store)
    with (
        Share(store, tmp_path / "share", rate=16 * MIB) as share,
        Node(tmp_path / "node", prefix, store=share.target, cache="off") as node,
    ):
        made = two.one.bundle(node.directory / "copy")
        before = faults.Before(made)
        process, container = node.runtime.spawn("create", "copy", made)
        wait_for("some bytes", lambda: share.read_so_far() > 8 * MIB, interval=0.001)
        for path in found:
            path.chmod(0o600)
            change(path)
        assert process.wait(30) == 0
        node.runtime.settle(container)
        outcome = node.outcome("copy")
        if outcome["outcome"] == "cold":
            said(outcome["reason"], "pack", "capture it again")
            before.check_files(mount_points=True)
        assert is_right(node, two.one, "copy") in outcomes, outcome
        carving.end(node, "copy")
        carving.nothing_remains_of(node, made, "copy")


@pytest.mark.parametrize("how", ["short", "gone", "changed"])
def test_file_changes_when_criu_begins(vast: Snapshot, tmp_path: Path, prefix: Path, how: str) -> None:
    """What CRIU and its hook read was copied and verified before: the store has no say any more."""
    store = faults.copied(vast.store, tmp_path / "store")
    path = pack_of("rootfs-diff.tar")(store)
    do = {"short": f"truncate -s 8M {path}", "gone": f"rm -f {path}", "changed": f"printf x >>{path}"}[how]
    with Node(tmp_path / "node", prefix, store=store) as node:
        node.configure(criu=str(faults.criu(node, f'{do}\nexec $REAL "$@"')))
        works(node, vast)


# A store that is full.


@pytest.mark.parametrize(
    ("compression", "share"), [("off", 0.05), ("off", 0.5), ("off", 0.9), ("off", 0.98), ("zstd", 0.5)]
)
def test_store_full(two: Two, tmp_path: Path, prefix: Path, compression: str, share: float) -> None:
    """At the first bytes, in the middle of the memory, at the last files. What was there stays as it was."""
    root = tmp_path / "store"
    with Node(tmp_path / "node", prefix, store=root) as node, tmpfs(root, "size=512m,mode=700"):
        # Whether compression pays is measured, and differs from one capture to the next: so would what is needed.
        node.configure(compression=compression)
        faults_store = DirectoryStore(str(root))
        source = counter.run(node.runtime, "source", two.one.bundle(node.directory / "source"))
        node.rewarm("capture", "source", "--name", "trial")
        needed = used(root)
        faults_store.remove(faults_store.list()[0])
        command("cp", "-a", f"{two.other.store}/.", root)
        before, held = tree(root), used(root)
        command("mount", "-o", f"remount,size={held + int(share * needed) // 4096 * 4096}", root)
        done = node.rewarm("capture", "source", "--name", "more", check=False)
        assert done.returncode == 1, done
        said(done.stderr.strip().splitlines()[-1], "no space is left", str(root), "free space there")
        assert tree(root) == before
        assert node.rewarm("verify").returncode == 0
        assert list((node.directory / "work").iterdir()) == []
        seen = counter.numbers(source)[-1]
        source.stdout.wait_text(f"\n{seen + 3} ")
        assert len(counter.hashes(source)) == 1
        command("mount", "-o", "remount,size=512m", root)
        node.rewarm("capture", "source", "--name", "more")
        assert {ref.name for ref in faults_store.list()} == {"counter", "more"}
        node.runtime.stop("source")


def used(root: Path) -> int:
    space = os.statvfs(root)
    return (space.f_blocks - space.f_bfree) * space.f_frsize


def test_gc_of_a_full_store(two: Two, tmp_path: Path, prefix: Path) -> None:
    """Removing needs no room."""
    root = tmp_path / "store"
    with Node(tmp_path / "node", prefix, store=root) as node, tmpfs(root, "size=512m,mode=700"):
        command("cp", "-a", f"{two.one.store}/.", root)
        manifest(root).unlink()
        command("mount", "-o", f"remount,size={used(root)}", root)
        began = time.monotonic()
        done = subprocess.run([node.prefix / "bin" / "rewarm", "gc"], env={**os.environ, **node.env}, check=False)
        assert done.returncode == 0 and time.monotonic() - began < 20
        assert [path for path in tree(root) if path.startswith("v1/packs")] == []
