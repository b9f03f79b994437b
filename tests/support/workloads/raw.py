"""Memory as the kernel gives it: the calls that the standard library's `mmap` lacks, by address."""

from __future__ import annotations

import ctypes
import os
from typing import Any

PAGE = os.sysconf("SC_PAGE_SIZE")
MIB = 1 << 20

PROT_NONE, PROT_READ, PROT_WRITE = 0, 1, 2
READ_WRITE = PROT_READ | PROT_WRITE
MAP_SHARED, MAP_PRIVATE, MAP_FIXED, MAP_ANONYMOUS = 0x1, 0x2, 0x10, 0x20
MAP_GROWSDOWN, MAP_NORESERVE, MAP_HUGETLB = 0x100, 0x4000, 0x40000
MADV_DONTNEED, MADV_DONTFORK, MADV_HUGEPAGE, MADV_NOHUGEPAGE, MADV_WIPEONFORK = 4, 10, 14, 15, 18
_MREMAP_MAYMOVE, _MREMAP_FIXED = 1, 2
_IPC_CREAT = 0o1000

_libc = ctypes.CDLL(None, use_errno=True)
for _name in ("mmap", "mremap", "sbrk", "shmat"):
    getattr(_libc, _name).restype = ctypes.c_void_p
_FAILED = ctypes.c_void_p(-1).value


class Stack(ctypes.Structure):
    """stack_t of sigaltstack(2)."""

    _fields_ = (("sp", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


class SignalAction(ctypes.Structure):
    """struct sigaction of the C library."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ulong * 16),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
SA_SIGINFO, SA_ONSTACK = 0x4, 0x08000000


def _fail(what: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number), what)


def _address(value: int | None, what: str) -> int:
    if value is None or value == _FAILED:
        raise _fail(what)
    return value


def _zero(value: int, what: str) -> None:
    if value != 0:
        raise _fail(what)


def memory(length: int, prot: int = READ_WRITE, flags: int = 0, fd: int = -1, offset: int = 0, at: int = 0) -> int:
    """mmap(2), private unless `flags` says shared, anonymous without `fd`: the address. Raises OSError."""
    flags |= (0 if flags & MAP_SHARED else MAP_PRIVATE) | (MAP_ANONYMOUS if fd < 0 else 0) | (MAP_FIXED if at else 0)
    where, size, place = ctypes.c_void_p(at), ctypes.c_size_t(length), ctypes.c_long(offset)
    return _address(_libc.mmap(where, size, prot, flags, fd, place), "mmap")


def aligned(length: int, alignment: int) -> int:
    """Private anonymous memory whose address is a multiple of `alignment`. Raises OSError."""
    start = memory(length + alignment)
    address = -(-start // alignment) * alignment
    if address > start:
        unmap(start, address - start)
    if start + alignment > address:
        unmap(address + length, start + alignment - address)
    return address


def unmap(address: int, length: int) -> None:
    _zero(_libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(length)), "munmap")


def protect(address: int, length: int, prot: int) -> None:
    _zero(_libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(length), prot), "mprotect")


def advise(address: int, length: int, advice: int) -> None:
    _zero(_libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(length), advice), "madvise")


def lock(address: int, length: int) -> None:
    _zero(_libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(length)), "mlock")


def move(address: int, length: int) -> int:
    """Moves a mapping to another address, and returns that. Raises OSError."""
    target = memory(length, PROT_NONE)
    size, flags = ctypes.c_size_t(length), _MREMAP_MAYMOVE | _MREMAP_FIXED
    return _address(_libc.mremap(ctypes.c_void_p(address), size, size, flags, ctypes.c_void_p(target)), "mremap")


def extend_heap(length: int) -> int:
    """brk(2) memory after the allocator's, page-aligned: its address. Raises OSError."""
    now = _address(_libc.sbrk(ctypes.c_long(0)), "sbrk")
    pad = -now % PAGE
    return _address(_libc.sbrk(ctypes.c_long(length + pad)), "sbrk") + pad


def system_v(length: int) -> int:
    """A System V shared memory segment without a name, attached: its address. Raises OSError."""
    segment = _libc.shmget(0, ctypes.c_size_t(length), _IPC_CREAT | 0o600)
    if segment < 0:
        raise _fail("shmget")
    return _address(_libc.shmat(segment, None, 0), "shmat")


def write(address: int, data: bytes) -> None:
    ctypes.memmove(address, data, len(data))


def read(address: int, length: int) -> bytes:
    return ctypes.string_at(address, length)


def zero(address: int, length: int) -> None:
    ctypes.memset(address, 0, length)


def current_cpu() -> int:
    """sched_getcpu(3): out of the thread's rseq area where the C library has registered one."""
    found: int = _libc.sched_getcpu()
    return found


def own_stack() -> tuple[int, int]:
    """Lowest address and size of the calling thread's stack. Raises OSError."""
    attributes = ctypes.create_string_buffer(128)
    address, size = ctypes.c_void_p(), ctypes.c_size_t()
    _libc.pthread_self.restype = ctypes.c_ulong
    _zero(_libc.pthread_getattr_np(ctypes.c_ulong(_libc.pthread_self()), attributes), "pthread_getattr_np")
    _zero(_libc.pthread_attr_getstack(attributes, ctypes.byref(address), ctypes.byref(size)), "pthread_attr_getstack")
    _libc.pthread_attr_destroy(attributes)
    return address.value or 0, size.value


def alternate_stack(address: int = 0, size: int = 0) -> tuple[int, int]:
    """The calling thread's alternate signal stack; with `address`, sets it first. Raises OSError."""
    if address:
        _zero(_libc.sigaltstack(ctypes.byref(Stack(address, 0, size)), None), "sigaltstack")
    old = Stack()
    _zero(_libc.sigaltstack(None, ctypes.byref(old)), "sigaltstack")
    return old.sp or 0, old.size


def on_alternate_stack(number: int, handler: Any) -> None:
    """sigaction(2) with a `HANDLER`, which runs on the alternate stack; keep a reference to it. Raises OSError."""
    action = SignalAction(ctypes.cast(handler, ctypes.c_void_p), flags=SA_SIGINFO | SA_ONSTACK)
    _zero(_libc.sigaction(number, ctypes.byref(action), None), "sigaction")


def queue_signal(pid: int, number: int, value: int) -> None:
    """sigqueue(3). Raises OSError."""
    _zero(_libc.sigqueue(pid, number, ctypes.c_void_p(value)), "sigqueue")


def signal_value(info: int) -> tuple[int, int]:
    """Sender's pid and value out of a siginfo_t of sigqueue(3)."""
    return ctypes.c_int.from_address(info + 16).value, ctypes.c_long.from_address(info + 24).value
