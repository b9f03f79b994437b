"""Containers of the GPU tests: each in a network namespace of its own, asked for its numbered answers."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.sides import HostNetwork
from support.bundle import Bundle
from support.gpu.machine import Machine
from support.gpu.network import BareNamespace
from support.netns import HttpError, NetworkNamespace
from support.node import Node
from support.proc import CommandFailed, Timeout, descendants, state_of
from support.runtime import Container

PORT = 8000
READY = 150.0


@dataclass
class Running:
    """A container that was created and started; `case` is its program."""

    name: str
    case: str
    bundle: Bundle
    network: NetworkNamespace
    container: Container
    node: Node
    env: Mapping[str, str] = field(default_factory=dict)

    def ask(self, path: str = "/probe", *, body: bytes | None = None, timeout: float = 60.0) -> Any:
        port = int(self.env.get("PORT", PORT))
        return self.network.json(port, path, body=body, timeout=timeout)

    def answers(self, count: int) -> list[Any]:
        return [self.ask() for _ in range(count)]

    def wait_ready(self, timeout: float = READY) -> None:
        """Until it answers. Raises Timeout with what it printed, at once when it has ended."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            try:
                self.ask("/health", timeout=10)
                return
            except (OSError, HttpError):
                if self.container.pid is None or state_of(self.container.pid) in (None, "Z"):
                    break
                time.sleep(0.02)
        said = (self.container.stdout.text() + self.container.stderr.text())[-3000:]
        raise Timeout(f"{self.name} does not answer; it printed: {said}")

    def pids(self) -> list[int]:
        """Init and all below it."""
        assert self.container.pid is not None
        return [self.container.pid, *descendants(self.container.pid)]

    def outcome(self) -> dict[str, Any]:
        return self.node.outcome(self.name)

    def stop(self) -> None:
        """Kill, delete, and take everything away; a second call does nothing."""
        if self.bundle.directory.exists():
            self.node.runtime.stop(self.name)
            self.bundle.close()
            self.network.close()


class Fleet:
    """All containers of a run below `node`; `close` ends those that are left."""

    def __init__(self, node: Node, machine: Machine) -> None:
        self.node = node
        self.machine = machine
        self.running: list[Running] = []
        self.shared = False
        """Whether all containers are in the machine's network, on ports of their own: a kernel without namespaces."""
        try:
            BareNamespace(node.directory / "networks").close()
        except (OSError, CommandFailed) as error:
            print(f"no network namespaces here, so two containers of one snapshot clash: {error}", flush=True)
            self.shared = True

    def _network(self) -> NetworkNamespace:
        return HostNetwork() if self.shared else BareNamespace(self.node.directory / "networks")

    def start(
        self,
        name: str,
        case: str,
        *,
        env: Mapping[str, str] | None = None,
        snapshot: str | None = None,
        mounts: Sequence[Mapping[str, Any]] = (),
        change: Any = None,
    ) -> Running:
        """Creates and starts a container, from `snapshot` if one is named. `change` may alter the specification."""
        if self.shared and "PORT" not in (env or {}):
            env = {**(env or {}), "PORT": str(PORT + len(self.running))}
        network = self._network()
        try:
            bundle = self.machine.bundle(
                self.node.directory / "bundles" / name,
                case,
                network=None if self.shared else network.path,
                env=env,
                annotations={"rewarm.dev/snapshot": snapshot} if snapshot else {},
                mounts=mounts,
            )
            if self.shared:
                linux = bundle.spec["linux"]
                linux["namespaces"] = [entry for entry in linux["namespaces"] if entry["type"] != "network"]
            if change is not None:
                change(bundle.spec)
            bundle.write()
            container = self.node.runtime.create(name, bundle, timeout=150)
            running = Running(name, case, bundle, network, container, self.node, env or {})
            self.running.append(running)
            self.node.runtime.start(name)
        except BaseException:
            network.close()
            raise
        return running

    def capture(self, source: Running, snapshot: str, *words: str, timeout: float = 300) -> dict[str, Any]:
        """`rewarm capture`, and what it said as JSON. Raises AssertionError with its output."""
        done = self.node.rewarm("capture", source.name, "--name", snapshot, "--json", *words, timeout=timeout)
        said: dict[str, Any] = json.loads(done.stdout)
        return said

    def restore(self, name: str, source: Running, snapshot: str, **options: Any) -> Running:
        """A container like `source` that came from `snapshot`. Raises AssertionError unless it is warm."""
        copy = self.start(name, source.case, snapshot=snapshot, env=source.env, **options)
        found = copy.outcome()
        assert found["outcome"] == "warm", found
        return copy

    def close(self) -> None:
        """Whatever state they are in; `Runtime.cleanup` does what is left."""
        for running in self.running:
            self.node.runtime.run("delete", "--force", running.name, check=False)
        self.node.runtime.cleanup()
        for running in self.running:
            running.network.close()


def trace(running: Running) -> Path:
    return running.node.container_directory(running.name) / "trace.json"
