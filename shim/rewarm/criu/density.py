"""Which mappings get huge pages: those that are filled densely, so that it costs next to no memory.

With MADV_HUGEPAGE the first write to an empty 2 MiB of a mapping takes a huge page, however little is written there.
Where a small page is there already the kernel takes small ones: so CRIU, which has its pages in before it calls
madvise(2), is given one page of every 2 MiB that will be thin. khugepaged may make those huge in time all the same
(its max_ptes_none is 511 by default), so a mapping in which that would cost more than 2 % gets none. It does so too
with pages that a process shares with its parent or child (max_ptes_shared, 256), and each has its own then: such a
2 MiB is not dense either, and costs what is shared.

Where the node gives huge pages to all memory (`always`), no advice means huge pages: `wasteful` says which mappings
have to be told to have none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

PAGE = 4096
HUGE = 2 << 20
_PAGES = HUGE // PAGE
_FULL = (1 << _PAGES) - 1
DENSE = 502
"""Pages of the 512 that must be filled: huge pages then cost 2 % at most."""
_COST = 0.02


class Plan(NamedTuple):
    """`pages`: addresses of pages to leave to CRIU; `extra`: bytes that huge pages take more than small ones."""

    pages: tuple[int, ...]
    extra: int


def masks(windows: Iterable[tuple[int, int]]) -> dict[int, int]:
    """(address, page mask from there) of any alignment -> number of the aligned 2 MiB -> its page mask."""
    found: dict[int, int] = {}
    for start, mask in windows:
        number, within = divmod(start, HUGE)
        bits = mask << within // PAGE
        while bits:
            if bits & _FULL:
                found[number] = found.get(number, 0) | bits & _FULL
            bits >>= _PAGES
            number += 1
    return found


def plan(
    start: int, end: int, filled: Mapping[int, int], kept: Mapping[int, int], common: Mapping[int, int]
) -> Plan | None:
    """For the mapping [start, end): None if it should not have huge pages. `filled` are the pages that hold
    anything, `kept` those of them that CRIU restores anyhow, `common` those that another process has in common with
    this one; all by number of the aligned 2 MiB."""
    pages: list[int] = []
    dense = thin = extra = 0
    for number in range(-(-start // HUGE), end // HUGE):
        mask = filled.get(number, 0)
        count = mask.bit_count()
        if common.get(number, 0):
            # Small pages, of CRIU's making, are there already.
            thin += _PAGES - count + common[number].bit_count()
        elif count >= DENSE:
            dense += _PAGES
            extra += (_PAGES - count) * PAGE
        elif count:
            thin += _PAGES - count
            if not kept.get(number, 0):
                pages.append(number * HUGE + ((mask & -mask).bit_length() - 1) * PAGE)
    if not dense or thin * PAGE + extra > dense * PAGE * _COST:
        return None
    return Plan(tuple(pages), extra)


def wasteful(start: int, end: int, filled: Mapping[int, int]) -> bool:
    """Whether huge pages in the mapping [start, end) would take more than 2 % over what is filled of it."""
    taken = empty = 0
    for number in range(-(-start // HUGE), end // HUGE):
        count = filled.get(number, 0).bit_count()
        taken += count
        empty += _PAGES - count if count else 0
    return empty > taken * _COST
