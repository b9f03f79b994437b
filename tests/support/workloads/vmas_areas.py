"""Every kind of memory that one process can hold, and a digest of each."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import random
from dataclasses import dataclass, field

from support.workloads import raw
from support.workloads.raw import MIB, PAGE

BLOCK = 4 * MIB
ZEROS = bytes(PAGE)
FILE = "/var/lib/vmas"


@dataclass
class Area:
    """Address ranges that are hashed together. `hidden`: they have no access rights but while they are hashed."""

    name: str
    spans: list[tuple[int, int]]
    hidden: bool = False

    def digest(self) -> str:
        state = hashlib.blake2b(digest_size=16)
        with open("/proc/self/mem", "rb", buffering=0) as memory:
            for address, length in self.spans:
                if self.hidden:
                    raw.protect(address, length, raw.PROT_READ)
                for start in range(address, address + length, BLOCK):
                    data = os.pread(memory.fileno(), min(BLOCK, address + length - start), start)
                    state.update(f"{len(data)} ".encode() + data)
                if self.hidden:
                    raw.protect(address, length, raw.PROT_NONE)
        return state.hexdigest()


@dataclass
class Descriptor:
    """A memfd that need not be mapped: hashed by reading it, with its size and seals."""

    name: str
    fd: int

    def digest(self) -> str:
        size = os.fstat(self.fd).st_size
        state = hashlib.blake2b(f"{size} {fcntl.fcntl(self.fd, fcntl.F_GET_SEALS)}".encode(), digest_size=16)
        for start in range(0, size, BLOCK):
            state.update(os.pread(self.fd, BLOCK, start))
        return state.hexdigest()


@dataclass
class Areas:
    """What one process holds. `shrink` divides the sizes; `content` counts bytes that are not zero pages, by kind."""

    shrink: int
    found: dict[str, Area | Descriptor] = field(default_factory=dict)
    content: dict[str, int] = field(default_factory=lambda: {"private": 0, "shared": 0})
    has: dict[str, bool] = field(default_factory=dict)

    def size(self, mib: int) -> int:
        return max(mib * MIB // self.shrink, 64 * PAGE)

    def add(self, name: str, address: int, length: int, *, hidden: bool = False) -> int:
        self.found[name] = Area(name, [(address, length)], hidden)
        return address

    def digests(self) -> dict[str, str]:
        return {name: area.digest() for name, area in self.found.items()}

    def dense(self, address: int, length: int, kind: str = "private") -> None:
        """Every page random."""
        source = random.Random(length ^ len(self.found))
        for start in range(0, length, BLOCK):
            raw.write(address + start, source.randbytes(min(BLOCK, length - start)))
        self.content[kind] += length

    def scattered(self, address: int, length: int, zeros: float, kind: str = "private") -> None:
        """Random pages; of the share `zeros`, one half is never touched and the other holds zeros."""
        source = random.Random(length ^ len(self.found))
        for start in range(address, address + length, PAGE):
            chance = source.random()
            if chance >= zeros:
                raw.write(start, source.randbytes(PAGE))
                self.content[kind] += PAGE
            elif chance < zeros / 2:
                raw.zero(start, PAGE)

    def private(self) -> None:
        """Private anonymous memory of all kinds."""
        self.dense(self.add("dense", raw.memory(self.size(64)), self.size(64)), self.size(64))
        size = self.size(64)
        self.scattered(self.add("zeros", raw.memory(size), size), size, 0.4)
        self.scattered(self.add("sparse", raw.memory(size), size), size, 1 - 1 / 64)
        size = self.size(16)
        self.scattered(self.add("read-only", raw.memory(size), size), size, 0.1)
        raw.protect(self.found_at("read-only"), size, raw.PROT_READ)
        size = self.size(8)
        self.dense(self.add("hidden", raw.memory(size), size, hidden=True), size)
        raw.protect(self.found_at("hidden"), size, raw.PROT_NONE)
        self._holes(self.size(8))
        self.scattered(self.add("noreserve", raw.memory(size, flags=raw.MAP_NORESERVE), size), size, 0.2)
        self._locked(self.size(4))
        self._advised()
        self.dense(self.add("heap", raw.extend_heap(size), size), size)
        self._far()
        self._grows_down()

    def found_at(self, name: str) -> int:
        area = self.found[name]
        assert isinstance(area, Area)
        return area.spans[0][0]

    def _holes(self, size: int) -> None:
        """Every other 64 KiB can be neither read nor written: many small mappings in a row."""
        step, start = 16 * PAGE, raw.memory(size)
        spans = []
        for address in range(start, start + size, 2 * step):
            self.dense(address, step)
            raw.protect(address + step, step, raw.PROT_NONE)
            spans.append((address, step))
        self.found["holes"] = Area("holes", spans)

    def _locked(self, size: int) -> None:
        try:
            address = raw.memory(size)
            raw.lock(address, size)
        except OSError:
            self.has["locked"] = False  # RLIMIT_MEMLOCK
            return
        self.has["locked"] = True
        self.dense(self.add("locked", address, size), size)

    def _advised(self) -> None:
        size = max(self.size(16), 4 * MIB)
        huge = self.add("huge", raw.aligned(size, 2 * MIB), size)
        raw.advise(huge, size, raw.MADV_HUGEPAGE)
        self.dense(huge, size - MIB)  # the last huge page is filled by half
        for name, advice in (
            ("not-huge", raw.MADV_NOHUGEPAGE),
            ("not-in-children", raw.MADV_DONTFORK),
            ("wiped-in-children", raw.MADV_WIPEONFORK),
        ):
            size = self.size(8)
            raw.advise(self.add(name, raw.memory(size), size), size, advice)
            self.dense(self.found_at(name), size)
        try:
            self.dense(self.add("hugetlb", raw.memory(4 * MIB, flags=raw.MAP_HUGETLB), 4 * MIB), 4 * MIB)
            self.has["hugetlb"] = True
        except OSError:
            self.has["hugetlb"] = False  # the machine has set none aside

    def _far(self) -> None:
        """20 GiB of addresses with content at both ends and in the middle: gaps of more than 2^32 bytes."""
        size, part = 20 << 30, self.size(4)
        start = raw.memory(size, flags=raw.MAP_NORESERVE)
        spans = [(start + at, part) for at in (0, (9 << 30) + 5 * PAGE, size - part)]
        for address, length in spans:
            self.scattered(address, length, 0.3)
        self.found["far"] = Area("far", spans)

    def _grows_down(self) -> None:
        """Begins as four pages and is grown by writes below its start."""
        size, room = self.size(2), 8 * MIB
        free = raw.memory(room, raw.PROT_NONE)
        raw.unmap(free, room)
        top = free + room
        raw.memory(4 * PAGE, flags=raw.MAP_GROWSDOWN, at=top - 4 * PAGE)
        source = random.Random(5)
        for address in range(top - PAGE, top - size - PAGE, -PAGE):
            raw.write(address, source.randbytes(PAGE))
        self.content["private"] += size
        self.add("grows-down", top - size, size)

    def files(self) -> None:
        """Private mappings of a file and of a memfd: a third of the pages changed, a third made zero."""
        size = self.size(8)
        source = random.Random(11)
        os.makedirs(FILE, exist_ok=True)
        with open(f"{FILE}/mapped", "w+b") as file:
            file.write(source.randbytes(size))
            file.flush()
            of_file = self.add("file", raw.memory(size, fd=file.fileno()), size)
        fd = os.memfd_create("private", os.MFD_CLOEXEC)
        os.write(fd, source.randbytes(size))
        self.content["shared"] += size
        of_memory = self.add("memfd-private", raw.memory(size, fd=fd), size)
        os.close(fd)
        for start in (of_file, of_memory):
            for number, address in enumerate(range(start, start + size, PAGE)):
                if number % 3 == 0:
                    raw.write(address, source.randbytes(PAGE))
                    self.content["private"] += PAGE
                elif number % 3 == 1:
                    raw.zero(address, PAGE)

    def shared(self) -> None:
        """Memory that children share: anonymous, memfds in all states, System V."""
        size = self.size(32)
        address = self.add("shared", raw.memory(size, flags=raw.MAP_SHARED), size)
        self.scattered(address, size, 0.3, "shared")
        size = self.size(16)
        fd = self._memfd("memfd", size, 0.4)
        self.add("memfd mapping", raw.memory(size, flags=raw.MAP_SHARED, fd=fd), size)
        fd = self._memfd("memfd larger than its mapping", size, 0.0)
        part = size // 4
        self.add("part of a memfd", raw.memory(part, flags=raw.MAP_SHARED, fd=fd, offset=part), part)
        size = self.size(8)
        fd = self._memfd("", size, 0.2)
        self.add("memfd closed", raw.memory(size, flags=raw.MAP_SHARED, fd=fd), size)
        os.close(fd)
        self._memfd("memfd only open", size, 0.5)
        fd = self._memfd("memfd sealed", self.size(4), 0.1)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
        self.has["system-v"] = False
        with contextlib.suppress(OSError):
            self.scattered(self.add("system-v", raw.system_v(size), size), size, 0.3, "shared")
            self.has["system-v"] = True

    def _memfd(self, name: str, size: int, zeros: float) -> int:
        """A memfd of `size`: of the share `zeros` of its pages, one half holds zeros, the other are holes."""
        fd = os.memfd_create(name or "closed", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, size)
        source = random.Random(size ^ len(self.found))
        for start in range(0, size, PAGE):
            chance = source.random()
            if chance >= zeros:
                os.pwrite(fd, source.randbytes(PAGE), start)
                self.content["shared"] += PAGE
            elif chance < zeros / 2:
                os.pwrite(fd, ZEROS, start)
        if name:
            self.found[name] = Descriptor(name, fd)
        return fd
