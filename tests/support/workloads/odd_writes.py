"""Ways in which the kernel itself writes to the memory of a program."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import random
import signal
import struct
import threading
import time
from collections.abc import Callable
from typing import Any

from support.workloads import raw
from support.workloads.odd_base import PROT_EXEC, Kind, libc, syscall
from support.workloads.raw import MIB, PAGE

# <sys/syscall.h> of x86-64
IO_SETUP, IO_GETEVENTS, IO_SUBMIT = 206, 208, 209


def counting(address: int) -> ctypes.c_void_p:
    """A signal handler that adds 1 to the word at `address` and needs no stack of its own."""
    code = raw.memory(PAGE, raw.READ_WRITE | PROT_EXEC)
    # movabs $address, %rax; lock incl (%rax); ret
    raw.write(code, bytes.fromhex("48b8") + struct.pack("<Q", address) + bytes.fromhex("f0ff00c3"))
    return ctypes.c_void_p(code)


def fork_on_memory(run: Callable[[], None]) -> int:
    """A child that runs on the stack of a thread: memory like any other, not the kernel's kind, which is not carved."""
    found: list[int] = []

    def fork() -> None:
        child = os.fork()
        if child == 0:
            run()
            os._exit(0)
        found.append(child)

    before = threading.stack_size(8 * MIB)
    thread = threading.Thread(target=fork)
    thread.start()
    threading.stack_size(before)
    thread.join()
    return found[0]


def dirty(size: int, distance: int) -> int:
    """Fill `size` bytes of this thread's stack, `distance` (and what filling itself needs) below its pointer; returns
    the lowest address."""
    code = raw.memory(PAGE, raw.READ_WRITE | PROT_EXEC)
    raw.write(code, bytes.fromhex("4889e0c3"))  # mov %rsp, %rax; ret
    pointer = ctypes.CFUNCTYPE(ctypes.c_ulong)(code)()
    top = (int(pointer) - distance - (16 << 10)) & -PAGE
    raw.write(top - size, random.Random(3).randbytes(size))
    return top - size


class Aio(Kind):
    """An AIO ring with an event that nobody has fetched yet."""

    def make(self) -> None:
        self.context = ctypes.c_ulong()
        syscall(IO_SETUP, 64, ctypes.byref(self.context))
        self.buffer = self.memory()
        self.fd = os.open("/etc/os-release", os.O_RDONLY)
        self.left = 0
        self.submit(1)

    def submit(self, tag: int) -> None:
        # struct iocb of <linux/aio_abi.h>: the first 64 bytes of the file into the memory
        block = struct.pack("<QIIHhIQQqQII", tag, 0, 0, 0, 0, self.fd, self.buffer, 64, 0, 0, 0, 0)
        self.block = ctypes.create_string_buffer(block)
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(self.block))
        syscall(IO_SUBMIT, self.context.value, 1, ctypes.byref(pointers))

    def check(self) -> Any:
        events = ctypes.create_string_buffer(32 * 4)
        self.submit(2)
        got = syscall(IO_GETEVENTS, self.context.value, 2, 4, ctypes.byref(events), None)
        found = [struct.unpack_from("<QQqq", events.raw, 32 * at)[::2] for at in range(got)]
        self.submit(1)
        return sorted(found)


