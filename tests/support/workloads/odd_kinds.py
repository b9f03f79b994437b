"""Kinds of memory that few programs have."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from support.workloads import raw
from support.workloads.odd_base import PROT_EXEC, Kind, libc, prctl, syscall
from support.workloads.raw import MIB, PAGE

# <sys/syscall.h> of x86-64, <linux/mman.h>, <linux/prctl.h>, <linux/ptrace.h>, <linux/sched.h>, <linux/fcntl.h>
USERFAULTFD, MEMFD_SECRET = 323, 447
MADV_MERGEABLE, MADV_GUARD_INSTALL = 12, 102
PR_GET_DUMPABLE, PR_SET_DUMPABLE, PR_SET_THP_DISABLE, PR_GET_THP_DISABLE, PR_SET_MEMORY_MERGE = 3, 4, 41, 42, 67
PTRACE_TRACEME, CLONE_VM = 0, 0x100
F_SEAL_FUTURE_WRITE = 0x10
# mov $34, %eax (pause); syscall; jmp to the beginning
PAUSE = bytes.fromhex("b8220000000f05ebf7")


class Code(Kind):
    """Memory that can be read and run, as a compiler at run time leaves it; and memory that can only be run."""

    def make(self) -> None:
        self.both = self.memory(prot=raw.PROT_READ | PROT_EXEC)
        self.only = self.memory(prot=PROT_EXEC)
        address = raw.memory(MIB, raw.READ_WRITE | PROT_EXEC)
        self.fill(address)
        raw.write(address + MIB // 2, bytes.fromhex("b82a000000c3"))  # mov $42, %eax; ret
        raw.protect(address, MIB, PROT_EXEC)
        self.call = ctypes.CFUNCTYPE(ctypes.c_int)(address + MIB // 2)

    def check(self) -> Any:
        return self.call()


class Guard(Kind):
    """Pages that fault when they are touched, inside of other memory (MADV_GUARD_INSTALL, Linux 6.13)."""

    def make(self) -> None:
        address = raw.memory(2 * MIB + 4 * PAGE)
        self.fill(address)
        self.fill(address + MIB + 4 * PAGE)
        raw.advise(address + MIB, 4 * PAGE, MADV_GUARD_INSTALL)
        self.at = address + MIB + PAGE

    def check(self) -> Any:
        with open("/proc/self/mem", "rb", buffering=0) as memory:
            try:
                os.pread(memory.fileno(), 8, self.at)
            except OSError as error:
                return errno.errorcode[error.errno or 0]
        return "readable"


class Merged(Kind):
    def make(self) -> None:
        prctl(PR_SET_MEMORY_MERGE, 1)
        raw.advise(self.memory(), MIB, MADV_MERGEABLE)


class Secret(Kind):
    def make(self) -> None:
        fd = syscall(MEMFD_SECRET, 0)
        os.ftruncate(fd, MIB)
        self.memory(flags=raw.MAP_SHARED, fd=fd)
        self.at = self.spans.pop()[0]

    def check(self) -> Any:
        return hashlib.sha256(raw.read(self.at, MIB)).hexdigest()


class OneMemory(Kind):
    """Two processes, no threads, with one memory."""

    def make(self) -> None:
        self.memory()
        code = raw.memory(PAGE, raw.READ_WRITE | PROT_EXEC)
        raw.write(code, PAUSE)
        stack = raw.memory(MIB)
        flags = CLONE_VM | signal.SIGCHLD
        child = libc.clone(ctypes.c_void_p(code), ctypes.c_void_p(stack + MIB), flags, None)
        assert child > 0


class UserFault(Kind):
    def make(self) -> None:
        self.fd = syscall(USERFAULTFD, 1)
        self.memory()


class Traced(Kind):
    def make(self) -> None:
        self.memory()
        self.child = os.fork()
        if self.child == 0:
            libc.ptrace(PTRACE_TRACEME, 0, None, None)
            os.kill(os.getpid(), signal.SIGSTOP)
            os._exit(0)
        os.waitpid(self.child, os.WUNTRACED)


class HugeZero(Kind):
    """The huge page of zeros, which reading puts in place, and one that was written to and is zeros again."""

    def make(self) -> None:
        address = raw.aligned(8 * MIB, 2 * MIB)
        raw.advise(address, 8 * MIB, raw.MADV_HUGEPAGE)
        raw.read(address, 4 * MIB)
        raw.write(address + 4 * MIB, b"x")
        raw.zero(address + 4 * MIB, 1)
        self.fill(address + 6 * MIB, 2 * MIB)
        self.spans = [(address, 8 * MIB)]


class NoLeader(Kind):
    """A process whose first thread has ended."""

    def make(self) -> None:
        self.memory()
        reading, writing = os.pipe()
        self.child = os.fork()
        if self.child == 0:
            self.memory(4 * MIB)
            threading.Thread(target=self.stay, args=(writing,)).start()
            libc.pthread_exit(None)
        os.read(reading, 1)
        time.sleep(0.2)

    def stay(self, writing: int) -> None:
        os.write(writing, b"x")
        time.sleep(10**6)


class Zero(Kind):
    """/dev/zero, mapped privately and shared."""

    def make(self) -> None:
        fd = os.open("/dev/zero", os.O_RDWR)
        self.memory(fd=fd)
        self.memory(fd=fd, flags=raw.MAP_SHARED)


class NoHuge(Kind):
    def make(self) -> None:
        prctl(PR_SET_THP_DISABLE, 1)
        self.memory(8 * MIB)

    def check(self) -> Any:
        return libc.prctl(PR_GET_THP_DISABLE, 0, 0, 0, 0)


class Undumpable(Kind):
    """A process of which no core may be dumped: its /proc belongs to root, and another user may not trace it."""

    def make(self) -> None:
        self.memory(4 * MIB)
        self.memory(4 * MIB, prot=raw.PROT_READ)
        prctl(PR_SET_DUMPABLE, 0)

    def check(self) -> Any:
        return libc.prctl(PR_GET_DUMPABLE, 0, 0, 0, 0)


class Memfds(Kind):
    """One of a size that is no whole number of pages, sealed ones, and a private mapping of one."""

    def make(self) -> None:
        self.plain, private = self.memfd(MIB), 8 * PAGE
        self.spans.append((raw.memory(MIB, fd=self.plain), MIB))
        raw.write(self.spans[-1][0] + private, random.Random(8).randbytes(MIB // 2))
        self.fds = [self.memfd(MIB + 100), self.memfd(MIB), self.memfd(MIB), self.plain]
        for fd, seals in zip(self.fds, (fcntl.F_SEAL_SHRINK, F_SEAL_FUTURE_WRITE, fcntl.F_SEAL_WRITE), strict=False):
            if seals != fcntl.F_SEAL_WRITE:
                size = -(-os.fstat(fd).st_size // PAGE) * PAGE
                self.spans.append((raw.memory(size, flags=raw.MAP_SHARED, fd=fd), size))
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)

    def memfd(self, size: int) -> int:
        fd = os.memfd_create("odd", os.MFD_ALLOW_SEALING)
        os.write(fd, random.Random(fd).randbytes(size))
        return fd

    def check(self) -> Any:
        return [
            (
                os.fstat(fd).st_size,
                fcntl.fcntl(fd, fcntl.F_GET_SEALS),
                hashlib.sha256(os.pread(fd, 2 * MIB, 0)).hexdigest(),
            )
            for fd in self.fds
        ]


KINDS: dict[str, Callable[[], Kind]] = {
    "code": Code,
    "guard": Guard,
    "huge-zero": HugeZero,
    "memfds": Memfds,
    "merged": Merged,
    "no-huge": NoHuge,
    "no-leader": NoLeader,
    "one-memory": OneMemory,
    "secret": Secret,
    "traced": Traced,
    "undumpable": Undumpable,
    "userfault": UserFault,
    "zero": Zero,
}
