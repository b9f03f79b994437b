"""A container that holds every kind of memory comes back whole: content, sharing, rights, and no more bytes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from support import rootfs, usage
from support.bundle import Bundle
from support.netns import NetworkNamespace
from support.node import Node

PORT = 8000
ANNOTATIONS = {"rewarm.dev/snapshot": "vmas"}
SLACK = 1.02
# What a restore may add to a mapping, by its VmFlags: hg is advice of ours, sd is the kernel's own.
MAY_DIFFER = {"hg", "sd"}


class Copies:
    """A captured source and its copies, each in a network namespace of its own."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.networks: dict[str, NetworkNamespace] = {}
        self.bundles: dict[str, Bundle] = {}

    def make(self, name: str, outcome: str) -> None:
        network = self.networks[name] = NetworkNamespace()
        bundle = self.bundles[name] = Bundle(
            self.node.directory / name,
            rootfs.layers("vmas"),
            rootfs.args("vmas"),
            env=rootfs.env("vmas", SHRINK=os.environ.get("REWARM_TEST_SHRINK", "1")),
            network=network.path,
            annotations=ANNOTATIONS,
        )
        self.node.runtime.create(name, bundle)
        self.node.runtime.start(name)
        assert self.node.outcome(name)["outcome"] == outcome, self.node.outcome(name)
        network.wait_http(PORT, "/health", timeout=120)

    def ask(self, name: str, path: str, body: bytes | None = None) -> Any:
        return self.networks[name].json(PORT, path, body=body, timeout=120)

    def close(self) -> None:
        for network in self.networks.values():
            network.close()


@pytest.fixture
def copies(node: Node) -> Iterator[Copies]:
    made = Copies(node)
    yield made
    made.close()


@pytest.fixture
def captured(copies: Copies) -> Copies:
    copies.make("source", "cold")
    copies.node.rewarm("capture", "source", "--name", "vmas")
    return copies


def pss(state: dict[str, Any]) -> int:
    return sum(found["Pss"] for found in state["memory"].values())


def test_content_sharing_and_cost(copies: Copies) -> None:
    copies.make("source", "cold")
    # Reading a hole of shared memory fills it: costs are measured before the hashes.
    before, cost = copies.ask("source", "/state"), usage.of_cgroup(copies.bundles["source"])
    areas = copies.ask("source", "/areas")
    copies.node.rewarm("capture", "source", "--name", "vmas")
    hashes = copies.ask("source", "/hash")
    assert set(hashes) == {"parent", "left", "right", "grandchild"}
    # A copy of the copy as well: what was carved once can be captured and carved again.
    for name, captured_from in (("copy", None), ("again", "copy")):
        if captured_from is not None:
            copies.node.rewarm("capture", captured_from, "--name", "vmas", "--stop")
            copies.node.runtime.wait_stopped(captured_from)
        copies.make(name, "warm")
        after, now = copies.ask(name, "/state"), usage.of_cgroup(copies.bundles[name])
        for key in ("nonce", "pids", "has", "locked", "alternate", "stopped"):
            assert after[key] == before[key], key
        assert_same_mappings(areas, copies.ask(name, "/areas"))
        assert pss(after) <= SLACK * pss(before), "copy-on-write memory is no longer shared, or zeros became memory"
        assert now.total <= SLACK * cost.total
        # All of it is charged to the container itself: whoever wrote it.
        assert now.shared >= before["content"]["shared"] / SLACK
        assert now.anonymous >= before["content"]["private"] / SLACK
        assert copies.ask(name, "/hash") == hashes
        sharing = copies.ask(name, "/shared")
        assert sharing and all(sharing.values()), sharing
        assert copies.ask(name, "/frames") == {"frames": True}
        assert copies.ask(name, "/hash") == hashes
    assert copies.ask("source", "/hash") == hashes, "the source is as it was"


def assert_same_mappings(before: Any, after: Any) -> None:
    for process, areas in before.items():
        for area, found in areas.items():
            got = after[process][area]
            assert got["rights"] == found["rights"], (process, area)
            assert set(got["flags"]) - MAY_DIFFER == set(found["flags"]) - MAY_DIFFER, (process, area)


def test_two_copies_share_nothing(captured: Copies) -> None:
    captured.make("one", "warm")
    captured.make("two", "warm")
    hashes = captured.ask("two", "/hash")
    captured.node.runtime.stop("one")
    assert captured.ask("two", "/hash") == hashes == captured.ask("source", "/hash")


def test_stopped_process_with_a_pending_signal(captured: Copies) -> None:
    """It stays stopped; when it goes on, its handler runs on its own stack, in memory that was put back."""
    captured.make("copy", "warm")
    assert captured.ask("copy", "/state")["stopped"] == "T"
    found = {name: captured.ask(name, "/continue") for name in ("source", "copy")}
    assert found["copy"] == found["source"]
    assert found["copy"]["alternate"] is True
    assert found["copy"]["seen"] == [
        {"signal": 10, "sender": 1, "value": 4711, "stack intact": True, "stack used": True}
    ]
    assert captured.ask("copy", "/state")["stopped"] == "S"


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one CPU: a stale one would not show")
def test_no_thread_believes_in_an_old_cpu(captured: Copies) -> None:
    """sched_getcpu(3) reads the rseq area, which the kernel writes: were it restored as memory, it would stay."""
    captured.make("copy", "warm")
    for cpu in sorted(os.sched_getaffinity(0))[:2] * 2:
        threads = captured.ask("copy", "/cpus", str(cpu).encode())
        assert len(threads) == 2
        assert all(thread == {"getcpu": cpu, "stat": cpu} for thread in threads), (cpu, threads)
