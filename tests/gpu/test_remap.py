"""A container that comes back on another GPU than its snapshot's."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import pytest

from support.gpu.fleet import Fleet, Running
from support.gpu.sources import gpu_nodes, only_gpu
from support.proc import command


@pytest.fixture
def two_gpus(card: None) -> None:
    if len(gpu_nodes()) < 2:
        pytest.skip("not run: it needs two GPUs")


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("source", ["remapped"], indirect=True)
def test_on_another_gpu_and_back(fleet: Fleet, source: Running, figures: dict[str, Any]) -> None:
    expected = source.answers(6)
    checksum = source.ask("/checksum")
    source.ask("/reset")
    source.answers(2)
    fleet.capture(source, "remapped")
    first = used_gpu(source)
    assert opened(source) == {gpu_nodes()[0].name}
    source.stop()

    other = fleet.restore("remapped-1", source, "remapped", change=only_gpu(1))
    [entry] = figures["map"] = other.outcome()["devices"]
    assert (entry["source"], entry["target"]) == (first, used_gpu(other)) and first != entry["target"]
    assert opened(other) == {gpu_nodes()[1].name}
    assert other.answers(2) == expected[2:4]
    assert other.ask("/checksum") == checksum
    [shown] = other.node.json("inspect", "--container", "remapped-1")["devices"]
    assert shown == entry
    fleet.capture(other, "remapped-again")
    other.stop()

    back = fleet.restore("remapped-2", source, "remapped-again", change=only_gpu(0))
    assert used_gpu(back) == first
    assert opened(back) == {gpu_nodes()[0].name}
    assert back.answers(2) == expected[4:]
    assert back.ask("/checksum") == checksum


def used_gpu(running: Running) -> str:
    """The UUID of the GPU on which the container computes, by the driver."""
    said = command("nvidia-smi", "--query-compute-apps=pid,gpu_uuid", "--format=csv,noheader").stdout
    found = dict(line.split(", ") for line in said.splitlines())
    [uuid] = {found[str(pid)] for pid in running.pids() if str(pid) in found}
    return uuid


def opened(running: Running) -> set[str]:
    """The nodes of GPUs that it has open. (What is in its /dev says nothing: libcuda makes all nodes there, those that
    the container's cgroup denies as well.)"""
    names = set()
    for pid in running.pids():
        for file in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                names.add(Path(os.readlink(file)).name)
    return {name for name in names if name.removeprefix("nvidia").isdigit()}
