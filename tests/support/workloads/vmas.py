"""A process tree that holds every kind of memory: private, shared, copy-on-write, locked, hidden, huge, sparse.

The parent ("parent") forks "left", which forks "grandchild", then "right", then "stopped", which stops itself with a
signal pending. Threads of the parent have content below their stack pointers and alternate signal stacks.

GET /hash      {process: {area: digest}}
GET /state     pids, smaps_rollup of each process, which kinds there are, bytes that are not zero
GET /areas     {process: {area: rights, flags, Rss and so on}}
GET /shared    {memory: whether a byte written by one process is read by the others}
GET /frames    whether the main thread returns through its deep stack
GET /cpus      each thread's CPU by sched_getcpu(3) and by /proc; POST /cpus with a number: after pinning all to it
GET /continue  what the stopped process's handler saw once it goes on
Environment: PORT (8000), SHRINK (1) divides the sizes.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

from support.workloads import raw, vmas_family, web
from support.workloads.raw import MIB, PAGE
from support.workloads.threads import Worker
from support.workloads.vmas_areas import Areas

SHARED = ("shared", "memfd mapping", "memfd closed", "part of a memfd", "system-v")
DEPTH = 2500
SIGNAL_VALUE = 4711


class Thread(Worker):
    """A thread whose stack holds content far below its stack pointer, and that has an alternate signal stack."""

    def __init__(self, areas: Areas, number: int) -> None:
        self.areas = areas
        super().__init__(f"thread-{number}", self.prepare)

    def prepare(self) -> None:
        address, size = raw.own_stack()
        # The low half: the thread itself never gets there, and nothing but the kernel knows what is in it.
        self.areas.dense(self.areas.add(f"stack of {self.name}", address, size // 2), size // 2)
        size = MIB
        self.alternate = raw.memory(size), size
        self.areas.dense(self.areas.add(f"signal stack of {self.name}", *self.alternate), size)
        raw.alternate_stack(*self.alternate)

    def cpu(self) -> dict[str, int]:
        """By sched_getcpu(3), and by field 39 of the thread's stat."""
        stat = Path(f"/proc/self/task/{threading.get_native_id()}/stat").read_text()
        return {"getcpu": raw.current_cpu(), "stat": int(stat.rpartition(")")[2].split()[36])}

    def pin(self, cpu: int) -> dict[str, int]:
        os.sched_setaffinity(0, {cpu})
        return self.cpu()


