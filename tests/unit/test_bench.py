"""What `make bench` writes: the keys by which its figures are found."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import pods, run
from bench.measured import Measured
from support import proc, rootfs, scale_up


class Replicas:
    """In a Cluster's place: a cold one takes three times as long. One process stays behind the restored ones."""

    def __init__(self) -> None:
        self.nodes = [SimpleNamespace(remove_all=lambda: None)]

    def replica(self, number: int, name: str, annotations: dict[str, str], handler: str = "rewarm") -> SimpleNamespace:
        node = SimpleNamespace(exec=lambda *_: "", wait_captured=lambda _: {})
        seconds = 1.0 if handler == "rewarm" else 3.0
        return SimpleNamespace(node=node, container=name, seconds=seconds, outcome={"outcome": "warm"})

    def scale_up(
        self, count: int, name: str, annotations: dict[str, str], handler: str
    ) -> tuple[list[SimpleNamespace], float]:
        made = [self.replica(0, name, annotations, handler) for _ in range(count)]
        return made, sum(one.seconds for one in made)


@pytest.fixture
def replicas(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    @contextlib.contextmanager
    def cluster(*_: Path) -> Iterator[Replicas]:
        yield Replicas()

    ticks, processes = itertools.count(), iter([{}, {os.getpid(): "rewarm"}])
    monkeypatch.setattr(scale_up, "cluster", cluster)
    monkeypatch.setattr(rootfs, "containerd2", lambda: tmp_path)
    monkeypatch.setattr(pods, "of_rewarm", lambda _: next(processes))
    monkeypatch.setattr(pods, "time", SimpleNamespace(monotonic=lambda: next(ticks), sleep=lambda _: None))
    monkeypatch.setattr(run, "touch_memory", lambda: None)
    monkeypatch.setattr(proc, "become_subreaper", lambda: None)


@pytest.mark.usefixtures("replicas")
def test_the_figures_of_pods(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "bench.json"
    assert run.main(tmp_path, output, ["pods"]) == 1
    assert capsys.readouterr().err == "missed: left_behind_processes\n"
    found = json.loads(output.read_text())
    ratios = {"scale_up_speedup": 3.0, "pod_ready_speedup": 3.0, "exec_ratio": 1.0, "left_behind_processes": 1.0}
    assert {key: found.pop(key) for key in ratios} == ratios
    assert found.pop("left_behind_memory_bytes") > 1 << 20 and found.pop("left_behind_cpu_seconds") > 0
    samples = {f"{key}_samples_s" for key in ratios if not key.startswith("left_behind")}
    assert found.keys() == {"machine", "date", *samples, "left_behind_processes_samples"}
    assert found["scale_up_speedup_samples_s"] == {"cold": [15.0] * pods.TURNS, "restored": [5.0] * pods.TURNS}


def test_figures() -> None:
    done = Measured("what", "key", {"one": [1.2345678], "other": [2.0]}, 1.62, "-", True, {"more": 1}, unit="GB/s")
    assert run.as_figures(done) == {"key": 1.62, "key_samples_gb_per_s": {"one": [1.23457], "other": [2.0]}, "more": 1}
