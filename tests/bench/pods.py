"""What pods gain over the CRI: a scale-up on two nodes, one pod until it is ready, and what an exec probe costs."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

from bench.measured import Measured
from support import rootfs, scale_up
from support.scale_up import ANNOTATIONS, Cluster

REPLICAS = 5
TURNS = 3
EXECS = 151


def pods(directory: Path, prefix: Path) -> list[Measured]:
    """Replicas of the OCR model server: cold ones by runc, restored ones by rewarm, in turn."""
    with scale_up.cluster(directory, prefix, rootfs.containerd2() / "containerd") as made:
        first = made.replica(0, "first", ANNOTATIONS)
        first.node.wait_captured(first.container)
        made.nodes[0].remove_all()
        return [_scale_up(made), _ready(made), _exec(made)]


def _sides(made: Cluster, turn: int, label: str) -> tuple[str, dict[str, str], str]:
    name = f"{label}-{turn}"
    return (name, {}, "runc") if label == "cold" else (name, ANNOTATIONS, "rewarm")


def _scale_up(made: Cluster) -> Measured:
    found: dict[str, list[float]] = {"cold": [], "restored": []}
    for turn in range(TURNS):
        for label in found:
            replicas, seconds = made.scale_up(REPLICAS, *_sides(made, turn, label))
            assert label == "cold" or all(one.outcome["outcome"] == "warm" for one in replicas)
            found[label].append(seconds)
            for node in made.nodes:
                node.remove_all()
    ratio = statistics.median(found["cold"]) / statistics.median(found["restored"])
    what = f"{REPLICAS} replicas on two nodes, until all have answered"
    return Measured(what, "scale_up_speedup", found, ratio, "-", True)


def _ready(made: Cluster) -> Measured:
    found: dict[str, list[float]] = {"cold": [], "restored": []}
    for turn in range(TURNS):
        for label in found:
            name, annotations, handler = _sides(made, turn, label)
            found[label].append(made.replica(0, f"one-{name}", annotations, handler).seconds)
            made.nodes[0].remove_all()
    ratio = statistics.median(found["cold"]) / statistics.median(found["restored"])
    return Measured("RunPodSandbox to the first answer", "pod_ready_speedup", found, ratio, "-", True)


def _exec(made: Cluster) -> Measured:
    """ExecSync, as an exec probe, in a container of runc's and in a restored one."""
    found: dict[str, list[float]] = {"runc": [], "rewarm, restored": []}
    sides = {"runc": made.replica(0, "bare", {}, "runc"), "rewarm, restored": made.replica(0, "warm", ANNOTATIONS)}
    assert sides["rewarm, restored"].outcome["outcome"] == "warm"
    for turn in range(EXECS):
        # The second of two is the slower one, whichever it is.
        for label, replica in list(sides.items())[:: 1 if turn % 2 else -1]:
            began = time.monotonic()
            replica.node.exec(replica.container, "true")
            if turn:
                found[label].append(time.monotonic() - began)
    made.nodes[0].remove_all()
    ratio = statistics.median(found["rewarm, restored"]) / statistics.median(found["runc"])
    return Measured("exec of `true`", "exec_ratio", found, ratio, "<= 1.05", ratio <= 1.05)
