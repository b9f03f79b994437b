"""The work of a restore in parts of a few neighbouring chunks, in the order in which they lie in the packs, so that all
streams together read each pack from its beginning to its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .chunks import CHUNK, Chunk

STORE, CACHE, FETCH = 0, 1, 2
"""Where a part is read: the pack in the store, its copy in the cache, or the pack into the cache."""
PART = 8 << 20
"""Bytes handed to a stream at a time, at most: one lock and one open file for several chunks, and few enough that the
last streams end together."""
COLD_PART = 64 << 20
"""The same for data that is not in memory: a whole pack, so that each stream reads a file of its own from beginning to
end. Streams that share a file share the kernel's read-ahead state too, and disturb it."""
GAP = 1 << 20
"""Unwanted bytes between two chunks beyond which they are not one part."""


class Part(NamedTuple):
    """Chunks of one pack that one stream reads in a row, by number; they lie between `start` and `end` in the file."""

    pack: int
    numbers: Sequence[int]
    start: int
    end: int
    where: int


def divide(chunks: Sequence[Chunk], numbers: Sequence[int], threads: int, where: int, most: int = PART) -> list[Part]:
    """These chunks in parts for `threads` streams, in the order in which they lie in the packs.

    A pack that is fetched into the cache is one part.
    """
    order = sorted(numbers, key=lambda number: chunks[number][1:4:2])
    total = sum(chunks[number].size for number in order)
    limit = max(CHUNK, min(most, total // (2 * max(1, threads))))
    parts: list[Part] = []
    taken: list[int] = []
    pack = start = end = 0
    for number in order:
        _, its, _, offset, stored, size, raw_offset = chunks[number]
        begin, finish = (raw_offset, raw_offset + size) if where == CACHE else (offset, offset + stored)
        if taken and (its != pack or (where != FETCH and (finish - start > limit or begin - end > GAP))):
            parts.append(Part(pack, taken, start, end, where))
            taken = []
        if not taken:
            pack, start, end = its, begin, finish
        taken.append(number)
        end = max(end, finish)
    if taken:
        parts.append(Part(pack, taken, start, end, where))
    return parts
