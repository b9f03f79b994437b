"""CRIU's images of memory, made by hand: processes with mappings and pages, written as CRIU writes them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from support.criu_images import field as encoded
from support.criu_images import image

PAGE = 4096
PRIVATE, SHARED, ANONYMOUS, GROWSDOWN, LOCKED, NORESERVE, HUGETLB = 2, 1, 0x20, 0x100, 0x2000, 0x4000, 0x40000
READ, WRITE = 1, 2
REGULAR, FILE_PRIVATE, FILE_SHARED, ANON_SHARED, ANON_PRIVATE, MEMFD = 1, 64, 128, 256, 512, 1 << 14
PRESENT, PARENT, LAZY = 4, 1, 2


@dataclass(frozen=True)
class Area:
    """A mapping of `pages` pages from `start`; kinds as in images/vma.proto."""

    start: int
    pages: int
    prot: int = READ | WRITE
    flags: int = PRIVATE | ANONYMOUS
    status: int = REGULAR | ANON_PRIVATE
    shmid: int = 0
    pgoff: int = 0
    madv: int = 0

    @property
    def end(self) -> int:
        return self.start + self.pages * PAGE


@dataclass
class Process:
    """`content` is page address -> 4096 bytes of the pages that are there; `missing` are pages in a parent's images."""

    pid: int
    parent: int
    areas: list[Area]
    content: dict[int, bytes]
    missing: set[int] = field(default_factory=set)
    pointer: int = 0
    rseq: int = 0
    stack: tuple[int, int] = (0, 0)


def write(
    directory: Path,
    processes: Sequence[Process],
    shared: Mapping[int, Mapping[int, bytes]] | None = None,
    memfds: Mapping[int, int] | None = None,
    longest: int = 1 << 30,
) -> None:
    """All images. `shared` is shmid -> offset -> page; `memfds` is open file -> shmid. Runs of pages are cut into
    entries of `longest` pages."""
    ids = iter(range(1, 1000))
    tree = []
    for process in processes:
        tree.append(_numbers({1: process.pid, 2: process.parent, 3: process.pid, 4: process.pid, 5: process.pid}))
        write_mm(directory / f"mm-{process.pid}.img", process.areas)
        registers = _numbers({20: process.pointer})
        info = _numbers({1: 0}) + encoded(2, registers)
        thread = encoded(15, _numbers({1: process.rseq, 2: 32, 3: 1})) if process.rseq else b""
        if process.stack[1]:
            thread += encoded(7, _numbers({1: process.stack[0], 2: process.stack[1], 3: 0}))
        (directory / f"core-{process.pid}.img").write_bytes(image(encoded(2, info) + encoded(5, thread)))
        write_pagemap(directory, f"{process.pid}", next(ids), process.content, process.missing, longest)
    (directory / "pstree.img").write_bytes(image(*tree))
    for shmid, pages in (shared or {}).items():
        write_pagemap(directory, f"shmem-{shmid}", next(ids), pages, set(), longest)
    files, inodes = [], []
    for number, (file, shmid) in enumerate((memfds or {}).items(), start=1):
        files.append(_numbers({1: 18, 2: file}) + encoded(20, _numbers({1: file, 2: 2, 3: 0, 5: number})))
        inodes.append(encoded(1, b"name") + _numbers({2: 0, 3: 0, 4: 1 << 30, 5: shmid, 6: 0, 7: number}))
    (directory / "files.img").write_bytes(image(*files))
    if inodes:
        (directory / "memfd.img").write_bytes(image(*inodes))


def write_mm(path: Path, areas: Sequence[Area]) -> None:
    mm = _numbers(dict.fromkeys(range(1, 13), 0))
    for area in areas:
        vma = _numbers({1: area.start, 2: area.end, 3: area.pgoff, 4: area.shmid, 5: area.prot, 6: area.flags})
        vma += _numbers({7: area.status, 8: 1} | ({9: area.madv} if area.madv else {}))
        mm += encoded(14, vma)
    path.write_bytes(image(mm + _numbers({15: 1})))


def write_pagemap(
    directory: Path, name: str, pages_id: int, content: Mapping[int, bytes], missing: set[int], longest: int
) -> None:
    """`pagemap-NAME.img` and its pages image."""
    entries: list[tuple[int, int, bool]] = []
    for address in sorted(set(content) | missing):
        gone = address in missing
        last = entries[-1] if entries else (0, 0, False)
        if entries and last[0] + last[1] * PAGE == address and last[2] == gone and last[1] < longest:
            entries[-1] = (last[0], last[1] + 1, gone)
        else:
            entries.append((address, 1, gone))
    records = [_numbers({1: pages_id})]
    for start, pages, gone in entries:
        flags = PARENT if gone else PRESENT
        records.append(_numbers({1: start, 2: pages, 4: flags, 5: pages}))
    (directory / f"pagemap-{name}.img").write_bytes(image(*records))
    data = b"".join(content[address] for address in sorted(content))
    (directory / f"pages-{pages_id}.img").write_bytes(data)


def read_pagemap(directory: Path, name: str) -> tuple[dict[int, bytes], set[int]]:
    """The pages, and those said to be in a parent's images, as CRIU reads them (criu/pagemap.c)."""
    from rewarm.criu import images

    records = list(images.records(directory / f"pagemap-{name}.img"))
    content: dict[int, bytes] = {}
    missing: set[int] = set()
    with (directory / f"pages-{images.number(records[0], 1)}.img").open("rb") as data:
        for record in records[1:]:
            start, pages, flags = images.number(record, 1), images.number(record, 5), images.number(record, 4)
            for address in range(start, start + pages * PAGE, PAGE):
                if flags & PARENT:
                    missing.add(address)
                elif flags & PRESENT:
                    content[address] = data.read(PAGE)
                    assert len(content[address]) == PAGE, "the pages image is short"
        assert data.read(1) == b"", "the pages image is long"
    return content, missing


def page(seed: int) -> bytes:
    """Zeros for seed 0, else one of many different pages."""
    return bytes(PAGE) if seed == 0 else (seed.to_bytes(8, "little") + os.urandom(0)).ljust(8, b"\0") * (PAGE // 8)


def _numbers(values: Mapping[int, int]) -> bytes:
    return b"".join(encoded(number, value) for number, value in values.items())
