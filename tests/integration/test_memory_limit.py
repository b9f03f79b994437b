"""A container near its memory limit restores without being killed, and stays below the limit."""

from __future__ import annotations

from pathlib import Path

from support import rootfs, usage
from support.bundle import Bundle
from support.netns import NetworkNamespace
from support.node import Node

PORT = 8000
MIB = 1 << 20
# Above what the program itself holds: kernel memory and a little page cache.
ROOM = 24 * MIB


def made(directory: Path, network: NetworkNamespace, limit: int | None) -> Bundle:
    bundle = Bundle(
        directory,
        rootfs.layers("memory"),
        rootfs.args("memory"),
        env=rootfs.env("memory", MIB="256"),
        network=network.path,
        annotations={"rewarm.dev/snapshot": "memory"},
    )
    if limit is not None:
        bundle.spec["linux"].setdefault("resources", {})["memory"] = {"limit": limit}
        bundle.write()
    return bundle


def test_near_its_memory_limit(node: Node) -> None:
    with NetworkNamespace() as network:
        source = made(node.directory / "source", network, None)
        node.runtime.create("source", source)
        node.runtime.start("source")
        network.wait_http(PORT, "/health")
        held = usage.of_cgroup(source).total
        expected = network.json(PORT, "/hash")
        node.rewarm("capture", "source", "--name", "memory")
    with NetworkNamespace() as network:
        copy = made(node.directory / "copy", network, held + ROOM)
        node.runtime.create("copy", copy)
        assert node.outcome("copy")["outcome"] == "warm", node.outcome("copy")
        node.runtime.start("copy")
        network.wait_http(PORT, "/health")
        assert network.json(PORT, "/hash") == expected
        assert held / 1.02 <= usage.of_cgroup(copy).total <= held * 1.02
        assert usage.peak(copy) <= held + ROOM
