"""One container captured by both sides, `rewarm capture` and `runc checkpoint`, and restored by either, timed.

The time of a restore runs from `create` (or `runc restore`) until the program has answered a request, for which it
computes something out of its restored memory. By hand the container has the same mounts and root filesystem.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support import rootfs
from support.bundle import Bundle
from support.netns import HttpError, NetworkNamespace
from support.node import Node
from support.proc import wait_for
from support.runtime import Runtime

PORT = 8000
BY_HAND = "runc restore"
REWARM = "rewarm"


REPORTING = Path("/sys/module/page_reporting")
HELD = 2.5
"""Seconds: a guest tells its host two seconds after memory became free which is (mm/page_reporting.c,
PAGE_REPORTING_DELAY), and the host takes that back."""


def touch(size: int) -> None:
    """Touch so much free memory and give it back.

    A virtual machine gets memory from its host at the first touch, huge pages slowest of all, and gives back what has
    been free for some seconds (free page reporting): both sides of a comparison begin with memory that is there. It is
    held until the report of what the last one left is over: the next one is two seconds away then.
    """
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        for at in range(0, size, mmap.PAGESIZE):
            memory[at] = 1
        if REPORTING.exists():
            time.sleep(HELD)


def touch_for(size: float) -> None:
    """What a restore of so many bytes may use: as much again as it may read ahead, and something for all else; never
    more than is free, so that the page cache stays."""
    found = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free, available = (int(found[name].split()[0]) << 10 for name in ("MemFree", "MemAvailable"))
    touch(max(min(int(size) + available // 16 + (512 << 20), free - (1 << 30)), mmap.PAGESIZE))


class HostNetwork(NetworkNamespace):
    """The machine's own network namespace, where no iproute2 is there to make another: one container at a time."""

    def __init__(self) -> None:
        self.name = ""
        self.path = Path("/proc/self/ns/net")

    def close(self) -> None:
        """There is nothing to take away."""


@dataclass(frozen=True)
class Program:
    """A workload, its environment, and the request that counts as its first output."""

    workload: str
    env: dict[str, str]
    ask: str = "/probe"
    body: bytes | None = None
    layers: Sequence[Path] | None = None
    args: Sequence[str] | None = None
    network: Callable[[], NetworkNamespace] = NetworkNamespace

    def bundle(self, directory: Path, network: NetworkNamespace, annotations: dict[str, str]) -> Bundle:
        made = Bundle(
            directory,
            self.layers if self.layers is not None else rootfs.layers(self.workload),
            self.args if self.args is not None else rootfs.args(self.workload),
            env=rootfs.env(self.workload, **self.env),
            network=network.path,
            annotations=annotations,
        )
        if isinstance(network, HostNetwork):
            linux = made.spec["linux"]
            linux["namespaces"] = [entry for entry in linux["namespaces"] if entry["type"] != "network"]
            made.write()
        return made

    def answer(self, network: NetworkNamespace, *, interval: float = 0.002) -> Any:
        """Asks until there is an answer, and returns it."""

        def ask() -> list[Any] | None:
            try:
                return [network.json(PORT, self.ask, body=self.body, timeout=120)]
            except (OSError, HttpError):
                return None  # it does not listen yet

        return wait_for(f"an answer of {self.workload}", ask, timeout=240, interval=interval)[0]


@dataclass
class Capture:
    """What `rewarm capture --json` said, the seconds of both sides, and the bytes of the store before and after."""

    said: dict[str, Any]
    seconds: float
    by_hand_seconds: float
    store_before: int
    store_after: int


