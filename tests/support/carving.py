"""Snapshots with carved memory for tests that damage them: made by a real capture, looked into, rewritten."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blake3 import blake3

from rewarm.criu import vmas
from rewarm.criu.vmas import Vma
from rewarm.memory.places import PLACES, Place
from rewarm.memory.places import decode as decode_places
from rewarm.memory.places import encode as encode_places
from rewarm.store import chunks
from rewarm.store.chunks import CHUNKS, Chunk
from support import counter, faults
from support.bundle import Bundle
from support.node import Node
from support.outcomes import annotate, nothing_remains, said
from support.runtime import Container

# Beside the counter's memory: what may be filled only as what it is, or not at all.
KINDS = """
import ctypes, mmap, os
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = libc.shmat.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
libc.shmat.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
SIZE = 1 << 20
shared = mmap.mmap(-1, SIZE); shared.write(os.urandom(SIZE))
sysv = libc.shmat(libc.shmget(0, SIZE, 0o1600), None, 0)
ctypes.memmove(sysv, os.urandom(SIZE), SIZE)
hole = libc.mmap(None, SIZE, 0, 0x22, -1, 0)
fixed = libc.mmap(None, SIZE, 3, 0x22, -1, 0)
ctypes.memmove(fixed, os.urandom(SIZE), SIZE)
libc.mprotect(fixed, SIZE, 1)
file = os.open("/var/mapped", os.O_RDWR | os.O_CREAT)
os.truncate(file, SIZE)
mapped = libc.mmap(None, SIZE, 3, 1, file, 0)
"""


@dataclass(frozen=True)
class Snapshot:
    """A store with one snapshot named `counter`, the digests of its memory, and what its container is made with."""

    store: Path
    hashes: set[str]
    env: dict[str, str]
    args: list[str] = field(default_factory=lambda: ["python3", "-c", counter.PROGRAM])

    def bundle(self, directory: Path, **annotations: str) -> Bundle:
        """A bundle that the snapshot fits."""
        found = {"snapshot": "counter", **{key.replace("_", "-"): value for key, value in annotations.items()}}
        named = {f"rewarm.dev/{key}": value for key, value in found.items()}
        return counter.bundle(directory, named, env=self.env, args=self.args)


def captured(node: Node, mib: int, *, diff_mib: int = 0, program: str = "") -> Snapshot:
    """Capture a counter with `mib` MiB of memory and `diff_mib` MiB of changes in its rootfs, and stop it; `program`
    runs before the counter's own."""
    made = Snapshot(
        node.store, set(), {"PYTHONHASHSEED": "0", "MIB": str(mib)}, ["python3", "-c", program + counter.PROGRAM]
    )
    bundle = made.bundle(node.directory / "source")
    if diff_mib:
        (bundle.rootfs / "var/large").write_bytes(os.urandom(diff_mib << 20))
    source = counter.run(node.runtime, "source", bundle)
    node.rewarm("capture", "source", "--name", "counter")
    made.hashes.update(counter.hashes(source))
    assert len(made.hashes) == 1
    node.runtime.stop("source")
    return made


def linked(store: Path, target: Path) -> Path:
    """A copy of a store of hard links: for who replaces files and changes none in place."""
    shutil.copytree(store, target, copy_function=os.link)
    return target


def packs(store: Path) -> list[Path]:
    """The packs of chunks of the one snapshot, as its manifest lists them."""
    opened, _, manifest = faults.only(store)
    return [opened.pack_path(pack.digest) for pack in manifest.packs]


def stays_cold(node: Node, made: Bundle, *texts: str, name: str = "copy") -> None:
    """The create gives a cold container that says all of `texts`; nothing of the snapshot ran, and nothing remains."""
    annotate(made, "cold-start")
    before = faults.Before(made)
    container = node.runtime.create(name, made)
    outcome = node.outcome(name)
    assert outcome["outcome"] == "cold", outcome
    said(outcome["reason"], *texts)
    before.check_files(mount_points=True)
    assert container.stdout.text() == ""
    assert node.runtime.state(name)["status"] == "created"
    end(node, name)
    nothing_remains(node, made)


