"""A scale-up on two nodes with containerd 2.x that share a store, from the first replica on."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from support import rootfs, samples, scale_up
from support.proc import wait_for
from support.scale_up import ANNOTATIONS, PAGE, of_rewarm

pytestmark = pytest.mark.alone


@pytest.mark.timeout(280)
def test_scale_up(nothing_left_behind: None, tmp_path: Path, prefix: Path) -> None:
    with scale_up.cluster(tmp_path, prefix, rootfs.containerd2() / "containerd") as made:
        with ThreadPoolExecutor(1) as pool:
            begun = pool.submit(made.replica, 0, "first", ANNOTATIONS)
            wait_for(
                "its watcher",
                lambda: "rewarm.watcher" in " ".join(of_rewarm(prefix).values()),
                timeout=60,
                interval=0.2,
            )
            first = begun.result()
        assert first.outcome["outcome"] == "cold"
        assert [line["text"] for line in first.answer["lines"]] == samples.TEXTS[PAGE]
        first.node.wait_captured(first.container)

        replicas, _ = made.scale_up(5, "web", ANNOTATIONS)
        assert [one.outcome["outcome"] for one in replicas] == ["warm"] * 5, [one.outcome for one in replicas]
        assert {one.node.number for one in replicas} == {1, 2}
        assert all(one.answer == first.answer for one in replicas)
        wait_for("nothing to stay behind a restore", lambda: not of_rewarm(prefix), timeout=5, interval=0.2)

        crashed = replicas[1]
        os.kill(crashed.node.pid(crashed.container), signal.SIGKILL)
        assert crashed.node.wait_exited(crashed.container).exit_code == 137
        crashed.restart()
        assert crashed.outcome["outcome"] == "warm" and crashed.answer == first.answer

        for node in made.nodes:
            node.remove_all()
            assert not list((node.node.state / "containers").rglob("outcome.json")), "state of pods that are gone"
        again, _ = made.scale_up(5, "again", ANNOTATIONS)
        assert [one.outcome["outcome"] for one in again] == ["warm"] * 5, [one.outcome for one in again]
        assert all(one.answer == first.answer for one in again)

        # The share of one node is gone: it starts cold, the other goes on.
        made.nodes[1].configure(store=str(tmp_path / "gone"))
        lost, found = made.replica(1, "lost", ANNOTATIONS), made.replica(0, "found", ANNOTATIONS)
        assert (lost.outcome["outcome"], found.outcome["outcome"]) == ("cold", "warm")
        assert "gone" in lost.outcome["reason"]
        assert lost.answer == found.answer == first.answer