class Sides:
    """A node whose store holds the snapshot NAME of a program, and images of the same program made by hand."""

    def __init__(self, directory: Path, node: Node, program: Program, name: str) -> None:
        self.directory = directory
        self.node = node
        self.program = program
        self.name = name
        self.images = directory / f"{name}-images"
        criu = f"{node.prefix}/criu/bin"
        self.path = f"{criu}:{os.environ['PATH']}" if os.path.isdir(criu) else os.environ["PATH"]
        self.by_hand = Runtime(directory / f"{name}-by-hand", "runc", env={"PATH": self.path})
        self.expected: Any = None
        self.memory = 0
        """Bytes that the program needs."""
        self.touched = 1.25
        """Memory to touch before each restore, in parts of that."""
        self._turn = 0

    def __enter__(self) -> Sides:
        return self

    def __exit__(self, *_error: object) -> None:
        self.by_hand.cleanup()

    def annotations(self) -> dict[str, str]:
        return {"rewarm.dev/snapshot": self.name}

    def capture(self, *, by_hand: bool = True) -> Capture:
        """Starts the source, captures it by both sides, and stops it."""
        source = f"{self.name}-source"
        with self.program.network() as network:
            made = self.program.bundle(self.node.directory / source, network, {})
            self.node.runtime.create(source, made)
            self.node.runtime.start(source)
            self.expected = self.program.answer(network, interval=0.05)
            before = stored(self.node.store)
            began = time.monotonic()
            said = self.node.rewarm("capture", source, "--name", self.name, "--json", timeout=600).stdout
            seconds = time.monotonic() - began
            began = time.monotonic()
            if by_hand:
                self.images.mkdir(parents=True)
                flags = ("--leave-running", "--image-path", self.images, "--work-path", self.directory / "work")
                self.node.runtime.run("checkpoint", *flags, source, env={"PATH": self.path}, timeout=600)
            hand_seconds = time.monotonic() - began
            assert self.program.answer(network) == self.expected
            self.node.runtime.stop(source)
            made.close()
        self.memory = int(json.loads(said)["memory_bytes"])
        os.sync()  # else the disk would be busy with what was captured while restores are measured
        return Capture(json.loads(said), seconds, hand_seconds, before, stored(self.node.store))

    @contextlib.contextmanager
    def restored(self, label: str) -> Iterator[Restored]:
        """A restored container and the seconds until its first answer, which is compared with the source's."""
        self._turn += 1
        name = f"{self.name}-{label.split()[0]}-{self._turn}"
        created = 0.0
        with self.program.network() as network:
            hand = label == BY_HAND
            made = self.program.bundle(self.node.directory / name, network, {} if hand else self.annotations())
            runtime = self.by_hand if hand else self.node.runtime
            touch_for(self.memory * self.touched)
            began = time.monotonic()
            if hand:
                runtime.restore(name, made, self.images)
            else:
                runtime.create(name, made)
                created = time.monotonic()
                runtime.start(name)
            started = time.monotonic()
            answer = self.program.answer(network)
            seconds = time.monotonic() - began
            assert answer == self.expected, "the answer is not the source's"
            assert hand or self.node.outcome(name)["outcome"] == "warm", self.node.outcome(name)
            phases = {} if hand else trace_phases(self.node.container_directory(name) / "trace.json")
            if not hand:
                phases |= {"create": Phase(created - began, 0), "start": Phase(started - created, 0)}
            phases["answer"] = Phase(began + seconds - started, 0)
            yield Restored(seconds, phases, network, made)
            runtime.stop(name)
            made.close()

    def once(self, label: str) -> float:
        with self.restored(label) as found:
            return found.seconds

    def alternate(self, turns: int, labels: Sequence[str] = (BY_HAND, REWARM)) -> dict[str, list[float]]:
        """Seconds of `turns` restores of each side, in turn, after one of each that is not counted."""
        found: dict[str, list[float]] = {label: [] for label in labels}
        for turn in range(turns + 1):
            for label in labels:
                seconds = self.once(label)
                if turn:
                    found[label].append(seconds)
        return found


@dataclass(frozen=True)
class Phase:
    """All phases of one name in a trace: seconds from the first one's start to the last one's end, and their bytes."""

    seconds: float
    bytes: int


@dataclass(frozen=True)
class Restored:
    seconds: float
    phases: dict[str, Phase]
    network: NetworkNamespace
    bundle: Bundle

    def rate(self, phase: str = "memory.fill") -> float | None:
        """GB/s of a phase, or None where the trace has none."""
        found = self.phases.get(phase)
        return None if found is None or not found.bytes else found.bytes / found.seconds / 1e9


def trace_phases(file: Path) -> dict[str, Phase]:
    """The phases of a trace by name; those of several threads as one."""
    found: dict[str, tuple[float, float, int]] = {}
    for event in json.loads(file.read_text())["traceEvents"]:
        start, end = event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6
        first, last, size = found.get(event["name"], (start, end, 0))
        size += int(event["args"].get("bytes", 0))
        found[event["name"]] = min(first, start), max(last, end), size
    memory = [found[name] for name in ("memory.read", "memory.fill") if name in found]
    if memory:
        # From the first byte that was asked for to the last that was written.
        found["memory"] = min(one[0] for one in memory), max(one[1] for one in memory), sum(one[2] for one in memory)
    return {name: Phase(max(last - first, 1e-9), size) for name, (first, last, size) in found.items()}


def stored(store: Path) -> int:
    """Bytes of all files of a store."""
    return sum(file.stat().st_size for file in store.rglob("*") if file.is_file()) if store.is_dir() else 0
