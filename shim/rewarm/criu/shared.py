"""Shared anonymous memory and memfds: through which process's mapping each part of them can be filled.

CRIU has their content in `pagemap-shmem-ID.img`, by offset. Rewarm fills it through a mapping, so that the pages are
charged to the container: what no process has mapped writably (a sealed memfd, one that is only open) stays with CRIU.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from rewarm.criu import images
from rewarm.criu.vmas import Vma

_MEMFD = 18  # fd_types.MEMFD of images/fdinfo.proto
_NAME = re.compile(r"pagemap-shmem-(\d+)\.img\Z")


class Range(NamedTuple):
    """Offsets [start, end) of the memory are at `address` of process `pid`, in mapping `vma`."""

    start: int
    end: int
    pid: int
    vma: Vma
    address: int


def ranges(directory: Path, mappings: Mapping[int, list[Vma]]) -> Iterator[tuple[Path, list[Range]]]:
    """For each shared memory that CRIU has content of: its pagemap, and disjoint ranges that can be filled."""
    memfds = open_memfds(directory)
    mapped: dict[int, list[Range]] = {}
    for pid, vmas in mappings.items():
        for vma in vmas:
            if not vma.is_fillable or not (vma.is_shared_anonymous or vma.is_shared_memfd):
                continue
            mapped.setdefault(identity(vma, memfds), []).append(
                Range(vma.pgoff, vma.pgoff + vma.end - vma.start, pid, vma, vma.start)
            )
    for path in sorted(directory.glob("pagemap-shmem-*.img")):
        match = _NAME.search(path.name)
        if match and int(match[1]) in mapped:
            yield path, list(_disjoint(mapped[int(match[1])]))


def identity(vma: Vma, memfds: Mapping[int, int]) -> int:
    """The number of the shared memory that a mapping is of; -1 if it is none that can be told. `memfds` are those of
    `open_memfds`: two open files may be of one memfd."""
    if vma.is_shared_memfd:
        return memfds.get(vma.shmid, -1)
    return vma.shmid if vma.is_shared_anonymous else -1


def open_memfds(directory: Path) -> dict[int, int]:
    """Number of an open file -> number of the shared memory behind it, for memfds of small pages."""
    path = directory / "memfd.img"
    inodes = {
        images.number(record, 7): images.number(record, 5)
        for record in (images.records(path) if path.exists() else ())
        if 8 not in record  # hugetlb_flag
    }
    found = {}
    for record in images.records(directory / "files.img") if inodes else ():
        if images.number(record, 1) == _MEMFD:
            for file in images.messages(record, 20):
                inode = images.number(file, 5)
                if inode in inodes:
                    found[images.number(record, 2)] = inodes[inode]
    return found


def _disjoint(mapped: list[Range]) -> Iterator[Range]:
    """Every offset once, through the first mapping that has it."""
    end = 0
    for one in sorted(mapped, key=lambda one: (one.start, -one.end)):
        if one.end > end:
            start = max(one.start, end)
            yield one._replace(start=start, address=one.address + start - one.start)
            end = one.end
