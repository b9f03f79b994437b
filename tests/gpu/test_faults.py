"""A busy GPU, a full GPU, and a rewarm that is killed in the middle: the source never stays frozen."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from support.gpu.checkpoints import CHECKPOINTED, LOCKED, RUNNING, Checkpoints
from support.gpu.fleet import Fleet, Running
from support.proc import command_line, wait_for

TESTS = Path(__file__).resolve().parents[1]
RESUMED = 60.0
"""Seconds after the kill within which the source answers: the dump that was under way ends first."""


@pytest.mark.parametrize("source", ["busy"], indirect=True)
def test_a_busy_gpu_is_not_waited_for(
    card: None, source: Running, checkpoints: Checkpoints, figures: dict[str, Any]
) -> None:
    expected = source.answers(4)
    source.ask("/reset")
    source.answers(2)
    node = source.node
    node.configure(gpu_lock_timeout=1)
    try:
        source.ask("/busy", body=b"15")
        began = time.monotonic()
        done = node.rewarm("capture", source.name, "--name", "busy", check=False)
        took = time.monotonic() - began
    finally:
        node.configure()
    said = done.stdout + done.stderr
    figures |= {"said": said.strip(), "seconds": round(took, 2)}
    assert done.returncode != 0 and "gpu_lock_timeout" in said, said
    assert took < 8, "the capture took as long as the kernel"
    assert {checkpoints.state(pid) for pid in checkpoints.using(source.pids())} == {RUNNING}
    assert source.answers(2) == expected[2:]


@contextmanager
def filled(free_mib: int) -> Iterator[tuple[int, int]]:
    """Another process has the GPU's memory but so much: the bytes that it holds, and those that are free."""
    words = [sys.executable, "-m", "support.gpu.hog", str(free_mib)]
    env = {**os.environ, "PYTHONPATH": str(TESTS)}
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
    assert process.stdin is not None and process.stdout is not None
    try:
        held, free = (int(word) for word in process.stdout.readline().split())
        yield held, free
    finally:
        process.stdin.close()
        process.wait(30)


@pytest.mark.parametrize("source", ["large"], indirect=True)
def test_too_little_device_memory(card: None, fleet: Fleet, source: Running, figures: dict[str, Any]) -> None:
    expected = source.answers(2)
    source.ask("/reset")
    fleet.capture(source, "large")
    source.stop()
    with filled(1024) as (held, free):
        figures |= {"held": held, "free": free}
        cold = fleet.start("cold-large", source.case, snapshot="large", env=source.env)
        outcome = cold.outcome()
        figures["reason"] = outcome.get("reason")
        assert outcome["outcome"] == "cold", outcome
        numbers = [int(word) for word in re.findall(r"\d+", outcome["reason"])]
        assert "free" in outcome["reason"] and len(numbers) >= 2, "needed and free bytes are not both named"
        cold.stop()
    copy = fleet.restore("copy-large", source, "large")
    assert copy.answers(2) == expected


@pytest.mark.parametrize(
    ("source", "moment"),
    [("killed-locked", (LOCKED, CHECKPOINTED)), ("killed-checkpointed", (CHECKPOINTED,))],
    indirect=["source"],
    ids=["locked", "checkpointed"],
)
def test_a_killed_capture_does_not_freeze_its_source(
    card: None,
    fleet: Fleet,
    source: Running,
    moment: tuple[int, ...],
    checkpoints: Checkpoints,
    figures: dict[str, Any],
) -> None:
    expected = source.answers(4)
    source.ask("/reset")
    source.answers(2)
    node = source.node
    using = checkpoints.using(source.pids())
    tool = subprocess.Popen(
        [node.prefix / "bin/rewarm", "capture", source.name, "--name", "killed"],
        env={**os.environ, **node.env},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        seen = checkpoints.wait_checkpointed(using, moment, 60)
    finally:
        tool.send_signal(signal.SIGKILL)
        tool.wait()
    figures["states_at_kill"] = [checkpoints.state(pid) for pid in using]
    assert seen, "the capture never came so far"
    began = time.monotonic()
    wait_for(
        "all processes running",
        lambda: all(checkpoints.state(pid) == RUNNING for pid in using),
        timeout=RESUMED,
        interval=0.05,
    )
    assert source.answers(2) == expected[2:]
    figures["answered_after_seconds"] = round(time.monotonic() - began, 2)
    wait_for("the end of the guard", lambda: not helpers(), timeout=30)

    # And the next one works.
    source.ask("/reset")
    fleet.capture(source, "killed-again")
    source.stop()
    copy = fleet.restore("copy-killed", source, "killed-again")
    assert copy.answers(4) == expected


def helpers() -> list[str]:
    """What a capture may have started and left: helpers, guards, runc, CRIU."""
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    lines = [command_line(pid) for pid in pids]
    names = ("rewarm.lifeline", "rewarm-guard", "rewarm.recover")
    return [line for line in lines if any(name in line for name in names) or "criu" in line.split(" ")[0]]
