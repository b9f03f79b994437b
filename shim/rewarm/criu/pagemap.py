"""`pagemap-*.img` and `pages-*.img`: which pages of a process or a shared memory object CRIU has, and where.

A pagemap (images/pagemap.proto) begins with a head that names the pages image; the data of the entries that are PRESENT
follow one another in it, in the order of the entries (criu/page-xfer.c, criu/pagemap.c).
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from rewarm.criu import encode, images

PAGE = 4096
_LARGEST = 256 << 20
"""Bytes of a pagemap, which only captures read: sparse memory of terabytes has as many entries."""
# criu/include/pagemap.h
PARENT = 1
LAZY = 2
PRESENT = 4


class Entry(NamedTuple):
    """`pages` pages from address (shared memory: offset) `start`; `offset` is where the pages image has them, in bytes.

    `wide` says that the entry has its number of pages in the field of 64 bits.
    """

    start: int
    pages: int
    offset: int
    flags: int
    in_parent: bool
    wide: bool

    @property
    def end(self) -> int:
        return self.start + self.pages * PAGE

    @property
    def has_data(self) -> bool:
        """Whether the pages image has its data."""
        return bool(self.flags & PRESENT) and not self.in_parent and not self.flags & PARENT


class Pagemap(NamedTuple):
    """One pagemap image: `path`, the number of its pages image, and its entries by address."""

    path: Path
    pages_id: int
    entries: tuple[Entry, ...]

    @property
    def pages_path(self) -> Path:
        return self.path.with_name(f"pages-{self.pages_id}.img")


def load(path: Path) -> Pagemap:
    """Raises images.ImageError for an image that CRIU would not have written."""
    records = images.records(path, _LARGEST)
    head = next(records, None)
    if head is None:
        raise images.ImageError(f"{path.name}: it has no head")
    entries: list[Entry] = []
    offset = end = 0
    for record in records:
        start, wide = images.number(record, 1), 5 in record
        pages = images.number(record, 5) if wide else images.u32(record, 2)
        # Images older than the flags (criu/pagemap.c: init_pagemaps) mean PRESENT by having none.
        flags = images.u32(record, 4) if 4 in record else PRESENT
        entry = Entry(start, pages, offset, flags, bool(images.number(record, 3)), wide)
        if start % PAGE or start < end or not pages or entry.end > 1 << 63:
            raise images.ImageError(
                f"{path.name}: entry at {start:#x} of {pages} pages is unaligned, empty or overlaps"
            )
        end = entry.end
        if entry.has_data:
            offset += pages * PAGE
        entries.append(entry)
    return Pagemap(path, images.u32(head, 1), tuple(entries))


def write(pagemap: Pagemap, entries: list[Entry]) -> None:
    """Write the pagemap image with other entries; `offset` of each is not looked at, their order is."""
    magic = encode.magic_of(pagemap.path)
    messages = [encode.integer(1, pagemap.pages_id)]
    for entry in entries:
        # The old field of 32 bits is required; readers of the wide one ignore it.
        message = encode.integer(1, entry.start) + encode.integer(2, min(entry.pages, (1 << 32) - 1))
        if entry.in_parent:
            message += encode.integer(3, 1)
        message += encode.integer(4, entry.flags)
        if entry.wide:
            message += encode.integer(5, entry.pages)
        messages.append(message)
    encode.write_records(pagemap.path, magic, messages)
