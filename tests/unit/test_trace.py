"""The trace: nesting, threads, and a file that Perfetto reads."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from rewarm.trace import Trace


def document(trace: Trace, path: Path) -> Any:
    trace.write(path)
    return json.loads(path.read_bytes())


def test_nested_phases_have_depth_order_and_duration(tmp_path: Path) -> None:
    trace = Trace()
    before = time.monotonic_ns()
    with trace.phase("restore", id="c1"), trace.phase("restore.criu"):
        time.sleep(0.01)
    after = time.monotonic_ns()
    outer, inner = trace.phases()
    assert (outer.name, outer.depth, inner.name, inner.depth) == ("restore", 0, "restore.criu", 1)
    assert outer.end_ns is not None
    assert inner.end_ns is not None
    assert before <= outer.start_ns <= inner.start_ns < inner.end_ns <= outer.end_ns <= after
    assert inner.seconds >= 0.01
    written = document(trace, tmp_path / "trace.json")
    event = written["traceEvents"][1]
    assert event["name"] == "restore.criu"
    assert event["ph"] == "X"
    assert event["args"] == {"start_ns": inner.start_ns, "end_ns": inner.end_ns}
    assert event["dur"] == pytest.approx((inner.end_ns - inner.start_ns) / 1000)
    assert event["ts"] == pytest.approx((inner.start_ns - trace.monotonic_base_ns) / 1000)
    assert written["traceEvents"][0]["args"]["id"] == "c1"


def test_the_wall_clock_is_read_once(tmp_path: Path) -> None:
    before = time.time_ns()
    trace = Trace()
    after = time.time_ns()
    trace.note("container", "c1")
    other = document(trace, tmp_path / "t")["otherData"]
    assert before <= other["wall_base_ns"] <= after
    assert other["container"] == "c1"


def test_an_exception_passes_through_and_is_noted() -> None:
    trace = Trace()
    with pytest.raises(KeyError), trace.phase("a"):
        raise KeyError("x")
    with trace.phase("b"):
        pass
    first, second = trace.phases()
    assert (first.error, first.depth) == ("KeyError", 0)
    assert (second.error, second.depth) == ("", 0)


def test_a_trace_written_in_the_middle_shows_what_runs(tmp_path: Path) -> None:
    trace = Trace()
    with trace.phase("restore"):
        time.sleep(0.002)
        event = document(trace, tmp_path / "t")["traceEvents"][0]
    assert event["args"]["open"] is True
    assert event["dur"] >= 2000


def test_threads_do_not_mix(tmp_path: Path) -> None:
    trace = Trace()
    barrier = threading.Barrier(8)

    def work(number: int) -> None:
        barrier.wait()
        for _ in range(50):
            with trace.phase(f"fill.{number}"), trace.phase(f"fill.{number}.piece"):
                pass

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    phases = trace.phases()
    assert len(phases) == 800
    assert all(phase.depth == phase.name.count(".") - 1 for phase in phases)
    by_tid = {phase.name.split(".")[1]: phase.tid for phase in phases}
    assert all(by_tid[phase.name.split(".")[1]] == phase.tid for phase in phases)
    assert len(document(trace, tmp_path / "t")["traceEvents"]) == 800


def test_add_records_what_something_else_timed() -> None:
    trace = Trace()
    trace.add("hook", 10, 5, program="rootfs-diff")
    (phase,) = trace.phases()
    assert (phase.start_ns, phase.end_ns, phase.args) == (10, 10, {"program": "rootfs-diff"})


def test_write_replaces_and_leaves_no_other_file(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_text("old")
    document(Trace(), path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["trace.json"]
    (tmp_path / "directory").mkdir()
    with pytest.raises(OSError, match="directory"):
        Trace().write(tmp_path / "directory")
    with pytest.raises(FileNotFoundError):
        Trace().write(tmp_path / "missing" / "t")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["directory", "trace.json"]
