"""One GPU container restored by stock CRIU and the driver by hand, by rewarm, and started cold; each timed.

A time runs from `create` (or `runc restore`) to the first right answer. By hand: `runc restore`, then the driver's
restore and unlock of every process by calls from this very process, so that nothing is spent on starting a tool. The
network is the machine's: one container at a time.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import direct
from bench.sides import PORT, HostNetwork, touch, trace_phases
from support import cgroups
from support.bundle import Bundle
from support.gpu.checkpoints import CHECKPOINTED, Checkpoints
from support.gpu.machine import Machine
from support.netns import HttpError
from support.node import Node
from support.proc import command, descendants, wait_for
from support.runtime import Runtime

STOCK, REWARM, PLAIN, COLD = "criu and driver", "rewarm", "rewarm without the library", "cold"
DISK = "rewarm from a cold disk"
SNAPSHOTS = {REWARM: "bench", PLAIN: "plain"}
CAPTURED = ["paused_seconds", "total_seconds", "memory_bytes", "zero_bytes", "stored_bytes", "notes"]
CAPTURED += ["device_bytes", "device_zero_bytes"]
ANSWER = 240.0
READ_AHEAD = "from rewarm.settings import Settings; print(Settings().read_ahead)"


@dataclass(frozen=True)
class Timed:
    """Seconds to the first right answer, and where they went."""

    seconds: float
    phases: dict[str, float]


class GpuSides:
    """`directory` gets the images made by hand, the node's store the snapshot; `case` is a program of workloads/gpu."""

    def __init__(
        self, directory: Path, node: Node, machine: Machine, checkpoints: Checkpoints, case: str, env: Mapping[str, str]
    ) -> None:
        self.directory = directory
        self.node = node
        self.machine = machine
        self.checkpoints = checkpoints
        self.case = case
        self.env = env
        self.network = HostNetwork()
        criu = f"{node.prefix}/criu/bin"
        self.path = f"{criu}:{os.environ['PATH']}" if os.path.isdir(criu) else os.environ["PATH"]
        self.by_hand = Runtime(directory / "by-hand", "runc", env={"PATH": self.path})
        self.images = directory / "images"
        self.expected: Any = None
        self.memory = 0
        """Bytes of the checkpointed processes: touched before each restore, so that the machine has them."""
        self.source = ""
        self.trace = b""
        """Of the last restore by rewarm: where it spent its time, for Perfetto."""
        # The Python that runs this may have no rewarm.
        self.read_ahead = int(command(f"{node.prefix}/venv/bin/python3", "-I", "-c", READ_AHEAD).stdout)
        self._bundle: Bundle | None = None
        self._turn = 0

    def close(self) -> None:
        self.by_hand.cleanup()
        self.node.runtime.cleanup()

    def _made(self, name: str, side: str) -> Bundle:
        annotations = {"rewarm.dev/snapshot": SNAPSHOTS[side]} if side in SNAPSHOTS else {}
        if side == PLAIN:
            annotations["rewarm.dev/device-memory"] = "off"
        made = self.machine.bundle(
            self.directory / "bundles" / name, self.case, network=None, env=self.env, annotations=annotations
        )
        linux = made.spec["linux"]
        linux["namespaces"] = [entry for entry in linux["namespaces"] if entry["type"] != "network"]
        made.write()
        return made

    def ask(self, path: str = "/probe") -> Any:
        return self.network.json(PORT, path, timeout=120)

    def _first_answer(self) -> Any:
        def probe() -> list[Any] | None:
            try:
                return [self.ask()]
            except (OSError, HttpError):
                return None  # it does not listen yet

        return wait_for(f"an answer of {self.case}", probe, timeout=ANSWER, interval=0.002)[0]

    def _right(self, answer: Any) -> None:
        if self.expected is None:
            self.expected = answer
        assert answer == self.expected, f"the answer is not the source's: {answer}, {self.expected}"

    def start_source(self, side: str) -> Timed:
        """The program from nothing; it stays for the captures. Of REWARM with the library, else without."""
        self._turn += 1
        self.source = f"source-{self._turn}"
        # Stock has no mounts of rewarm's, and so not the snapshot that is without the library either.
        self._bundle = self._made(self.source, REWARM if side == REWARM else COLD)
        began = time.monotonic()
        self.node.runtime.create(self.source, self._bundle)
        self.node.runtime.start(self.source)
        created = time.monotonic()
        answer = self._first_answer()
        seconds = time.monotonic() - began
        self._right(answer)
        return Timed(seconds, {"create": created - began, "answer": began + seconds - created})

    def end_source(self) -> None:
        """Also of one that a capture has ended already."""
        assert self._bundle is not None
        self.node.runtime.run("kill", self.source, "KILL", check=False)
        self.node.runtime.wait_stopped(self.source)
        self.node.runtime.run("delete", "--force", self.source, check=False)
        self._bundle.close()
        self._bundle = None

    def capture(self, side: str, timeout: float) -> dict[str, Any]:
        """`rewarm capture`; the source runs on and is right."""
        self.ask("/reset")
        began = time.monotonic()
        done = self.node.rewarm("capture", self.source, "--name", SNAPSHOTS[side], "--json", timeout=timeout)
        seconds = time.monotonic() - began
        said = json.loads(done.stdout)
        self._right(self.ask())
        # Without the library, device memory is in it.
        self.memory = max(0 if side == REWARM else self.memory, int(said["memory_bytes"]))
        figures = {"command_seconds": round(seconds, 3)}
        return figures | {key: said.get(key) for key in CAPTURED}

    def capture_by_hand(self, timeout: float) -> dict[str, Any]:
        """Lock and checkpoint, then `runc checkpoint`, which ends the source."""
        self.ask("/reset")
        self.images.mkdir(parents=True)
        began = time.monotonic()
        pids = self.checkpoints.using(self._pids(self.node.runtime, self.source))
        cuda = self.checkpoints.suspend(pids)
        words = ("--file-locks", "--ext-unix-sk", "--image-path", self.images, "--work-path", self.directory / "work")
        dumped = time.monotonic()
        try:
            self.node.runtime.run("checkpoint", *words, self.source, env={"PATH": self.path}, timeout=timeout)
        except BaseException:
            with contextlib.suppress(Exception):
                self.checkpoints.resume(pids)
            raise
        end = time.monotonic()
        size = sum(file.stat().st_size for file in self.images.iterdir())
        self.memory = max(self.memory, size)
        return {
            "total_seconds": round(end - began, 3),
            "cuda_seconds": round(cuda, 3),
            "criu_seconds": round(end - dumped, 3),
            "bytes": size,
            "processes": len(pids),
        }

    def _pids(self, runtime: Runtime, name: str) -> list[int]:
        pid = runtime.containers[name].pid
        assert pid is not None
        return [pid, *descendants(pid)]

    def _touch(self) -> None:
        """What the processes will have, and what `create` reads ahead; never more than is free: the page cache, with
        the images in it, stays."""
        free = int(Path("/proc/meminfo").read_text().split("MemFree:")[1].split()[0]) << 10
        touch(max(min(int(self.memory * 1.25) + self.read_ahead + (512 << 20), free - (2 << 30)), 1 << 20))

    def begin(self, side: str) -> Timed:
        """`start_source`, with memory that is there."""
        self._touch()
        return self.start_source(side)

    def run(self, side: str) -> Timed:
        """One container of a side, ended afterwards."""
        self._touch()
        if side == DISK:
            direct.forget(self.node.store)
            return self._rewarm(REWARM)
        if side in SNAPSHOTS:
            return self._rewarm(side)
        return self._stock() if side == STOCK else self._cold()

    def _cold(self) -> Timed:
        found = self.start_source(COLD)
        self.end_source()
        return found

    @contextlib.contextmanager
    def _container(self, runtime: Runtime, side: str) -> Iterator[tuple[str, Bundle]]:
        self._turn += 1
        name = f"{side.split()[0]}-{self._turn}"
        made = self._made(name, side)
        yield name, made
        runtime.stop(name)
        made.close()

    def _stock(self) -> Timed:
        with self._container(self.by_hand, STOCK) as (name, made):
            began = time.monotonic()
            self.by_hand.restore(name, made, self.images, timeout=240)
            restored = time.monotonic()
            pids = self._pids(self.by_hand, name)
            self.checkpoints.resume([pid for pid in pids if self.checkpoints.state(pid) == CHECKPOINTED])
            resumed = time.monotonic()
            answer = self._first_answer()
            end = time.monotonic()
            self._right(answer)
        # On cgroup v2 CRIU has put the tree into a cgroup of the source's name.
        cgroups.remove_empty(f"{os.path.dirname(made.cgroup)}/{self.source}")
        phases = {"criu": restored - began, "cuda": resumed - restored, "answer": end - resumed}
        return Timed(end - began, phases)

    def _rewarm(self, side: str) -> Timed:
        with self._container(self.node.runtime, side) as (name, made):
            began = time.monotonic()
            self.node.runtime.create(name, made)
            created = time.monotonic()
            self.node.runtime.start(name)
            started = time.monotonic()
            answer = self._first_answer()
            end = time.monotonic()
            outcome = self.node.outcome(name)
            assert outcome["outcome"] == "warm", outcome
            self._right(answer)
            trace = self.node.container_directory(name) / "trace.json"
            self.trace = trace.read_bytes()
            phases = {key: phase.seconds for key, phase in trace_phases(trace).items()}
        phases |= {"create": created - began, "start": started - created, "answer": end - started}
        return Timed(end - began, phases)

    def disk_rate(self) -> float:
        """GB/s of the disk under the snapshot."""
        return direct.rate([path for path in self.node.store.rglob("*") if path.is_file()])

    def forget_snapshot(self) -> None:
        shutil.rmtree(self.node.store, ignore_errors=True)

    def forget_images(self) -> None:
        shutil.rmtree(self.images, ignore_errors=True)
