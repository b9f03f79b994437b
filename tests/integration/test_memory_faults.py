"""Snapshots whose every digest is right and whose tables are made to do harm; memory for which there is no room."""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rewarm.criu import vmas
from rewarm.criu.vmas import Vma
from rewarm.memory.places import FORCED, MASK_BYTES, PAGE, WINDOW, Place
from rewarm.store.chunks import CHUNK, CHUNKS, RAW, ZSTD
from support import carving, faults
from support.bundle import Bundle
from support.carving import Snapshot, Tables, end, is_right, linked, mappings, nothing_remains_of, stays_cold
from support.node import Node
from support.snapshots import MIB

SYSVIPC = 1 << 10
ONE_PAGE = (1).to_bytes(MASK_BYTES, "little")


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory, prefix: Path) -> Iterator[Snapshot]:
    """Not to be changed."""
    with Node(tmp_path_factory.mktemp("captured"), prefix) as node:
        yield carving.captured(node, 12, program=carving.KINDS)


@pytest.fixture
def node(nothing_left_behind: None, snapshot: Snapshot, tmp_path: Path, prefix: Path) -> Iterator[Node]:
    with Node(tmp_path / "node", prefix, store=linked(snapshot.store, tmp_path / "store")) as one:
        yield one


# The chunk table.


def swap_digests(tables: Tables) -> None:
    first, second = tables.chunks[0].digest, tables.chunks[1].digest
    tables.chunk(0, digest=second)
    tables.chunk(1, digest=first)


def swap_chunks(tables: Tables) -> None:
    """Two chunks of unlike size, each at the other's place."""
    small = min(range(len(tables.chunks)), key=lambda number: tables.chunks[number].size)
    tables.chunks[0], tables.chunks[small] = tables.chunks[small], tables.chunks[0]


def same_pack(tables: Tables) -> tuple[int, int]:
    """Numbers of two chunks that follow each other in one pack."""
    rows = sorted(range(len(tables.chunks)), key=lambda number: (tables.chunks[number].pack, tables.chunks[number][3]))
    return next((a, b) for a, b in itertools.pairwise(rows) if tables.chunks[a].pack == tables.chunks[b].pack)


def overlap(field: str) -> Callable[[Tables], None]:
    def change(tables: Tables) -> None:
        first, second = same_pack(tables)
        value = getattr(tables.chunks[first], field) + 4096
        tables.chunk(second, **{field: value})

    return change


def first(**fields: Any) -> Callable[[Tables], None]:
    return lambda tables: tables.chunk(0, **fields)


def pack_field(**fields: int) -> Callable[[Tables], None]:
    return lambda tables: tables.document["packs"][0].update(fields)


def twice(tables: Tables) -> None:
    """The same chunk at the same place."""
    tables.chunks.append(tables.chunks[0])
    tables.places.append(tables.places[0])
    tables.document["memory"]["filled"] += tables.chunks[0].size


