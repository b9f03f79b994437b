"""Device memory taken out of programs and put back as a capture does it, up to where that is killed."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from rewarm import processes
from rewarm.gpu import actions, contexts, descriptors, library, served, taking
from rewarm.gpu.contexts import Context
from rewarm.gpu.pieces import Span
from rewarm.gpu.served import Listed
from rewarm.lifeline import Held, Lifeline
from rewarm_native import cuda, rouse
from rewarm_native.cuda import Driver
from support.fake_gpu import FakeGpus
from support.proc import state_of, wait_for
from support.served_workload import GPU_SERVED, Workload

LIMIT = 20.0
TRIES = 5.0
SIZES = (6, 4, 2)
"""MiB of the allocations of a program, unless told."""
Taken = dict[int, list[tuple[Span, int]]]


class Missed(Exception):
    """Of these nothing was taken."""


class Node:
    """A driver, and programs that are killed in the end."""

    def __init__(self, gpus: FakeGpus, prefix: Path) -> None:
        self.gpus = gpus
        self.driver: Driver = library.load(str(self.gpus.libcuda))
        self._library = prefix / "lib/rewarm-device-memory.so"
        self._started: list[Workload] = []

    def start(self, module: str = GPU_SERVED, **environment: str) -> Workload:
        environment.setdefault("SERVED_MIB", ",".join(map(str, SIZES)))
        self._started.append(Workload(self.gpus, self._library, module, **environment))
        return self._started[-1]

    def close(self) -> None:
        for one in self._started:
            one.close()

    def contexts(self, *started: Workload) -> list[Context]:
        found = {one.pid: one for one in contexts.find(self.driver, [one.pid for one in started])}
        return [found[one.pid] for one in started]

    def away(self, workload: Workload) -> int:
        """How many pieces of a program that runs are not there."""
        found = served.find(workload.pid, LIMIT)
        assert found is not None
        try:
            return sum(one.away for one in found.list())
        finally:
            found.close()


def take(node: Node, found: list[Context], taken: Taken | None = None, timeout: float = TRIES) -> Taken:
    """What was taken, of all. Raises GpuError, Missed."""
    places: Taken = {} if taken is None else taken
    places.update({context.pid: [] for context in found})

    def took(pid: int, piece: Listed, fd: int) -> None:
        places[pid].append((piece.span, fd))

    if missed := taking.take(node.driver, found, timeout, LIMIT, took):
        raise Missed(missed)
    return places


def debugger(pid: int, tid: int, *, keeps_awake: bool = False) -> int:
    """A child that traces a thread until it is killed, and leaves it in a stop, or lets it go on."""
    ready, said = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            rouse.rouse(tid)
            os.write(said, b"x")
            while True:
                if keeps_awake:
                    rouse.keep_awake()
                time.sleep(0.001)
        finally:
            os._exit(1)
    os.close(said)
    try:
        assert os.read(ready, 1) == b"x", f"thread {tid} of {pid} cannot be traced"
    finally:
        os.close(ready)
    return child


def capture(node: Node, context: Context, directory: Path, at: str, helper: int) -> None:
    """Runs in a child: takes, under a lifeline, and comes to its end at that place."""

    def reached(place: str) -> None:
        if place == at:
            os.kill(os.getpid(), signal.SIGKILL)

    held = Held(
        binary="/no/runc",
        root=str(directory),
        id="c1",
        pid=context.pid,
        start=context.start_time,
        owner=os.getpid(),
        directory=str(directory / "capture"),
        libcuda=str(node.gpus.libcuda),
        cuda=((context.pid, context.start_time, context.command),),
        lock_timeout=0.1,
    )
    lifeline = Lifeline(held, os.open(os.devnull, os.O_RDONLY))
    os.write(helper, f"{lifeline._helper.pid}\n".encode())
    lifeline.holding()
    reached("holding")
    descriptors.allow()
    lifeline.taking([context.pid])
    reached("taking")
    count = [0]
    places: Taken = {context.pid: []}

    def took(pid: int, piece: Listed, fd: int) -> None:
        places[pid].append((piece.span, fd))
        reached(f"took {count[0]}")
        lifeline.piece(pid, piece.span, fd)
        reached(f"piece {count[0]}")
        count[0] += 1

    taking.take(node.driver, [context], TRIES, LIMIT, took)
    reached("unmapped")
    lifeline.locked()
    reached("locked")
    lifeline.taken({})
    reached("taken")
    if at:  # the fake loses the memory if it is killed between its last two steps, as a driver does not
        actions.checkpoint(node.driver, [context], LIMIT)
    reached("checkpoint")
    taking.put(node.driver, [context], places, LIMIT)
    reached("put")
    lifeline.released()
    reached("released")
    time.sleep(60)


class Capture:
    """One that ends at a place, or when it is told to."""

    def __init__(self, node: Node, program: Workload, directory: Path, at: str) -> None:
        self.node = node
        self.program = program
        self.at = at
        (self.context,) = node.contexts(program)
        own = directory / str(program.pid)
        (own / "capture").mkdir(parents=True, exist_ok=True)
        heard, said = os.pipe()
        self.child = os.fork()
        if self.child == 0:
            try:
                capture(node, self.context, own, at, said)
            finally:
                os._exit(1)
        os.close(said)
        with open(heard) as file:
            self.helper = int(file.readline())

    def kill(self) -> None:
        os.kill(self.child, signal.SIGKILL)

    def wait(self) -> None:
        """For its end, and that of its helper; then the program runs, and has all."""
        _, status = os.waitpid(self.child, 0)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, self.at
        wait_for(f"the helper of {self.at}", lambda: state_of(self.helper) in (None, "Z"))
        assert processes.start_time(self.program.pid) == self.context.start_time and not self.program.stopped, self.at
        assert self.node.driver.state(self.program.pid) == cuda.RUNNING, self.at
        assert self.node.away(self.program) == 0, self.at
