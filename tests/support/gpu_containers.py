"""Containers of the fake GPUs: the workload with its device nodes, on nodes whose driver is the fake one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support import fake_gpu, rootfs
from support.bundle import Bundle
from support.fake_gpu import FakeGpus
from support.netns import HttpError, NetworkNamespace
from support.node import Node
from support.proc import wait_for

PORT = 8000
CONTROL = {"path": "/dev/nvidiactl", "type": "c", "major": 195, "minor": 255, "fileMode": 0o666, "uid": 0, "gid": 0}


def nodes(minors: Sequence[int]) -> list[dict[str, Any]]:
    """The device nodes of GPUs with these minor numbers."""
    return [{**CONTROL, "path": f"/dev/nvidia{minor}", "minor": minor} for minor in minors] + [CONTROL]


@dataclass
class Place:
    """A node with fake GPUs, and a network for one container at a time."""

    node: Node
    gpus: FakeGpus
    network: NetworkNamespace

    def bundle(
        self,
        name: str,
        minors: Sequence[int] = (0,),
        snapshot: str = "model",
        env: Mapping[str, str] | None = None,
        workload: str = "gpu_fake",
        annotations: Mapping[str, str] | None = None,
        **more: str,
    ) -> Bundle:
        """A bundle of the workload with these GPUs; it takes those of its environment's GPUS, the first by default."""
        return Bundle(
            self.node.directory / name,
            rootfs.layers(workload),
            rootfs.args(workload),
            network=self.network.path,
            env=self.gpus.container_environment(**{**(env or {}), **more}),
            mounts=[self.gpus.mount()],
            devices=nodes(minors),
            annotations={"rewarm.dev/snapshot": snapshot, **(annotations or {})},
        )

    def ask(self, path: str = "/probe", timeout: float = 20) -> Any:
        """The answer, once there is one."""

        def ask() -> list[Any] | None:
            try:
                return [self.network.json(PORT, path, timeout=timeout)]
            except (OSError, HttpError):
                return None

        return wait_for(f"an answer to {path}", ask, timeout=timeout + 40)[0]

    def start(self, name: str, made: Bundle) -> None:
        self.node.runtime.create(name, made)
        self.node.runtime.start(name)

    def end(self, name: str) -> None:
        self.node.runtime.stop(name)


@contextmanager
def place(directory: Path, prefix: Path, count: int = 1, **settings: Any) -> Iterator[Place]:
    """A place with so many equal GPUs; `settings` of its node."""
    gpus = FakeGpus(directory / "gpus", fake_gpu.gpus(count))
    node = Node(directory / "node", prefix, libcuda=str(gpus.libcuda), gpu_lock_timeout=2, **settings)
    # The libraries that are not the right ones lie elsewhere.
    node.env["FAKE_CUDA_DIR"] = node.runtime.env["FAKE_CUDA_DIR"] = str(gpus.directory)
    with node, NetworkNamespace() as network:
        yield Place(node, gpus, network)
