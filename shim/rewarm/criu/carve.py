"""Carving: taking large memory out of CRIU's images, as chunks, so that the fill brings it back instead.

Stock CRIU reads private memory with one thread for each process. What is carved it never sees: the mapping comes back
empty and stopped, and rewarm writes the pages. Left in CRIU's images are
- small mappings, and everything that is not plain memory of the container's own;
- pages that the kernel writes to before rewarm can (hot.py);
- pages that a child has in common with its parent. CRIU restores those before it forks the child, so that the two
  share them (criu/mem.c: restore_priv_vma_content compares page by page); filled later, each would have its own.
  The mappings are cut where CRIU would not see it (align.py);
- one page in each thinly filled 2 MiB of a mapping that gets huge pages (density.py).
Pages of zeros are carved and not stored where a page that is not there reads as zeros.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from rewarm.criu import align, density, hot, shared, tree, vmas
from rewarm.criu.align import Overlap
from rewarm.criu.pagemap import PAGE
from rewarm.criu.source import Source, within
from rewarm.criu.vmas import Vma
from rewarm.memory.places import FORCED, MASK_BYTES, WINDOW, Place
from rewarm_native import memory

SMALLEST = 128 << 10
"""A mapping with fewer bytes in the images than this is left to CRIU: filling it would not pay."""


@dataclass(frozen=True)
class Carved:
    """What was carved: `places` by number of chunk; bytes filled later, bytes of zeros dropped, bytes left to CRIU.

    `huge` are mappings that may get huge pages, each with the bytes that this costs over small ones.
    """

    places: tuple[Place, ...]
    filled: int
    zeros: int
    left: int
    huge: tuple[tuple[int, Vma, int], ...]


@dataclass
class _Window:
    """Up to 2 MiB of one mapping: `start` counts as the pagemap does, `base` is the address it is filled at."""

    source: Source
    pid: int
    vma: Vma
    start: int
    base: int
    pages: int
    keep: int = 0
    """Pages to leave to CRIU."""
    common: int = 0
    """Those of them that the process has in common with another."""
    carved: int = 0
    """Pages taken out of CRIU's images."""
    nonzero: int = 0
    """Pages that are there and hold anything."""
    chunk: int = -1
    place: Place | None = None


def carve(directory: Path, add: Callable[[memoryview], int], threads: int, expect: Callable[[int], None]) -> Carved:
    """Carve the images in `directory`, handing each chunk to `add`, which returns its number and is called from
    `threads` threads at once; `expect` is told before how many bytes there may be.

    Raises images.ImageError, OSError and what `add` raises; the images are of no use then.
    """
    with ExitStack() as stack, ThreadPoolExecutor(threads) as pool:
        images_of = _Images(directory, stack)
        workers = _Workers()
        _keep_shared(images_of, lambda parts: list(pool.map(workers.compare, parts)))
        windows = list(_windows(images_of))
        expect(sum(window.pages for window in windows) * PAGE)
        _drain(pool.map(lambda window: workers.take(window, add), windows))
        again: dict[int, list[int]] = {id(source): [] for source in images_of.sources}
        huge = tuple(_huge(windows, again))
        for window in windows:
            window.source.carve(window.start, window.pages, window.carved)
        left = sum(source.rewrite(again[id(source)]) for source in images_of.sources)
    placed = sorted((window.chunk, window.place) for window in windows if window.place is not None)
    filled = sum(place.bits.bit_count() for _, place in placed)
    carved = sum(window.carved.bit_count() for window in windows)
    return Carved(tuple(place for _, place in placed), filled * PAGE, (carved - filled) * PAGE, left, huge)


def _drain(results: Iterator[None]) -> None:
    """Wait for all, and raise the first failure."""
    for _ in results:
        pass


