"""What pods gain over the CRI: a scale-up on two nodes, one pod until it is ready, and what an exec probe costs."""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path

from bench.measured import Measured
from support import rootfs, scale_up
from support.scale_up import ANNOTATIONS, Cluster, of_rewarm

REPLICAS = 5
TURNS = 3
EXECS = 151


def pods(directory: Path, prefix: Path) -> list[Measured]:
    """Replicas of the OCR model server: cold ones by runc, restored ones by rewarm, in turn."""
    with scale_up.cluster(directory, prefix, rootfs.containerd2() / "containerd") as made:
        first = made.replica(0, "first", ANNOTATIONS)
        first.node.wait_captured(first.container)
        made.nodes[0].remove_all()
        return [_scale_up(made), _ready(made), _exec(made), _left(made, prefix)]


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


def _left(made: Cluster, prefix: Path) -> Measured:
    """What of rewarm stays behind while restored containers run: processes, with their memory and processor time."""
    before = of_rewarm(prefix).keys()
    replicas = [made.replica(0, f"left-{turn}", ANNOTATIONS) for turn in range(TURNS)]
    assert all(one.outcome["outcome"] == "warm" for one in replicas)
    time.sleep(1)  # what ends by itself has ended
    found = [_cost(pid) for pid in of_rewarm(prefix).keys() - before]
    made.nodes[0].remove_all()
    more = {
        "left_behind_memory_bytes": sum(memory for memory, _ in found),
        "left_behind_cpu_seconds": sum(seconds for _, seconds in found),
    }
    what = f"processes of rewarm beside {TURNS} restored containers"
    samples = {"restored": [float(TURNS)], "rewarm": [float(len(found))]}
    return Measured(what, "left_behind_processes", samples, float(len(found)), "0", not found, more, unit="")


def _cost(pid: int) -> tuple[int, float]:
    """Bytes that are its own, and seconds of processor time."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    shares = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines() if ":" in line
    )
    ticks = os.sysconf("SC_CLK_TCK")
    return int(shares["Pss"].split()[0]) << 10, (int(fields[11]) + int(fields[12])) / ticks
