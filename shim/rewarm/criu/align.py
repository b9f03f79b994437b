"""Cutting mappings so that CRIU finds what a child has in common with its parent.

Memory that parent and child share copy-on-write stays shared if CRIU pairs the two mappings (criu/mem.c:
prepare_cow_vmas_for): it forks the child with the parent's pages in place, and leaves those that are equal. It pairs
mappings of the very same range only, and walks the two lists in such a way that it also misses the pair that follows a
mapping which only the child has. One more mapping beside the old one, which the kernel merged with it, is enough to
lose everything. So the images get cut mappings: at each other's borders, and, where a pair would be missed, one page
after the border, so that only that page is. The kernel merges the parts again as it merged the whole.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rewarm.criu import encode, images
from rewarm.criu.vmas import Vma, is_guard

PAGE = 4096
_ROUNDS = 8


class Overlap(NamedTuple):
    """Private memory at [start, end) of both a process and its child, anonymous or of the same file."""

    parent: int
    child: int
    start: int
    end: int
    anonymous: bool


def overlaps(parents: Mapping[int, int], mappings: Mapping[int, Sequence[Vma]]) -> list[Overlap]:
    """All of a tree; `parents` is child -> parent."""
    found = []
    for child, parent in parents.items():
        ours = [vma for vma in mappings.get(parent, ()) if _is_private(vma)]
        starts = [vma.start for vma in ours]
        for vma in mappings.get(child, ()) if ours else ():
            if not _is_private(vma):
                continue
            for at in range(max(0, bisect_right(starts, vma.start) - 1), len(ours)):
                if ours[at].start >= vma.end:
                    break
                start, end = max(vma.start, ours[at].start), min(vma.end, ours[at].end)
                if start < end and _are_alike(vma, ours[at]):
                    found.append(Overlap(parent, child, start, end, vma.is_private_anonymous))
    return found


def _is_private(vma: Vma) -> bool:
    return vma.is_private_anonymous or vma.is_private_file


def _are_alike(one: Vma, other: Vma) -> bool:
    """Mappings of files are not cut, so they have to be the same as they are."""
    if one.is_private_anonymous:
        return other.is_private_anonymous
    return other.is_private_file and (one.start, one.end, one.shmid) == (other.start, other.end, other.shmid)


def cut(mappings: Mapping[int, Sequence[Vma]], shared: Sequence[Overlap]) -> dict[int, list[Vma]]:
    """The mappings cut so that CRIU pairs those of every overlap in `shared`."""
    cuts: dict[int, set[int]] = {pid: set() for pid in mappings}
    for one in shared:
        for pid in (one.parent, one.child):
            cuts[pid].update((one.start, one.end))
    for _ in range(_ROUNDS):
        _spread(cuts, shared)
        found = {pid: _pieces(vmas, sorted(cuts[pid])) for pid, vmas in mappings.items()}
        missed = list(_missed(found, shared))
        if not missed:
            break
        for one in missed:
            cuts[one.parent].add(one.start + PAGE)
    return found


def write(path: Path, vmas: Iterable[Vma]) -> None:
    """Put cut mappings in place of the whole ones in `mm-*.img`. Raises images.ImageError, OSError."""
    pieces: dict[int, list[Vma]] = {}
    whole = {vma.start for record in images.records(path) for vma in _ranges(record)}
    start = 0
    for vma in vmas:
        start = vma.start if vma.start in whole else start
        pieces.setdefault(start, []).append(vma)
    records = []
    for fields in images.raw_records(path):
        out = b""
        for number, raw, value in fields:
            if number == 14 and isinstance(value, bytes):
                message = images.decode(value, path.name)
                mine = [] if is_guard(message) else pieces[images.number(message, 1)]
                if len(mine) > 1:
                    # Of a field that is there twice the last one counts.
                    edges = (encode.integer(1, vma.start) + encode.integer(2, vma.end) for vma in mine)
                    raw = b"".join(encode.nested(14, value + edge) for edge in edges)
            out += raw
        records.append(out)
    encode.write_records(path, encode.magic_of(path), records)


class _Range(NamedTuple):
    start: int


def _ranges(record: images.Message) -> list[_Range]:
    return [_Range(images.number(message, 1)) for message in images.messages(record, 14) if not is_guard(message)]


def _spread(cuts: dict[int, set[int]], shared: Sequence[Overlap]) -> None:
    """A cut inside an overlap is one of both processes, and so on through the tree."""
    changed = True
    while changed:
        changed = False
        for one in shared:
            both = {at for pid in (one.parent, one.child) for at in cuts[pid] if one.start < at < one.end}
            for pid in (one.parent, one.child):
                if not both <= cuts[pid]:
                    cuts[pid] |= both
                    changed = True


def _pieces(vmas: Sequence[Vma], cuts: list[int]) -> list[Vma]:
    found = []
    for vma in vmas:
        inside = cuts[bisect_right(cuts, vma.start) :]
        edges = [vma.start]
        for at in inside if vma.is_private_anonymous else ():
            if at >= vma.end:
                break
            edges.append(at)
        edges.append(vma.end)
        found += [vma._replace(start=one, end=two) for one, two in itertools.pairwise(edges)]
    return found


def _missed(mappings: Mapping[int, Sequence[Vma]], shared: Sequence[Overlap]) -> Iterable[Overlap]:
    """The parts of overlaps, longer than a page, that CRIU would not pair."""
    pairs: dict[tuple[int, int], set[int]] = {}
    for one in shared:
        key = one.parent, one.child
        if key not in pairs:
            pairs[key] = _paired(mappings[one.parent], mappings[one.child])
        for vma in mappings[one.child]:
            if one.start <= vma.start < one.end and vma.end - vma.start > PAGE and vma.start not in pairs[key]:
                yield one._replace(start=vma.start, end=vma.end)


def _paired(ours: Sequence[Vma], theirs: Sequence[Vma]) -> set[int]:
    """Where CRIU pairs mappings of a parent (`ours`) and a child: both lists are walked once, and whoever is behind
    goes on until it is level with the other (the parent) or past it (the child)."""
    found: set[int] = set()
    mine = child = 0
    while mine < len(ours) and child < len(theirs):
        if (ours[mine].start, ours[mine].end) == (theirs[child].start, theirs[child].end):
            found.add(ours[mine].start)
        while child < len(theirs) and theirs[child].start <= ours[mine].start:
            child += 1
        while child < len(theirs) and mine < len(ours) and ours[mine].start < theirs[child].start:
            mine += 1
    return found
