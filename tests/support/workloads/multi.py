"""A process tree that holds one of everything a snapshot has to bring back; it checks itself.

Parent and two children (one served by pipes, one a uvloop event loop), shared memory and an unlinked semaphore in
/dev/shm and a named one, pipes in constant use, a listening unix socket, a socket pair, a deleted open file, an open
file that has lost the name it was opened by and kept another, threads with CPU affinities and a NUMA memory policy of
their own, TCP clients, and a root filesystem with a changed, a deleted, a new and a hard-linked file and a directory
made anew.

GET /state -> what there is; GET /check -> {"name of the check": true or false}. TCP echo on PORT + 1 (lines).
Environment: PORT (8000).
"""

from __future__ import annotations

import ctypes
import mmap
import multiprocessing
import os
import random
import shutil
import socket
import threading
import time
from collections.abc import Callable
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

from support.workloads import syscalls, web
from support.workloads.multi_worker import SHARED_SIZE, digest, loop_worker, pipe_worker, rings
from support.workloads.semaphore import NamedSemaphore
from support.workloads.threads import Worker

UNIX_SOCKET = "/run/multi.sock"
CHANGED = Path("/etc/debian_version")  # of the base image
DELETED = Path("/etc/issue")
REMADE = Path("/etc/default")  # a directory of the base image, removed and made again: opaque in the upper directory
CREATED = Path("/var/lib/multi")


class Pipes:
    """The pipe child: one request at a time, and a thread that pings it every 5 ms."""

    def __init__(self, shared: SharedMemory, named: NamedSemaphore) -> None:
        context = multiprocessing.get_context("fork")
        self.semaphore = context.Semaphore(1)  # sem_open(3) and sem_unlink(3): a deleted file of /dev/shm, mapped
        requests, self._requests = context.Pipe(duplex=False)
        self._answers, answers = context.Pipe(duplex=False)
        self.process = context.Process(
            target=pipe_worker, args=(requests, answers, shared.name, self.semaphore, named), daemon=True
        )
        self.process.start()
        requests.close()
        answers.close()
        self._lock = threading.Lock()
        self.pings = 0
        self.wrong = 0

    def ask(self, what: str, value: Any = None) -> Any:
        with self._lock:
            self._requests.send((what, value))
            if not self._answers.poll(20):
                raise TimeoutError(f"pipe child: no answer to {what}")
            return self._answers.recv()

    def ping_forever(self) -> None:
        while True:
            if self.ask("ping", self.pings) != self.pings + 1:
                self.wrong += 1
            self.pings += 1
            time.sleep(0.005)


