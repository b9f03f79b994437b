"""`mm-*.img`: the mappings (VMAs) of a process, and which of them rewarm may fill in CRIU's place."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from rewarm.criu import encode, images

# criu/include/image.h
REGULAR = 1 << 0
HEAP = 1 << 5
FILE_PRIVATE = 1 << 6
FILE_SHARED = 1 << 7
ANON_SHARED = 1 << 8
ANON_PRIVATE = 1 << 9
MEMFD = 1 << 14
GUARD = 1 << 16
# <asm-generic/mman.h>
_PROT_WRITE = 2
_MAP_SHARED, _MAP_PRIVATE, _MAP_DROPPABLE = 1, 2, 8
_MAP_GROWSDOWN = 0x100
_MAP_LOCKED = 0x2000
_MAP_HUGETLB = 0x40000
HUGEPAGE, NOHUGEPAGE = 14, 15
"""Numbers of madvise(2), and of their bits in the images."""


_FEW = 256
"""Mappings for which an image is looked through faster than it is decoded."""


class Vma(NamedTuple):
    """One mapping of [start, end); `shmid` says which shared memory (or file) it maps, from byte `pgoff` on."""

    start: int
    end: int
    pgoff: int
    shmid: int
    prot: int
    flags: int
    status: int
    madv: int

    @property
    def is_writable(self) -> bool:
        return bool(self.prot & _PROT_WRITE)

    @property
    def is_private_anonymous(self) -> bool:
        """Plain private memory. Not stacks that grow, huge page files, shadow stacks, AIO rings and the like."""
        return self.status & ~HEAP == REGULAR | ANON_PRIVATE and self._is_plain(_MAP_PRIVATE)

    @property
    def is_private_file(self) -> bool:
        """A private mapping of a file; the pages that CRIU has of it are those that were written to."""
        return self.status == REGULAR | FILE_PRIVATE and self._is_plain(_MAP_PRIVATE)

    @property
    def is_shared_anonymous(self) -> bool:
        return self.status == REGULAR | ANON_SHARED and self._is_plain(_MAP_SHARED)

    @property
    def is_shared_memfd(self) -> bool:
        return self.status == REGULAR | FILE_SHARED | MEMFD and self._is_plain(_MAP_SHARED)

    @property
    def is_fillable(self) -> bool:
        """Whether memory may be written there from outside: it is the container's own and no file's."""
        private = self.is_private_anonymous or self.is_private_file
        return private or ((self.is_shared_anonymous or self.is_shared_memfd) and self.is_writable)

    @property
    def may_be_huge(self) -> bool:
        """Locked memory has its small pages already when rewarm comes; some programs want no huge ones."""
        return (
            self.is_private_anonymous
            and self.is_writable
            and not self.flags & _MAP_LOCKED
            and not self.madv & 1 << NOHUGEPAGE
        )

    @property
    def is_unadvised(self) -> bool:
        """Plain private memory of which the program has not said whether it wants huge pages."""
        return self.is_private_anonymous and not self.madv & (1 << HUGEPAGE | 1 << NOHUGEPAGE)

    def _is_plain(self, sharing: int) -> bool:
        odd = _MAP_GROWSDOWN | _MAP_HUGETLB | (_MAP_DROPPABLE if sharing == _MAP_PRIVATE else 0)
        return self.flags & (_MAP_SHARED | _MAP_PRIVATE) == sharing and not self.flags & odd


def is_guard(message: images.Message) -> bool:
    """Whether it is no mapping: CRIU lists guard pages (MADV_GUARD_INSTALL) behind the mappings in which they lie."""
    return bool(images.u32(message, 7) & GUARD)


def load(path: Path) -> list[Vma]:
    """The mappings of one process by address. Raises images.ImageError, also if they are more than can be here."""
    most = _most()
    found: list[Vma] = []
    for record in images.records(path):
        for message in images.messages(record, 14):
            if is_guard(message):
                continue
            vma = _vma(message)
            if found and found[-1].end > vma.start:
                one = found[-1].start
                raise images.ImageError(f"{path.name}: the mappings at {one:#x} and {vma.start:#x} overlap")
            found.append(vma)
            if len(found) > most:
                raise images.ImageError(f"{path.name}: it has more than {most} mappings (sysctl vm.max_map_count)")
    return found


def _most() -> int:
    """How many mappings a process can have on this node; the kernel's default where it does not say."""
    try:
        with open("/proc/sys/vm/max_map_count", encoding="ascii") as file:
            return int(file.read())
    except OSError:
        return 65530


def _vma(message: images.Message) -> Vma:
    numbers = (images.number(message, field) for field in range(1, 5))
    words = (images.u32(message, field) for field in range(5, 8))
    vma = Vma(*numbers, *words, images.number(message, 9))  # type: ignore[call-arg]
    if vma.start >= vma.end or vma.end > 1 << 64:
        raise images.ImageError(f"a mapping goes from {vma.start:#x} to {vma.end:#x}")
    return vma


def advise(path: Path, ranges: Collection[tuple[int, int]], advice: int) -> None:
    """Set the bit of an advice for the mappings with these (start, end). Raises images.ImageError, OSError.

    CRIU's restorer (criu/pie/restorer.c) calls madvise(2) for every bit when the mapping has its place and content.
    """
    # What has none of these ends need not be decoded, which takes ten times as long. Of a number that is written in
    # another way than CRIU does, only the advice is lost.
    few = len(ranges) <= _FEW
    ends = re.compile(b"|".join(re.escape(encode.integer(2, end)) for _, end in ranges) if few else b"")
    records = []
    for fields in images.raw_records(path):
        out = bytearray()
        for number, raw, value in fields:
            if number == 14 and isinstance(value, bytes) and ends.search(value):
                message = images.decode(value, path.name)
                if (images.number(message, 1), images.number(message, 2)) in ranges and not is_guard(message):
                    # Of a field that is there twice the last one counts.
                    madv = images.number(message, 9) | 1 << advice
                    raw = encode.nested(14, value + encode.integer(9, madv))
            out += raw
        records.append(bytes(out))
    encode.write_records(path, encode.magic_of(path), records)