def is_right(node: Node, snapshot: Snapshot, name: str) -> str:
    """Start a container and see that what it holds is its own: the snapshot's if it is warm. Returns its outcome."""
    container = node.runtime.containers[name]
    outcome = str(node.outcome(name)["outcome"])
    node.runtime.start(name)
    if outcome == "warm":
        goes_on_right(container, snapshot)
    else:
        assert container.stdout.wait_text("\n2 ").startswith("ready\n1 ")
    return outcome


def goes_on_right(container: Container, snapshot: Snapshot) -> None:
    """AssertionError unless a restored counter counts, and its memory is that of the snapshot."""
    container.stdout.wait_text("\n")
    assert counter.numbers(container)[0] > 2, container.stdout.text()
    assert counter.hashes(container) == snapshot.hashes


def works(node: Node, snapshot: Snapshot, name: str = "copy") -> None:
    """A restore as it should be: warm, right, and nothing remains."""
    made = snapshot.bundle(node.directory / name)
    node.runtime.create(name, made)
    assert node.outcome(name)["outcome"] == "warm", node.outcome(name)
    is_right(node, snapshot, name)
    end(node, name)
    nothing_remains_of(node, made, name)


def end(node: Node, name: str) -> None:
    """Kill, reap and delete."""
    node.runtime.kill(name, "KILL")
    node.runtime.wait_stopped(name)
    node.runtime.delete(name)


def nothing_remains_of(node: Node, made: Bundle, name: str) -> None:
    left = faults.remains(node, name, made)
    assert left == [], left


@dataclass
class Tables:
    """What a hostile snapshot is made of; to be changed in place. `data` overrides a file's bytes."""

    document: dict[str, Any]
    chunks: list[Chunk]
    places: list[Place]
    data: dict[str, bytes]

    def chunk(self, number: int, **fields: Any) -> None:
        self.chunks[number] = self.chunks[number]._replace(**fields)

    def place(self, number: int, **fields: Any) -> None:
        self.places[number] = self.places[number]._replace(**fields)


def mappings(store: Path, scratch: Path) -> list[Vma]:
    """The mappings of the one snapshot's process 1, by way of the file `scratch`."""
    opened, _, manifest = faults.only(store)
    scratch.write_bytes(opened.read_file(manifest, "checkpoint/mm-1.img"))
    return vmas.load(scratch)


def rewritten(store: Path, change: Callable[[Tables], object]) -> None:
    """Replace the one snapshot by another, with every digest right, whose tables `change` has altered."""
    opened, _, manifest = faults.only(store)
    table = chunks.decode(opened.read_file(manifest, CHUNKS), manifest.packs, "snapshot")
    places = decode_places(opened.read_file(manifest, PLACES), [chunk.size for chunk in table])

    def rewrite(document: dict[str, Any]) -> None:
        tables = Tables(document, table, places, {})
        change(tables)
        new = {CHUNKS: chunks.encode(tables.chunks), PLACES: encode_places(tables.places), **tables.data}
        for entry in document["files"]:
            # Each in a pack of its own: what lies behind it in a shared one would have no place any more.
            known = manifest.file(entry["name"])
            assert known is not None
            data = new.get(entry["name"])
            if data is None:
                if known.whole_pack:
                    continue
                data = opened.pack_path(known.pack).read_bytes()[known.offset : known.offset + known.size]
            digest = blake3(data).hexdigest()
            path = opened.pack_path(digest)
            path.parent.mkdir(exist_ok=True)
            if not path.exists():
                path.write_bytes(data)
            entry.update(digest=digest, pack=digest, offset=0, size=len(data))

    faults.rewritten(store, rewrite)