def ask_loop(word: str) -> str:
    """One line to the event loop's unix socket and back."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(20)
        client.connect(UNIX_SOCKET)
        client.sendall(word.encode() + b"\n")
        return client.makefile().readline().strip()


class Multi:
    """Everything the parent holds, and what it was when it was made."""

    def __init__(self, port: int) -> None:
        self.nonce = os.urandom(16).hex()
        self.shared = SharedMemory(create=True, size=SHARED_SIZE)
        assert self.shared.buf is not None
        self.shared.buf[:SHARED_SIZE] = random.Random(7).randbytes(SHARED_SIZE)
        self.shared_sum = digest(self.shared.buf)
        self.named = NamedSemaphore("multi")
        # Children before threads: fork(2) takes one thread along.
        self.pipes = Pipes(self.shared, self.named)
        self.loop_pid = self._start_loop(port + 1)
        self.pair = socket.socketpair()
        self.deleted_content = random.Random(8).randbytes(100_000)
        self.deleted = os.open("/tmp/deleted", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        os.write(self.deleted, self.deleted_content)
        os.unlink("/tmp/deleted")
        self._change_root()
        self._make_threads()
        self.expected = {"affinity": self.affinity(), "policy": self.policy()}
        threading.Thread(target=self.pipes.ping_forever, name="pings", daemon=True).start()

    def _start_loop(self, port: int) -> int:
        context = multiprocessing.get_context("fork")
        ready, send = context.Pipe(duplex=False)
        self.loop = context.Process(target=loop_worker, args=(port, UNIX_SOCKET, send), daemon=True)
        self.loop.start()
        send.close()
        pid: int = ready.recv()
        ready.close()
        return pid

    def _change_root(self) -> None:
        CHANGED.write_text("rewarm\n")
        DELETED.unlink()
        shutil.rmtree(REMADE)
        REMADE.mkdir()
        (REMADE / "multi").write_text("new\n")
        CREATED.mkdir()
        (CREATED / "file").write_text(self.nonce)
        (CREATED / "link").hardlink_to(CREATED / "file")
        self.renamed = os.open(CREATED / "opened", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o640)
        os.write(self.renamed, self.nonce.encode())
        (CREATED / "kept").hardlink_to(CREATED / "opened")
        (CREATED / "opened").unlink()

    def _make_threads(self) -> None:
        cpus = sorted(os.sched_getaffinity(0))
        self.threads = {
            "first": Worker("first", lambda: os.sched_setaffinity(0, {cpus[0]})),
            "last": Worker("last", lambda: os.sched_setaffinity(0, {cpus[-1]})),
            "numa": Worker("numa", lambda: syscalls.set_memory_policy(syscalls.MPOL_PREFERRED, [0])),
        }
        self.mapping = mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.mapping_address = ctypes.addressof(ctypes.c_char.from_buffer(self.mapping))
        syscalls.bind_memory(self.mapping_address, len(self.mapping), syscalls.MPOL_BIND, [0])
        self.mapping.write(b"\1" * len(self.mapping))

    def affinity(self) -> dict[str, list[int]]:
        """CPUs of each thread, and of the pipe child."""
        own = {name: thread.do(lambda: sorted(os.sched_getaffinity(0))) for name, thread in self.threads.items()}
        return {**own, "main": sorted(os.sched_getaffinity(os.getpid())), "child": self.pipes.ask("state")["affinity"]}

    def policy(self) -> dict[str, Any]:
        """Mode and nodes: of the thread that set one, of one that did not, of the bound mapping."""
        return {
            "numa": list(self.threads["numa"].do(syscalls.memory_policy)),
            "first": list(self.threads["first"].do(syscalls.memory_policy)),
            "mapping": list(syscalls.memory_policy(self.mapping_address)),
        }

    def state(self, _body: bytes = b"") -> dict[str, Any]:
        loop_pid, opened, closed, loop_rings, loop_errno, version = ask_loop("state").split()
        return {
            "nonce": self.nonce,
            "pid": os.getpid(),
            "hostname": socket.gethostname(),
            "child": self.pipes.ask("state"),
            "pings": self.pipes.pings,
            "pings_wrong": self.pipes.wrong,
            "threads": {name: thread.native_id for name, thread in self.threads.items()},
            "affinity": self.affinity(),
            "policy": self.policy(),
            "expected": self.expected,
            "io_uring_errno": syscalls.io_uring_errno(),  # 1 (EPERM) where the runtime denies it, 0 where it works
            "io_uring_rings": rings(),
            "loop": {
                "pid": int(loop_pid),
                "clients_opened": int(opened),
                "clients_closed": int(closed),
                "io_uring_errno": int(loop_errno),
                "io_uring_rings": int(loop_rings),
                "uvloop": version,
            },
            "shm": sorted(os.listdir("/dev/shm")),
        }

    def check(self, _body: bytes = b"") -> dict[str, bool]:
        checks: dict[str, Callable[[], bool]] = {
            "shared memory": lambda: digest(memoryview(self.shared.buf or b"")) == self.shared_sum,
            "shared memory in child": lambda: self.pipes.ask("shared") == self.shared_sum,
            "shared memory by name": lambda: Path(f"/dev/shm/{self.shared.name}").stat().st_size == SHARED_SIZE,
            "shared memory is shared": self._check_shared,
            "semaphore": self._check_semaphore,
            "named semaphore": self._check_named,
            "pipe": self._check_pipe,
            "child memory": lambda: bool(self.pipes.ask("state")["private_intact"]),
            "children alive": lambda: self.pipes.process.is_alive() and self.loop.is_alive(),
            "unix socket": lambda: ask_loop("ping") == "ping",
            "socket pair": self._check_pair,
            "deleted file": lambda: (
                os.fstat(self.deleted).st_nlink == 0 and os.pread(self.deleted, 200_000, 0) == self.deleted_content
            ),
            "affinity": lambda: self.affinity() == self.expected["affinity"],
            "memory policy": lambda: self.policy() == self.expected["policy"],
            "changed file": lambda: CHANGED.read_text() == "rewarm\n",
            "removed file": lambda: not DELETED.exists(),
            "remade directory": lambda: os.listdir(REMADE) == ["multi"],
            "new file": lambda: (CREATED / "file").read_text() == self.nonce,
            "hard link": lambda: (CREATED / "link").samefile(CREATED / "file"),
            "file without its first name": self._check_renamed,
            "nobody else's files": lambda: (
                sorted(os.listdir(CREATED)) == ["file", "kept", "link"]
                and sorted(os.listdir("/dev/shm")) == sorted([self.shared.name, "sem.multi"])
            ),
        }
        return {name: check() for name, check in checks.items()}

    def _check_shared(self) -> bool:
        """A write by the parent is seen by the child; undone afterwards."""
        assert self.shared.buf is not None
        old = self.shared.buf[0]
        self.shared.buf[0] = old ^ 0xFF
        seen = self.pipes.ask("shared")
        self.shared.buf[0] = old
        return bool(seen != self.shared_sum and self.pipes.ask("shared") == self.shared_sum)

    def _check_semaphore(self) -> bool:
        """Held here, it cannot be had there, and the other way round."""
        if not self.pipes.semaphore.acquire(timeout=20):
            return False
        refused = not self.pipes.ask("acquire", 0.05)
        self.pipes.semaphore.release()
        taken = self.pipes.ask("acquire", 20)
        refused_here = not self.pipes.semaphore.acquire(timeout=0.05)
        self.pipes.ask("release")
        return refused and taken and refused_here

    def _check_named(self) -> bool:
        """Posted by the child, it is seen here and by whoever opens it by its name now."""
        before = self.named.value()
        self.pipes.ask("post")
        now = NamedSemaphore("multi")
        try:
            return self.named.value() == now.value() == before + 1
        finally:
            now.close()

    def _check_renamed(self) -> bool:
        """What is written by the descriptor is read by the name that is left."""
        text = os.urandom(4).hex()
        os.pwrite(self.renamed, text.encode(), len(self.nonce))
        return (CREATED / "kept").read_text() == self.nonce + text

    def _check_pipe(self) -> bool:
        before = self.pipes.pings
        time.sleep(0.1)
        return self.pipes.pings > before and self.pipes.wrong == 0

    def _check_pair(self) -> bool:
        self.pair[0].sendall(b"ping")
        return self.pair[1].recv(4) == b"ping"


def main() -> None:
    port = web.port()
    multi = Multi(port)
    lock = threading.Lock()

    def check(body: bytes) -> dict[str, bool]:
        with lock:  # checks change what they check for a moment
            return multi.check(body)

    web.run(port, {"/state": multi.state, "/check": check})


if __name__ == "__main__":
    main()
