"""One pagemap with its pages image, as carving reads it and writes it anew."""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from rewarm.criu import images, pagemap
from rewarm.criu.pagemap import PAGE, Entry, Pagemap


class _Run(NamedTuple):
    entry: Entry
    start: int
    end: int


class Source:
    """Addresses are those of the pagemap: of a process, or offsets of shared memory. Close it after use."""

    def __init__(self, path: Path) -> None:
        """Raises images.ImageError, OSError."""
        self.map: Pagemap = pagemap.load(path)
        self._fd = os.open(self.map.pages_path, os.O_RDONLY | os.O_CLOEXEC)
        self._carved: dict[int, tuple[int, int]] = {}

    def close(self) -> None:
        os.close(self._fd)

    def overlapping(self, start: int, end: int) -> Iterator[Entry]:
        """The entries with data that have a page in [start, end), by address."""
        entries = self.map.entries
        low, high = 0, len(entries)
        while low < high:
            middle = (low + high) // 2
            if entries[middle].end <= start:
                low = middle + 1
            else:
                high = middle
        while low < len(entries) and entries[low].start < end:
            if entries[low].has_data:
                yield entries[low]
            low += 1

    def read(self, start: int, pages: int, buffer: memoryview) -> int:
        """Put those pages from `start` on that the image has to their places in `buffer`; returns their mask.

        May be called from several threads. Raises OSError, and images.ImageError if the pages image is too short.
        """
        mask, offset = 0, 0
        pieces: list[memoryview] = []
        end = start + pages * PAGE
        for entry in self.overlapping(start, end):
            first, last = max(start, entry.start), min(end, entry.end)
            at, count = (first - start) // PAGE, (last - first) // PAGE
            if not pieces:
                offset = entry.offset + first - entry.start
            mask |= ((1 << count) - 1) << at
            # Data of one entry follows that of the entry before, so all of it is one read.
            pieces.append(buffer[at * PAGE : (at + count) * PAGE])
        wanted = mask.bit_count() * PAGE
        if pieces and os.preadv(self._fd, pieces, offset) != wanted:
            raise images.ImageError(f"{self.map.pages_path.name}: it ends before byte {offset + wanted}")
        return mask

    def carve(self, start: int, pages: int, mask: int) -> None:
        """Take the pages of `mask` from `start` on out; windows do not overlap. Only seen after `rewrite`."""
        self._carved[start] = (pages, mask)

    def rewrite(self, again: Sequence[int]) -> int:
        """Write both images anew without what was carved but with the pages at the addresses `again`.

        Returns the bytes of the pages image. Raises OSError.
        """
        runs: list[_Run] = []
        for run in self._kept(sorted(again)):
            if runs and runs[-1].entry is run.entry and runs[-1].end == run.start:
                runs[-1] = runs[-1]._replace(end=run.end)
            else:
                runs.append(run)
        path = self.map.pages_path
        temporary = path.with_name(path.name + ".new")
        out = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            for entry, start, end in runs:
                if entry.has_data:
                    self._copy(out, entry.offset + start - entry.start, end - start)
            size = os.fstat(out).st_size
        finally:
            os.close(out)
        temporary.replace(path)
        entries = [Entry(s, (e - s) // PAGE, 0, at.flags, at.in_parent, at.wide) for at, s, e in runs]
        pagemap.write(self.map, entries)
        return size

    def _kept(self, again: list[int]) -> Iterator[_Run]:
        """What stays, by address, in pieces."""
        windows = sorted((start, start + pages * PAGE, mask) for start, (pages, mask) in self._carved.items())
        at = 0
        for entry in self.map.entries:
            if not entry.has_data:
                yield _Run(entry, entry.start, entry.end)
                continue
            here = entry.start
            while here < entry.end:
                while at < len(windows) and windows[at][1] <= here:
                    at += 1
                start, end, mask = windows[at] if at < len(windows) else (entry.end, entry.end, 0)
                if start > here:
                    yield _Run(entry, here, min(start, entry.end))
                    here = min(start, entry.end)
                    continue
                last = min(end, entry.end)
                kept = ~mask >> (here - start) // PAGE & (1 << (last - here) // PAGE) - 1
                for page in within(again, here, last):
                    kept |= 1 << (page - here) // PAGE
                for first, count in _runs(kept):
                    yield _Run(entry, here + first * PAGE, here + (first + count) * PAGE)
                here = last

    def _copy(self, out: int, offset: int, count: int) -> None:
        while count:
            done = os.copy_file_range(self._fd, out, count, offset)
            if not done:
                raise images.ImageError(f"{self.map.pages_path.name}: it ends before byte {offset + count}")
            offset, count = offset + done, count - done


def within(pages: Sequence[int], start: int, end: int) -> Sequence[int]:
    """Those of the sorted addresses that lie in [start, end)."""
    return pages[bisect_left(pages, start) : bisect_left(pages, end)]


def _runs(mask: int) -> Iterator[tuple[int, int]]:
    """First and number of every run of set bits."""
    at = 0
    while mask:
        skip = (mask & -mask).bit_length() - 1
        mask >>= skip
        count = (~mask & mask + 1).bit_length() - 1
        yield at + skip, count
        mask >>= count
        at += skip + count
