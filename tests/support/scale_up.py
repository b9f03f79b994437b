"""A scale-up: replicas of a model server on two nodes that share a store, over the CRI as two kubelets would do it."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support import image, rootfs, samples
from support.pods import HANDLER, KubeNode, Pod
from support.proc import arguments, command_line, descendants

PORT = 8000
PAGE = "invoice"
ANNOTATIONS = {"rewarm.dev/snapshot": "ocr", "rewarm.dev/capture": "on-ready"}
_READY = 180.0


def of_rewarm(prefix: Path) -> dict[int, str]:
    """Processes of rewarm's below this one, which must be a subreaper: pids, with their command lines."""
    return {pid: command_line(pid) for pid in descendants(os.getpid()) if _is_of_rewarm(pid, prefix)}


def _is_of_rewarm(pid: int, prefix: Path) -> bool:
    """By its program. Paths of the test's own are among the arguments of many others."""
    argv = arguments(pid)
    programs = argv[:1]
    with contextlib.suppress(OSError):  # it has ended, or is a zombie
        programs.append(os.readlink(f"/proc/{pid}/exe"))
    module = argv[3:4] if argv[1:3] == ["-I", "-m"] else []
    return any(one.startswith(f"{prefix}/") for one in programs) or any(one.startswith("rewarm.") for one in module)


@dataclass
class Replica:
    """`seconds` are from before RunPodSandbox to the first right answer."""

    node: KubeNode
    pod: Pod
    container: str
    seconds: float
    answer: Any

    @property
    def outcome(self) -> dict[str, Any]:
        return self.node.outcome(self.container)

    def ask(self) -> Any:
        network = self.node.engine.network
        return network.json(PORT, "/ocr", host=self.pod.ips[0], body=samples.png(PAGE), timeout=60)

    def restart(self) -> float:
        """What a kubelet does with a container that has ended: seconds to the first answer."""
        began = time.monotonic()
        self.container = _container(self.node, self.pod, attempt=1)
        self.answer = _first_answer(self)
        return time.monotonic() - began


class Cluster:
    """Two nodes with the image of the model server."""

    def __init__(self, nodes: Sequence[KubeNode]) -> None:
        self.nodes = nodes

    def replica(self, number: int, name: str, annotations: dict[str, str], handler: str = HANDLER) -> Replica:
        """A pod on node `number`, 0 or 1, once it has answered."""
        node = self.nodes[number]
        began = time.monotonic()
        pod = node.pod(name, annotations=annotations, handler=handler)
        made = Replica(node, pod, _container(node, pod), 0.0, None)
        made.answer = _first_answer(made)
        made.seconds = time.monotonic() - began
        return made

    def scale_up(
        self, count: int, name: str, annotations: dict[str, str], handler: str = HANDLER
    ) -> tuple[list[Replica], float]:
        """So many at once, in turn on both nodes; seconds until all of them have answered."""
        began = time.monotonic()
        with ThreadPoolExecutor(count) as pool:
            made = [pool.submit(self.replica, at % 2, f"{name}-{at}", annotations, handler) for at in range(count)]
        replicas = [one.result() for one in made]
        return replicas, time.monotonic() - began


@contextmanager
def cluster(directory: Path, prefix: Path, binary: Path) -> Iterator[Cluster]:
    """`binary`: the nodes' containerd. They are equal, as the default seccomp profile differs between versions."""
    archive, _ = image.workload("ocr_server")
    store = directory / "store"
    store.mkdir()
    with ExitStack() as stack:
        nodes = []
        for number in (1, 2):
            made = KubeNode(directory / f"node{number}", prefix, number=number, store=store, binary=binary)
            nodes.append(stack.enter_context(made))
            made.import_image(archive)
        yield Cluster(nodes)


def _container(node: KubeNode, pod: Pod, attempt: int = 0) -> str:
    reference = image.workload("ocr_server")[1]
    return node.container(pod, "server", reference, rootfs.args("ocr_server"), attempt=attempt)


def _first_answer(replica: Replica) -> Any:
    replica.node.wait_ready(replica.pod, "/health", timeout=_READY)
    return replica.ask()
