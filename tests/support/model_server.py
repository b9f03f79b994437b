"""The main job on two nodes: a model server is captured on one when it is ready, and restored on the other.

Each node is a containerd of its own with a network namespace of its own; all they share is the store.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support import image, samples
from support.containerd import Containerd, Task
from support.netns import NetworkNamespace
from support.node import Node
from support.proc import wait_for

PORT = 8000
PAGE = "invoice"
SNAPSHOT = "ocr"
READY_TIMEOUT = 180.0


@dataclass
class Replica:
    """One container of the model server. `seconds` are from before `ctr run` to its first answer."""

    name: str
    task: Task
    network: NetworkNamespace
    seconds: float
    answer: Any
    outcome: dict[str, Any]


@dataclass
class Result:
    """What happened: the original, and the replicas that the second node made of its snapshot."""

    original: Replica
    restored: list[Replica] = field(default_factory=list)
    capture: dict[str, Any] = field(default_factory=dict)
    snapshot: dict[str, Any] = field(default_factory=dict)

    @property
    def speedup(self) -> float:
        """Cold seconds over the slowest restored replica's."""
        return self.original.seconds / max(replica.seconds for replica in self.restored)


class Cluster:
    """Two nodes that share a store, with the model server's image on both."""

    def __init__(self, directory: Path, prefix: Path, say: Callable[[str], None]) -> None:
        self.say = say
        self.store = directory / "store"
        self.page = samples.png(PAGE)
        self.archive, self.reference = image.workload("ocr_server")
        self.nodes: list[Node] = []
        self.engines: list[Containerd] = []
        self._networks: list[NetworkNamespace] = []
        for number in (1, 2):
            node = Node(directory / f"node{number}", prefix, store=self.store)
            self.nodes.append(node)
            engine = Containerd(node.directory / "containerd", env=node.env)
            self.engines.append(engine)
            node.configure(runtime_roots=[str(engine.runc_root / "*")])
            say(f"node {number}: containerd {engine.socket}, importing {self.reference}")
            engine.import_image(self.archive)

    def run(self, number: int, name: str, annotations: dict[str, str]) -> Replica:
        """`ctr run` on node `number` (1 or 2), in a network namespace of its own, until the first answer."""
        node, engine = self.nodes[number - 1], self.engines[number - 1]
        network = NetworkNamespace()
        self._networks.append(network)
        began = time.monotonic()
        task = engine.run(
            self.reference,
            name,
            runtime=node.prefix / "bin" / "rewarm-runc",
            annotations={"rewarm.dev/snapshot": SNAPSHOT, **annotations},
            network=network.path,
        )
        answer = wait_for(f"an answer of {name}", lambda: self._ask(network), timeout=READY_TIMEOUT, interval=0.01)
        seconds = time.monotonic() - began
        root = engine.runc_root / task.namespace
        return Replica(name, task, network, seconds, answer, node.outcome(name, root))

    def ask(self, replica: Replica) -> Any:
        return replica.network.json(PORT, "/ocr", body=self.page)

    def _ask(self, network: NetworkNamespace) -> Any:
        try:
            return network.json(PORT, "/ocr", body=self.page)
        except OSError:
            return None  # it does not listen yet

    def captured(self, replica: Replica) -> dict[str, Any]:
        """Waits for the watcher's word on node 1."""
        node, engine = self.nodes[0], self.engines[0]
        directory = node.container_directory(replica.name, engine.runc_root / replica.task.namespace)
        path = directory / "capture.json"
        wait_for("the capture", path.exists, timeout=READY_TIMEOUT)
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    def close(self) -> None:
        for engine in self.engines:
            engine.stop()
        for network in self._networks:
            network.close()
        for node in self.nodes:
            node.runtime.cleanup()


@contextmanager
def cluster(directory: Path, prefix: Path, say: Callable[[str], None] = lambda text: None) -> Iterator[Cluster]:
    made = Cluster(directory, prefix, say)
    try:
        yield made
    finally:
        made.close()


def play(made: Cluster) -> Result:
    """Cold start and capture on node 1, two restores on node 2."""
    made.say("node 1: cold start of the model server, with rewarm.dev/capture: on-ready")
    original = made.run(1, "original", {"rewarm.dev/capture": "on-ready"})
    made.say(f"node 1: first answer after {original.seconds:.2f} s: {_lines(original.answer)}")
    result = Result(original)
    result.capture = made.captured(original)
    made.say(f"node 1: {result.capture['text']}")
    if not result.capture["captured"]:
        raise AssertionError(result.capture["text"])
    for name in ("replica-1", "replica-2"):
        replica = made.run(2, name, {})
        made.say(f"node 2: {name} is {replica.outcome['outcome']}, first answer after {replica.seconds:.2f} s")
        result.restored.append(replica)
    return result


def _lines(answer: Any) -> str:
    return ", ".join(line["text"] for line in answer["lines"])