class _Images:
    """The images of a tree: mappings and pagemaps by process, and the pages of each that CRIU keeps."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self.directory = directory
        self._stack = stack
        self.sources: list[Source] = []
        self.parents: dict[int, int] = {}
        self.mappings: dict[int, list[Vma]] = {}
        self.pages: dict[int, Source] = {}
        self.hot: dict[int, list[int]] = {}
        self.common: dict[int, list[int]] = {}
        self.kept: dict[int, list[int]] = {}
        """By address: what the kernel writes to early, what is in common with another process, and both."""
        for process in tree.processes(directory):
            self.parents[process.pid] = process.parent
            self.mappings[process.pid] = vmas.load(directory / f"mm-{process.pid}.img")
            path = directory / f"pagemap-{process.pid}.img"
            self.hot[process.pid] = []
            if path.exists():
                self.pages[process.pid] = self.open(path)
                self.hot[process.pid] = sorted(hot.pages(directory, process.threads))
                self.kept[process.pid] = list(self.hot[process.pid])
                self.common[process.pid] = []

    def open(self, path: Path) -> Source:
        source = Source(path)
        self._stack.callback(source.close)
        self.sources.append(source)
        return source


@dataclass(frozen=True)
class _Part:
    """Up to 2 MiB of memory that a process and its child may have in common."""

    overlap: Overlap
    one: Source
    other: Source
    start: int
    pages: int


def _keep_shared(images_of: _Images, compare: Callable[[list[_Part]], list[int]]) -> None:
    """Leave to CRIU what children have in common with their parents, where that is enough to matter."""
    parts: list[_Part] = []
    for overlap in align.overlaps(images_of.parents, images_of.mappings):
        one, other = images_of.pages.get(overlap.parent), images_of.pages.get(overlap.child)
        if one is not None and other is not None:
            for start, end in _filled(other, overlap.start, overlap.end):
                parts.append(_Part(overlap, one, other, start, (end - start) // PAGE))
    masks = list(zip(parts, compare(parts), strict=True))
    common: dict[Overlap, int] = {}
    for part, mask in masks:
        common[part.overlap] = common.get(part.overlap, 0) + mask.bit_count() * PAGE
    enough = [overlap for overlap, size in common.items() if size >= SMALLEST]
    if not enough:
        return
    for part, mask in masks:
        if common[part.overlap] >= SMALLEST:
            pages = [part.start + at * PAGE for at in range(part.pages) if mask >> at & 1]
            for pid in (part.overlap.parent, part.overlap.child):
                images_of.kept[pid] += pages
                images_of.common[pid] += pages
    for pages in (*images_of.kept.values(), *images_of.common.values()):
        pages.sort()
    for pid, mappings in align.cut(images_of.mappings, enough).items():
        if len(mappings) != len(images_of.mappings[pid]):
            align.write(images_of.directory / f"mm-{pid}.img", mappings)
            images_of.mappings[pid] = mappings


def _windows(images_of: _Images) -> Iterator[_Window]:
    """Every window of every mapping that is worth it, each with the pages that CRIU must keep."""
    for pid, source in images_of.pages.items():
        for vma in images_of.mappings[pid]:
            if vma.is_private_anonymous or vma.is_private_file:
                kept, common = images_of.kept[pid], images_of.common[pid]
                for start, end in _filled(source, vma.start, vma.end):
                    yield _window(source, pid, vma, start, start, end, kept, common)
    memfds = shared.open_memfds(images_of.directory)
    for path, ranges in shared.ranges(images_of.directory, images_of.mappings):
        source = images_of.open(path)
        for one in ranges:
            hot_offsets = _hot_offsets(images_of, one, memfds)
            for start, end in _filled(source, one.start, one.end):
                yield _window(source, one.pid, one.vma, start, one.address + start - one.start, end, hot_offsets)


def _hot_offsets(images_of: _Images, one: shared.Range, memfds: Mapping[int, int]) -> list[int]:
    """Offsets of a shared memory at which a thread of a process that maps it has its stack or rseq area."""
    found: set[int] = set()
    for pid, mappings in images_of.mappings.items():
        for vma in mappings:
            if shared.identity(vma, memfds) == shared.identity(one.vma, memfds):
                found.update(page - vma.start + vma.pgoff for page in within(images_of.hot[pid], vma.start, vma.end))
    return sorted(found)


def _window(
    source: Source, pid: int, vma: Vma, start: int, base: int, end: int, kept: list[int], common: Sequence[int] = ()
) -> _Window:
    window = _Window(source, pid, vma, start, base, (end - start) // PAGE)
    for page in within(kept, start, end):
        window.keep |= 1 << (page - start) // PAGE
    for page in within(common, start, end):
        window.common |= 1 << (page - start) // PAGE
    return window


def _filled(source: Source, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The windows of [start, end) that have data, if there is enough in all."""
    touched: dict[int, None] = {}
    total = 0
    for entry in source.overlapping(start, end):
        first, last = max(start, entry.start), min(end, entry.end)
        total += last - first
        for number in range((first - start) // WINDOW, (last - 1 - start) // WINDOW + 1):
            touched[number] = None
    if total >= SMALLEST:
        for number in touched:
            yield start + number * WINDOW, min(end, start + (number + 1) * WINDOW)


class _Workers:
    """What the threads do, each with buffers of its own."""

    def __init__(self) -> None:
        self._local = threading.local()

    def compare(self, part: _Part) -> int:
        """The pages that the two have in common; those of zeros that need not be anywhere are left out."""
        first, second = self._buffer("first"), self._buffer("second")
        size = part.pages * PAGE
        present = part.one.read(part.start, part.pages, first) & part.other.read(part.start, part.pages, second)
        if not present:
            return 0
        equal = present & memory.equal_pages(first[:size], second[:size])
        return equal & memory.nonzero_pages(first[:size]) if part.overlap.anonymous else equal

    def take(self, window: _Window, add: Callable[[memoryview], int]) -> None:
        """Make a window's pages a chunk."""
        buffer = self._buffer("first")
        size = window.pages * PAGE
        present = window.source.read(window.start, window.pages, buffer)
        window.keep &= present
        window.carved = present & ~window.keep
        window.nonzero = memory.nonzero_pages(buffer[:size]) & present
        # Behind a private mapping of a file is the file, not zeros.
        wanted = window.carved if window.vma.is_private_file else window.carved & window.nonzero
        if wanted:
            packed = memory.pack_pages(buffer[:size], wanted)
            window.chunk = add(buffer[:packed])
            flags = 0 if window.vma.is_writable else FORCED
            window.place = Place(window.pid, flags, window.base, wanted.to_bytes(MASK_BYTES, "little"))

    def _buffer(self, name: str) -> memoryview:
        found: memoryview | None = getattr(self._local, name, None)
        if found is None:
            found = memoryview(mmap.mmap(-1, WINDOW, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
            setattr(self._local, name, found)
        return found


def _huge(windows: list[_Window], again: dict[int, list[int]]) -> Iterator[tuple[int, Vma, int]]:
    """The mappings that may get huge pages; where those would be thin, CRIU gets a page to put there before."""
    found: dict[tuple[int, int], list[_Window]] = {}
    for window in windows:
        if window.vma.may_be_huge:
            found.setdefault((window.pid, window.vma.start), []).append(window)
    for (pid, _), members in found.items():
        vma, source = members[0].vma, members[0].source
        filled = density.masks((window.start, window.nonzero) for window in members)
        kept = density.masks((window.start, window.keep) for window in members)
        common = density.masks((window.start, window.common) for window in members)
        plan = density.plan(vma.start, vma.end, filled, kept, common)
        if plan is not None:
            again[id(source)] += plan.pages
            yield pid, vma, plan.extra