class Vmas:
    """The parent. Areas come before children, children before threads: fork(2) takes one thread along."""

    def __init__(self, shrink: int) -> None:
        self.nonce = os.urandom(16).hex()
        self.areas = Areas(shrink)
        self.areas.private()
        self.areas.files()
        self.areas.shared()
        size = self.areas.size(96)
        self.areas.dense(self.areas.add("cow", raw.memory(size), size), size)
        self._stack(self.areas.size(4))
        self.peers: dict[str, vmas_family.Peer] = {}
        self.pids = {"parent": os.getpid()}
        mine, theirs = socket.socketpair()
        # The grandchild answers through the socket that its parent got.
        run = vmas_family.child(self.areas, 1, moved=True, grandchild=theirs)
        self.pids["left"], self.peers["left"] = vmas_family.spawn(run)
        theirs.close()
        self.peers["grandchild"] = vmas_family.Peer(mine)
        self.pids["grandchild"] = self.peers["grandchild"].ask("pid")
        run = vmas_family.child(self.areas, 3, moved=False, grandchild=None)
        self.pids["right"], self.peers["right"] = vmas_family.spawn(run)
        self.pids["stopped"], self.stopped = vmas_family.spawn(vmas_family.stopped(self.areas))
        self.stopped.answer()
        os.waitid(os.P_PID, self.pids["stopped"], os.WSTOPPED | os.WNOWAIT)
        raw.queue_signal(self.pids["stopped"], vmas_family.NUMBER, SIGNAL_VALUE)
        self.continued: Any = None
        self._handlers = vmas_family.handlers(self.areas)
        threading.stack_size(2 * MIB)
        self.threads = [Thread(self.areas, number) for number in range(2)]
        threading.stack_size(0)
        self.lock = threading.Lock()
        self.unwind = threading.Event()
        self.returned: list[int] = []
        self.wound = threading.Condition()

    def _stack(self, size: int) -> None:
        """Content on the main thread's stack, out of reach of its own frames."""
        lines = Path("/proc/self/maps").read_text().splitlines()
        end = int(next(line for line in lines if line.endswith("[stack]")).split()[0].split("-")[1], 16)
        bottom = end - 7 * MIB - MIB // 2
        source = random.Random(6)
        for address in range(bottom + size - PAGE, bottom - PAGE, -PAGE):
            raw.write(address, source.randbytes(PAGE))
        self.areas.content["private"] += size
        self.areas.add("stack", bottom, size)

    def ask(self, process: str, what: str, value: Any = None) -> Any:
        return self._handlers[what](value) if process == "parent" else self.peers[process].ask(what, value)

    def everyone(self, what: str) -> dict[str, Any]:
        return {process: self.ask(process, what) for process in ("parent", *self.peers)}

    def state(self, _body: bytes) -> dict[str, Any]:
        status = Path("/proc/self/status").read_text()
        return {
            "nonce": self.nonce,
            "pids": self.pids,
            "memory": {name: vmas_family.rollup(pid) for name, pid in self.pids.items()},
            "has": self.areas.has,
            "content": self.areas.content,
            "locked": int(status.split("VmLck:")[1].split()[0]) << 10,
            "alternate": [thread.do(raw.alternate_stack) == thread.alternate for thread in self.threads],
            "stopped": Path(f"/proc/{self.pids['stopped']}/stat").read_text().rpartition(")")[2].split()[0],
        }

    def shared(self, _body: bytes) -> dict[str, bool]:
        """A byte written by each in turn is read by all; the old one comes back afterwards."""
        found = {}
        everyone = ("parent", *self.peers)
        for area in SHARED:
            if area not in self.areas.found:
                continue
            at, good = 5 * PAGE + 17, True
            for writer in everyone:
                old = self.ask(writer, "peek", {"area": area, "at": at})
                self.ask(writer, "poke", {"area": area, "at": at, "byte": old ^ 0xFF})
                good &= all(self.ask(who, "peek", {"area": area, "at": at}) == old ^ 0xFF for who in everyone)
                self.ask(writer, "poke", {"area": area, "at": at, "byte": old})
            found[area] = good
        return found

    def cpus(self, body: bytes) -> list[dict[str, int]]:
        return [thread.do(partial(thread.pin, int(body)) if body else thread.cpu) for thread in self.threads]

    def resume(self, _body: bytes) -> Any:
        """Lets the stopped process go on, once; from then on it answers like the others."""
        if self.continued is None:
            os.kill(self.pids["stopped"], signal.SIGCONT)
            self.continued = self.stopped.answer()
            self.peers["stopped"] = self.stopped
        return self.continued

    def frames(self, _body: bytes) -> dict[str, bool]:
        """The main thread returns through all of its frames, adding up what it kept in them, and goes down again."""
        with self.wound:
            count = len(self.returned)
            self.unwind.set()
            self.wound.wait_for(lambda: len(self.returned) > count, 60)
            return {"frames": self.returned[count:] == [sum(range(DEPTH))]}

    def wait(self, depth: int) -> int:
        """Frames of C between those of Python, so that the stack is the kernel's, not the interpreter's."""
        if depth == 0:
            self.unwind.wait()
            return 0
        return depth - 1 + max([depth - 1], key=self._deeper) * 0 + self._below

    def _deeper(self, depth: int) -> int:
        self._below = self.wait(depth)
        return depth

    def run_main(self) -> None:
        sys.setrecursionlimit(20 * DEPTH)
        while True:
            total = self.wait(DEPTH)
            with self.wound:
                self.unwind.clear()
                self.returned.append(total)
                self.wound.notify_all()


def main() -> None:
    vmas = Vmas(int(os.environ.get("SHRINK", "1")))

    def locked(route: web.Route) -> web.Route:
        def call(body: bytes) -> Any:
            with vmas.lock:
                return route(body)

        return call

    routes: dict[str, web.Route] = {
        "/hash": lambda _body: vmas.everyone("hash"),
        "/areas": lambda _body: vmas.everyone("areas"),
        "/state": vmas.state,
        "/shared": vmas.shared,
        "/frames": vmas.frames,
        "/cpus": vmas.cpus,
        "/continue": vmas.resume,
    }
    web.start(web.port(), {path: locked(route) for path, route in routes.items()})
    vmas.run_main()


if __name__ == "__main__":
    main()
