"""What the odd kinds of memory have in common; see odd_kinds and odd_writes."""

from __future__ import annotations

import ctypes
import hashlib
import os
import random
from typing import Any

from support.workloads import raw
from support.workloads.raw import MIB

PROT_EXEC = 4

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long


def syscall(number: int, *arguments: Any) -> int:
    words = (ctypes.c_long(one) if isinstance(one, int) else one for one in arguments)
    found: int = libc.syscall(ctypes.c_long(number), *words)
    if found < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return found


def prctl(option: int, value: int) -> None:
    if libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) < 0:
        raise OSError(ctypes.get_errno(), "prctl")


class Kind:
    """`spans` is the memory whose content counts; `check` says more, the same before the capture and after it."""

    def __init__(self) -> None:
        self.spans: list[tuple[int, int]] = []
        self.make()

    def make(self) -> None:
        raise NotImplementedError

    def check(self) -> Any:
        return None

    def fill(self, address: int, size: int = MIB) -> int:
        raw.write(address, random.Random(size ^ len(self.spans)).randbytes(size))
        self.spans.append((address, size))
        return address

    def memory(self, size: int = MIB, prot: int = raw.READ_WRITE, flags: int = 0, fd: int = -1) -> int:
        """A mapping with content; without the right to write it loses that afterwards."""
        address = raw.memory(size, prot | raw.READ_WRITE, flags, fd)
        self.fill(address, size)
        if prot & raw.READ_WRITE != raw.READ_WRITE:
            raw.protect(address, size, prot)
        return address

    def digest(self) -> str:
        state = hashlib.blake2b(digest_size=16)
        with open("/proc/self/mem", "rb", buffering=0) as memory:
            for address, size in self.spans:
                state.update(os.pread(memory.fileno(), size, address))
        return state.hexdigest()
