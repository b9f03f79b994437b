"""Kinds of memory that few programs have, and what the kernel itself writes into a program's memory, come back right.

What CRIU refuses is a capture that fails with its reason, and a source that runs on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from rewarm import node as facts
from support import rootfs
from support.bundle import Bundle
from support.netns import NetworkNamespace
from support.node import Node

PORT = 8000
CARRIED = (
    "aio",
    "code",
    "guard",
    "huge-zero",
    "join",
    "memfds",
    "merged",
    "no-huge",
    "pending",
    "robust",
    "timer",
    "undumpable",
    "zero",
)
REFUSED = {
    "no-leader": "Zombies with threads",
    "one-memory": "VM id",
    "secret": "secretmem",
    "traced": "zombie",
    "userfault": "userfaultfd",
}
NEEDED = {"guard": (6, 13), "secret": (6, 5)}


class Containers:
    """Containers of one kind, each in a network namespace of its own."""

    def __init__(self, node: Node, kind: str, stack: ExitStack) -> None:
        self.node, self.kind, self._stack = node, kind, stack

    def make(self, name: str, outcome: str) -> NetworkNamespace:
        network = self._stack.enter_context(NetworkNamespace())
        bundle = Bundle(
            self.node.directory / name,
            rootfs.layers("odd_memory"),
            rootfs.args("odd_memory"),
            env=rootfs.env("odd_memory", KIND=self.kind),
            network=network.path,
            annotations={"rewarm.dev/snapshot": "odd"},
            extra_capabilities=["CAP_SYS_PTRACE"],
        )
        self.node.runtime.create(name, bundle)
        self.node.runtime.start(name)
        assert self.node.outcome(name)["outcome"] == outcome, self.node.outcome(name)
        network.wait_http(PORT, "/health")
        return network


@pytest.fixture
def containers(node: Node, request: pytest.FixtureRequest) -> Iterator[Containers]:
    kind = request.node.callspec.params["kind"]
    if facts.version_tuple(facts.kernel()) < NEEDED.get(kind, ()):
        pytest.skip(f"Linux {facts.kernel()} has no such memory")
    with ExitStack() as stack:
        yield Containers(node, kind, stack)


def state(network: NetworkNamespace) -> Any:
    return network.json(PORT, "/state", timeout=30)


@pytest.mark.parametrize("kind", CARRIED)
def test_comes_back(containers: Containers, kind: str) -> None:
    source = containers.make("source", "cold")
    before = state(source)
    containers.node.rewarm("capture", "source", "--name", "odd")
    assert containers.node.json("inspect", "odd")["memory"]["filled"] > 1 << 19, "it was carved"
    assert state(containers.make("copy", "warm")) == before
    assert state(source) == before


@pytest.mark.parametrize("kind", REFUSED)
def test_is_refused(containers: Containers, kind: str) -> None:
    source = containers.make("source", "cold")
    before = state(source)
    done = containers.node.rewarm("capture", "source", "--name", "odd", check=False)
    assert done.returncode == 1 and done.stderr.startswith("rewarm: dump container source: ")
    assert REFUSED[kind] in done.stderr
    assert state(source) == before