CHUNK_TABLES: dict[str, tuple[Callable[[Tables], object], str]] = {
    "overlap": (overlap("offset"), "field"),
    "raw overlap": (overlap("raw_offset"), "field raw_offset"),
    "unaligned offset": (first(offset=4097), "field offset is 4097"),
    "unaligned raw offset": (first(raw_offset=1), "field raw_offset is 1"),
    "unaligned size": (first(size=4097, stored=4097), "field size is 4097"),
    "no size": (first(size=0, stored=0), "field size is 0"),
    "great size": (first(size=2 * CHUNK, stored=2 * CHUNK), f"field size is {2 * CHUNK}"),
    "2^32-1 bytes": (first(size=2**32 - 1, stored=2**32 - 1), "field size"),
    "far offset": (first(offset=1 << 30), "field offset"),
    "2^63": (first(offset=1 << 63), "field offset"),
    "2^64": (first(offset=2**64 - 4096), "field offset"),
    "raw 2^63": (first(raw_offset=1 << 63), "field raw_offset"),
    "pack": (first(pack=2**32 - 1), "field pack"),
    "encoding": (first(encoding=7), "field encoding is 7"),
    "zstd that is raw": (first(encoding=ZSTD, stored=CHUNK // 2), "chunk"),
    "digest": (first(digest=bytes(32)), "chunk 0 in pack"),
    "digests swapped": (swap_digests, "in pack"),
    "sizes that do not match the masks": (swap_chunks, "place"),
    "cut": (lambda tables: tables.data.update({CHUNKS: b"x" * 63}), "not a multiple of 64"),
    "empty": (lambda tables: tables.chunks.clear(), "it has no chunks"),
    "a chunk more": (lambda tables: tables.chunks.append(tables.chunks[0]), "memory/places"),
    "a chunk twice": (twice, "overlap"),
    "pack size": (pack_field(size=4096), "field packs[0].size"),
    "pack size 2^63": (pack_field(size=1 << 63), "field packs[0].size"),
    "raw size 2^63": (pack_field(raw_size=1 << 63), ""),
    "another pack": (lambda tables: tables.document["packs"][0].update(digest="ab" * 32), "pack " + "ab" * 32),
}


@pytest.mark.parametrize("case", CHUNK_TABLES)
def test_chunk_table(node: Node, snapshot: Snapshot, case: str) -> None:
    change, said = CHUNK_TABLES[case]
    carving.rewritten(node.store, change)
    made = snapshot.bundle(node.directory / "copy")
    if case == "raw size 2^63":
        # Too large for the cache that this node does not have; it says nothing about what is read.
        outcome_is_right(node, snapshot, made)
    else:
        stays_cold(node, made, said)


def outcome_is_right(node: Node, snapshot: Snapshot, made: Bundle) -> str:
    """Warm or cold, as long as it holds the right memory."""
    node.runtime.create("copy", made)
    outcome = is_right(node, snapshot, "copy")
    end(node, "copy")
    nothing_remains_of(node, made, "copy")
    return outcome


# The places.


def place(**fields: Any) -> Callable[[Tables], None]:
    return lambda tables: tables.place(0, **fields)


def drop_last(tables: Tables) -> None:
    tables.chunks.pop()
    tables.places.pop()


PLACE_TABLES: dict[str, tuple[Callable[[Tables], object], str]] = {
    "no such process": (place(pid=4711), "process 4711, which has no memory"),
    "process 0": (place(pid=0), "process 0"),
    "process 2^32-1": (place(pid=2**32 - 1), "which has no memory"),
    "unaligned": (lambda tables: tables.place(0, base=tables.places[0].base + 1), "unaligned"),
    "2^63": (place(base=1 << 63), "beyond the address space"),
    "2^64": (place(base=2**64 - WINDOW), "beyond the address space"),
    "end of the addresses": (place(base=(1 << 47) - PAGE), "beyond the address space"),
    "null": (place(base=0), "no memory that can be filled"),
    "a hole between mappings": (place(base=1 << 46), "no memory that can be filled"),
    "two over each other": (lambda tables: tables.place(0, base=tables.places[1].base + PAGE), "overlap"),
    "unknown flag": (place(flags=2), "unknown flags"),
    "forced on what can be written": (place(flags=FORCED), "no memory that can be filled"),
    "a page more in the mask": (
        lambda tables: tables.place(0, mask=(tables.places[0].bits ^ 1).to_bytes(MASK_BYTES, "little")),
        "pages, its chunk",
    ),
    "no page": (place(mask=bytes(MASK_BYTES)), "has 0 pages"),
    "a place less": (lambda tables: tables.places.pop(), "memory/places"),
    "a place more": (lambda tables: tables.places.append(tables.places[0]), "memory/places"),
    "carved memory without a place": (drop_last, "its manifest says"),
    "less filled than there is": (lambda tables: tables.document["memory"].update(filled=4096), "its manifest says"),
    "nothing filled": (lambda tables: tables.document["memory"].update(filled=0), "its manifest says"),
}


@pytest.mark.parametrize("case", PLACE_TABLES)
def test_place_table(node: Node, snapshot: Snapshot, case: str) -> None:
    change, said = PLACE_TABLES[case]
    carving.rewritten(node.store, change)
    stays_cold(node, snapshot.bundle(node.directory / "copy"), "default/counter", said)


KINDS: dict[str, tuple[Callable[[Vma], bool], tuple[int, ...]]] = {
    "shared anonymous": (lambda vma: vma.is_shared_anonymous or vma.is_shared_memfd, (FORCED,)),
    "System V": (lambda vma: bool(vma.status & SYSVIPC), (0, FORCED)),
    "hole": (lambda vma: vma.is_private_anonymous and not vma.prot, (0,)),
    "read-only": (lambda vma: vma.is_private_anonymous and vma.prot == 1, (0,)),
    "program": (lambda vma: vma.is_private_file and vma.prot == 5, (0,)),
    "shared file": (lambda vma: vma.status == vmas.REGULAR | vmas.FILE_SHARED, (0, FORCED)),
    "stack": (lambda vma: bool(vma.flags & 0x100), (0, FORCED)),
    "vdso": (lambda vma: bool(vma.status & 1 << 3), (0, FORCED)),
    "vvar": (lambda vma: bool(vma.status & 1 << 12), (0, FORCED)),
}


@pytest.mark.parametrize(("kind", "flags"), [(kind, flags) for kind, (_, every) in KINDS.items() for flags in every])
def test_place_in_another_kind_of_memory(node: Node, snapshot: Snapshot, tmp_path: Path, kind: str, flags: int) -> None:
    """One page of the container's own is to go where only CRIU may put something, or in a way that is not its."""
    target = next(vma for vma in mappings(node.store, tmp_path / "mm") if KINDS[kind][0](vma))

    def change(tables: Tables) -> None:
        tables.places[:] = [Place(1, flags, target.start, ONE_PAGE)]
        tables.chunks[:] = [tables.chunks[0]._replace(encoding=RAW, size=PAGE, stored=PAGE)]
        tables.document["memory"]["filled"] = PAGE

    carving.rewritten(node.store, change)
    stays_cold(
        node, snapshot.bundle(node.directory / "copy"), "default/counter", f"{target.start:#x}", "that can be filled"
    )


def test_place_over_the_end_of_its_mapping(node: Node, snapshot: Snapshot, tmp_path: Path) -> None:
    found = mappings(node.store, tmp_path / "mm")
    last = max((vma for vma in found if vma.is_private_anonymous and vma.prot == 3), key=lambda vma: vma.end)

    def change(tables: Tables) -> None:
        number = next(n for n, one in enumerate(tables.places) if one.pid == 1 and one.bits.bit_length() > 1)
        tables.places[:], tables.chunks[:] = [tables.places[number]], [tables.chunks[number]]
        tables.place(0, base=last.end - PAGE)
        tables.document["memory"]["filled"] = tables.chunks[0].size

    carving.rewritten(node.store, change)
    stays_cold(node, snapshot.bundle(node.directory / "copy"), "default/counter", "that can be filled")


# Huge pages.


@pytest.mark.parametrize(
    "huge",
    [
        {"pid": 1, "start": 0, "end": 1 << 63, "extra": 1 << 62},
        {"pid": 1, "start": (1 << 63) - 4096, "end": 1 << 63, "extra": 0},
        {"pid": 4711, "start": 0, "end": 4096, "extra": 0},
        {"pid": 0, "start": 0, "end": 4096, "extra": 0},
        {"pid": 1, "start": 4096, "end": 0, "extra": 0},
        {"pid": 1, "start": 1, "end": 2, "extra": 0},
        {"pid": 1, "start": 0, "end": 1 << 70, "extra": -1},
        "System V",
        "vdso",
        "stack",
    ],
)
def test_huge(node: Node, snapshot: Snapshot, tmp_path: Path, huge: dict[str, int] | str) -> None:
    """Refused, or without effect: what is in the memory does not depend on it."""
    if isinstance(huge, str):
        target = next(vma for vma in mappings(node.store, tmp_path / "mm") if KINDS[huge][0](vma))
        huge = {"pid": 1, "start": target.start, "end": target.end, "extra": 0}
    carving.rewritten(node.store, lambda tables: tables.document["memory"].update(huge=[huge] * 3))
    outcome_is_right(node, snapshot, snapshot.bundle(node.directory / "copy"))


def test_ten_thousand_processes(node: Node, snapshot: Snapshot) -> None:
    """One place for each of many processes that are not there, and a huge mapping for each: refused at once."""

    def change(tables: Tables) -> None:
        tables.chunks[:] = [tables.chunks[0]] * 10000
        tables.places[:] = [tables.places[0]._replace(pid=number) for number in range(1, 10001)]
        tables.document["memory"].update(
            filled=10000 * tables.chunks[0].size,
            huge=[{"pid": pid, "start": 0, "end": 1 << 47, "extra": 1 << 40} for pid in range(1, 10001)],
        )

    carving.rewritten(node.store, change)
    began = time.monotonic()
    stays_cold(node, snapshot.bundle(node.directory / "copy"), "which has no memory")
    assert time.monotonic() - began < 10


# Room.


def test_limit_below_what_the_snapshot_needs(tmp_path: Path, prefix: Path, nothing_left_behind: None) -> None:
    """The kernel ends the process in the middle of the fill, or before: a cold start, which has the limit to itself."""
    with Node(tmp_path / "source", prefix) as source:
        snapshot = carving.captured(source, 64)
        shutil.copytree(source.store, tmp_path / "store")
    with Node(tmp_path / "node", prefix, store=tmp_path / "store") as node:
        for limit in (8, 24, 48, 64):
            made = limited(snapshot, node.directory / f"copy-{limit}", limit * MIB)
            before = faults.Before(made)
            container = node.runtime.create("copy", made)
            assert node.outcome("copy")["outcome"] == "cold", limit
            assert node.outcome("copy")["reason"].isprintable()
            before.check_files(mount_points=True)
            node.runtime.start("copy")
            if limit > 8:
                assert container.stdout.wait_text("\n2 ").startswith("ready\n1 ")
            end(node, "copy")
            nothing_remains_of(node, made, "copy")
        made = limited(snapshot, node.directory / "enough", 160 * MIB)
        node.runtime.create("copy", made)
        assert is_right(node, snapshot, "copy") == "warm"
        end(node, "copy")


def limited(snapshot: Snapshot, directory: Path, limit: int) -> Bundle:
    """With less memory to hold: the program starts cold below the limit too."""
    made = Snapshot(snapshot.store, snapshot.hashes, {**snapshot.env, "MIB": "2"}, snapshot.args).bundle(directory)
    made.spec["linux"].setdefault("resources", {})["memory"] = {"limit": limit}
    made.write()
    return made
