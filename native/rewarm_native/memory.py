"""Pages of memory: finding zero and equal ones, and writing them into another, stopped process.

A page has 4096 bytes. A mask is bytes with bit N % 8 of byte N // 8 set for page N, so that
`int.from_bytes(mask, "little")` has bit N. Every function releases the GIL while it works. Failures are OSErrors with
the kernel's errno that name the process and the address.
"""

from __future__ import annotations

import errno
import mmap
import os

from ._native import ffi, lib

PAGE = 4096
WINDOW = 512 * PAGE
"""Bytes that one mask of `write` speaks of."""
MASK_BYTES = WINDOW // PAGE // 8

Buffer = bytes | bytearray | memoryview


def nonzero_pages(data: Buffer) -> int:
    """The mask, as a number, of the pages that hold anything but zeros. `data` is whole pages, 8-byte aligned."""
    pages = _pages(data)
    mask = bytearray((pages + 7) // 8)
    lib.rw_nonzero_pages(ffi.from_buffer(data), pages, ffi.from_buffer(mask))
    return int.from_bytes(mask, "little")


def equal_pages(one: Buffer, other: Buffer) -> int:
    """The mask, as a number, of the pages that are the same in both; both have the same length."""
    pages = _pages(one)
    if len(other) != len(one):
        raise ValueError(f"{len(one)} and {len(other)} bytes to compare")
    mask = bytearray((pages + 7) // 8)
    lib.rw_equal_pages(ffi.from_buffer(one), ffi.from_buffer(other), pages, ffi.from_buffer(mask))
    return int.from_bytes(mask, "little")


def populate(space: mmap.mmap) -> None:
    """Have the kernel find the pages of a mapping now, and not when they are first written. Raises OSError, EINVAL
    before Linux 5.14."""
    if error := lib.rw_populate(ffi.from_buffer(space, require_writable=True), len(space)):
        raise OSError(-error, os.strerror(-error))


def pack_pages(data: memoryview | bytearray, mask: int) -> int:
    """Move the pages of `mask` together at the beginning of `data`; returns how many bytes they are."""
    pages = _pages(data)
    packed = mask.to_bytes((pages + 7) // 8, "little")
    return int(lib.rw_pack_pages(ffi.from_buffer(data, require_writable=True), pages, ffi.from_buffer(packed))) * PAGE


class Target:
    """The memory of one process to write to; close it after use. Raises OSError: ESRCH when the process is gone."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._pidfd = os.pidfd_open(pid)
        self._memory = -1

    def write(self, base: int, mask: bytes, data: memoryview) -> None:
        """Write `data` to the pages of `mask` (MASK_BYTES) counted from address `base`: process_vm_writev(2).

        Pages are faulted in on the process's account (its memory cgroup), as huge pages where the mapping may have
        them. May be called from several threads. Raises OSError: ESRCH (gone), EFAULT (not mapped, or not writable),
        ENOMEM; EINVAL if mask and length differ.
        """
        result = lib.rw_write_pages(
            self.pid, self._pidfd, base, ffi.from_buffer(mask), ffi.from_buffer(data), len(data)
        )
        if result < 0:
            raise self._error(-result, base)

    def open_forced(self) -> None:
        """Open what `write_forced` writes to, /proc/PID/mem; before threads share the object."""
        if self._memory < 0:
            self._memory = os.open(f"/proc/{self.pid}/mem", os.O_RDWR | os.O_CLOEXEC)

    def write_forced(self, base: int, mask: bytes, data: memoryview) -> None:
        """The same for private mappings that the process itself may not write (kernel: FOLL_FORCE); slower."""
        result = lib.rw_write_forced(self._memory, base, ffi.from_buffer(mask), ffi.from_buffer(data), len(data))
        if result < 0:
            raise self._error(-result, base)

    def close(self) -> None:
        """Again does nothing."""
        for fd in (self._pidfd, self._memory):
            if fd >= 0:
                os.close(fd)
        self._pidfd = self._memory = -1

    def _error(self, number: int, base: int) -> OSError:
        if number == errno.ESRCH:
            return OSError(number, f"write memory of process {self.pid}: the process has ended")
        return OSError(number, f"write memory of process {self.pid} at {base:#x}: {os.strerror(number)}")


def _pages(data: Buffer) -> int:
    if len(data) % PAGE:
        raise ValueError(f"{len(data)} bytes are no whole pages")
    return len(data) // PAGE
