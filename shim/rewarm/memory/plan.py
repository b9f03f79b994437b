"""What a restore is going to fill, checked before it does: places against CRIU's images, which say what is whose."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rewarm.criu import density, images, vmas
from rewarm.criu.vmas import Vma
from rewarm.memory.places import Place

_THP = "/sys/kernel/mm/transparent_hugepage"
_ROOM = 0.95
"""Share of the memory limit above which a container gets no memory that it did not have."""


class Unfounded(ValueError):
    """A place is no memory of the container's own; the text says which."""


def check(places: Sequence[Place], directory: Path) -> None:
    """Every place is memory of the container's own in CRIU's images of it: no file's, no device's, no hole.

    Raises Unfounded, and images.ImageError for an image that is none.
    """
    _check_processes(places, directory)
    found: dict[int, list[Vma]] = {}
    starts: dict[int, list[int]] = {}
    for number, place in enumerate(places):
        if place.pid not in found:
            found[place.pid] = vmas.load(directory / f"mm-{place.pid}.img")
            starts[place.pid] = [vma.start for vma in found[place.pid]]
        first, last = place.span
        at = bisect_right(starts[place.pid], first) - 1
        vma = found[place.pid][at] if at >= 0 else None
        if vma is None or last > vma.end or not vma.is_fillable or place.forced == vma.is_writable:
            raise Unfounded(f"place {number} at {first:#x} of process {place.pid} is no memory that can be filled")


def _check_processes(places: Sequence[Place], directory: Path) -> None:
    there: set[int] = set()
    for number, place in enumerate(places):
        if place.pid not in there and not (directory / f"mm-{place.pid}.img").exists():
            raise Unfounded(f"place {number} is in process {place.pid}, which has no memory")
        there.add(place.pid)


def allow_huge_pages(
    mappings: Iterable[tuple[int, int, int, int]],
    places: Sequence[Place],
    directory: Path,
    needed: int,
    limit: int | None,
) -> None:
    """Set MADV_HUGEPAGE in CRIU's images of the mappings (process, start, end, bytes that huge pages cost more).

    Left as it is where the kernel has no huge pages (madvise would fail, and CRIU with it), and for mappings that
    would grow where the container's `needed` bytes come near its memory `limit`. Where the node gives huge pages to
    all memory, mappings in which `places` are thin are told to have none (MADV_NOHUGEPAGE). Raises Unfounded for a
    place in a process that has no images, and images.ImageError.
    """
    _check_processes(places, directory)
    if not os.path.isdir(_THP):
        return
    chosen: dict[int, set[tuple[int, int]]] = {}
    wanted = list(mappings)
    near = limit is not None and needed + sum(extra for *_, extra in wanted) > limit * _ROOM
    for pid, start, end, extra in wanted:
        if not (near and extra):
            chosen.setdefault(pid, set()).add((start, end))
    for pid, ranges in chosen.items():
        path = directory / f"mm-{pid}.img"
        if not path.exists():
            raise images.ImageError(f"{path.name}: it is missing")
        vmas.advise(path, ranges, vmas.HUGEPAGE)
    if _always():
        for pid, thin in _wasteful(places, directory, chosen).items():
            vmas.advise(directory / f"mm-{pid}.img", thin, vmas.NOHUGEPAGE)


def _always() -> bool:
    try:
        with open(f"{_THP}/enabled", encoding="ascii") as file:
            return "[always]" in file.read()
    except OSError:
        return False


def _wasteful(
    places: Sequence[Place], directory: Path, chosen: Mapping[int, set[tuple[int, int]]]
) -> dict[int, set[tuple[int, int]]]:
    """Mappings (start, end) by process that would take much more memory with huge pages than is filled of them."""
    windows: dict[int, list[Place]] = {}
    for place in places:
        windows.setdefault(place.pid, []).append(place)
    found: dict[int, set[tuple[int, int]]] = {}
    for pid, members in windows.items():
        filled = density.masks((place.base, place.bits) for place in members)
        for vma in vmas.load(directory / f"mm-{pid}.img"):
            key = vma.start, vma.end
            if key not in chosen.get(pid, ()) and vma.is_unadvised and density.wasteful(*key, filled):
                found.setdefault(pid, set()).add(key)
    return found