class Join(Kind):
    """The kernel clears a thread's number in memory when it ends, which is what a join waits for."""

    def make(self) -> None:
        self.go = os.pipe()
        self.start()

    def start(self) -> None:
        def run(_argument: int) -> int:
            address, size = raw.own_stack()
            raw.write(address, random.Random(3).randbytes(size // 2))
            self.stack = address, size // 2
            self.ready = True
            os.read(self.go[0], 1)
            return 7

        self.ready = False
        self.run = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(run)
        self.thread = ctypes.c_ulong()
        assert libc.pthread_create(ctypes.byref(self.thread), None, self.run, None) == 0
        while not self.ready:
            time.sleep(0.01)
        self.spans = [self.stack]

    def check(self) -> Any:
        os.write(self.go[1], b"x")
        value = ctypes.c_void_p()
        until = (ctypes.c_long * 2)(int(time.time()) + 10, 0)
        status = libc.pthread_timedjoin_np(self.thread, ctypes.byref(value), ctypes.byref(until))
        self.start()
        return [status, value.value]


class Robust(Kind):
    """A robust mutex in shared memory, held by a process that dies: the kernel says so in the mutex."""

    def make(self) -> None:
        address = self.fill(raw.memory(MIB, flags=raw.MAP_SHARED), MIB - PAGE)
        self.mutex = ctypes.c_void_p(address + MIB - PAGE)
        attributes = ctypes.create_string_buffer(64)
        libc.pthread_mutexattr_init(attributes)
        libc.pthread_mutexattr_setpshared(attributes, 1)
        libc.pthread_mutexattr_setrobust(attributes, 1)
        assert libc.pthread_mutex_init(self.mutex, attributes) == 0
        self.hold()

    def hold(self) -> None:
        reading, writing = os.pipe()
        self.holder = os.fork()
        if self.holder == 0:
            libc.pthread_mutex_lock(self.mutex)
            os.write(writing, b"x")
            while True:
                signal.pause()
        os.read(reading, 1)
        os.close(reading)
        os.close(writing)

    def check(self) -> Any:
        busy = libc.pthread_mutex_trylock(self.mutex)
        os.kill(self.holder, signal.SIGKILL)
        os.waitpid(self.holder, 0)
        owner_died = libc.pthread_mutex_trylock(self.mutex)
        libc.pthread_mutex_consistent(self.mutex)
        libc.pthread_mutex_unlock(self.mutex)
        self.hold()
        return [errno.errorcode[busy], errno.errorcode[owner_died]]


class Timer(Kind):
    """A signal every 100 us, handled on a stack below whose pointer there is content of former calls."""

    def make(self) -> None:
        self.memory(4 * MIB)
        self.count = raw.memory(PAGE, flags=raw.MAP_SHARED)
        self.hold, self.never = os.pipe()
        self.child = fork_on_memory(self.run)

    def run(self) -> None:
        dirty(2 * MIB, 0)
        raw.on_alternate_stack(signal.SIGALRM, counting(self.count))
        signal.setitimer(signal.ITIMER_REAL, 0.0001, 0.0001)
        os.read(self.hold, 1)

    def check(self) -> Any:
        before = raw.read(self.count, 4)
        time.sleep(0.2)
        return raw.read(self.count, 4) != before


class Pending(Kind):
    """A stopped process with many signals pending, whose handlers all run at once, one above the other on the stack."""

    # Those that end it otherwise, are for stopping, or that CRIU refuses (SIGTRAP).
    numbers = tuple(set(range(1, 32)) - {5, 9, 17, 18, 19, 20, 21, 22})

    def make(self) -> None:
        self.memory()
        self.begin()

    def begin(self) -> None:
        self.answers, self.writing = os.pipe()
        self.child = fork_on_memory(self.run)
        os.close(self.writing)
        os.waitid(os.P_PID, self.child, os.WSTOPPED | os.WNOWAIT)
        for number in self.numbers:
            os.kill(self.child, number)

    def run(self) -> None:
        address = dirty(3 * MIB, MIB)
        counter = raw.memory(PAGE)
        handler = counting(counter)
        for number in self.numbers:
            raw.on_alternate_stack(number, handler)
        os.kill(os.getpid(), signal.SIGSTOP)
        state = hashlib.sha256(raw.read(address, 3 * MIB)).hexdigest()
        os.write(self.writing, f"{raw.read(counter, 4)[0]} signals, {state}".encode())
        while True:
            time.sleep(1000)

    def check(self) -> Any:
        os.kill(self.child, signal.SIGCONT)
        found = os.read(self.answers, 200).decode()
        os.kill(self.child, signal.SIGKILL)
        os.waitpid(self.child, 0)
        os.close(self.answers)
        self.begin()
        return found


KINDS: dict[str, Callable[[], Kind]] = {
    "aio": Aio,
    "join": Join,
    "pending": Pending,
    "robust": Robust,
    "timer": Timer,
}
