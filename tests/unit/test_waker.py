"""The process that has a restored engine go on: what it waits for, what it writes down. Not the calls themselves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rewarm import engines, processes, waker
from rewarm.errors import RestoreError
from rewarm.oci import record
from rewarm.oci.record import Record
from rewarm.request import Request
from rewarm.settings import Settings
from support.proc import state_of, wait_for


@pytest.fixture
def init() -> Iterator[subprocess.Popen[bytes]]:
    """A process that is stopped, as a restored one is before `start`."""
    with subprocess.Popen(["sleep", "100"]) as process:
        os.kill(process.pid, signal.SIGSTOP)
        wait_for("the stop", lambda: state_of(process.pid) == "T")
        yield process
        process.kill()


def saved(directory: Path, pid: int, start: int | None = None) -> str:
    began = processes.start_time(pid) or 0 if start is None else start
    kept = Record(id="copy", root="/run/runc", bundle="/b", phase=record.RESTORED, init_pid=pid, init_start=began)
    record.save(str(directory), kept)
    return str(directory)


def outcome(directory: Path) -> tuple[bool, str]:
    found = json.loads((directory / "engine.json").read_text())
    return found["resumed"], found["text"]


def test_it_waits_until_init_runs(
    tmp_path: Path, init: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    states: list[str | None] = []

    def resume(engine: str, pid: int, port: int, limit: float) -> list[str]:
        states.append(state_of(pid))
        return [f"{engine} {port} {limit:g}"]

    monkeypatch.setattr(engines, "resume", resume)
    timer = threading.Timer(0.3, lambda: os.kill(init.pid, signal.SIGCONT))
    timer.start()
    began = time.monotonic()
    assert waker.wake(saved(tmp_path, init.pid), "vllm", 7, Settings(engine_timeout=3)) == ["vllm 7 3"]
    assert time.monotonic() - began > 0.25 and states[0] in ("S", "R")


def test_one_that_is_never_started(
    tmp_path: Path, init: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(waker, "_START_TIMEOUT", 0.2)
    assert waker.main([saved(tmp_path, init.pid), "vllm", "7"]) == 1
    assert outcome(tmp_path) == (False, "resume engine vllm: the container was not started within 0 s")
    assert capfd.readouterr().err == "resume engine vllm: the container was not started within 0 s\n"
    assert state_of(init.pid) == "T"


@pytest.mark.parametrize("which", ["ended", "another"])
def test_one_that_has_ended(tmp_path: Path, which: str) -> None:
    """Also when another process has its pid: that one is never called."""
    with subprocess.Popen(["true"]) as process:
        process.wait()
    directory = saved(tmp_path, process.pid, 5) if which == "ended" else saved(tmp_path, os.getpid(), 5)
    with pytest.raises(RestoreError, match="its container has ended"):
        waker.wake(directory, "vllm", 7, Settings())


def test_a_directory_without_a_record(tmp_path: Path) -> None:
    assert waker.main([str(tmp_path), "sglang", "7"]) == 1
    assert outcome(tmp_path) == (False, "resume engine sglang: its container directory has no record")


def test_a_directory_that_is_deleted_meanwhile(tmp_path: Path) -> None:
    assert waker.main([str(tmp_path / "gone"), "sglang", "7"]) == 1
    assert not (tmp_path / "gone").exists()


def test_what_an_engine_says_is_made_printable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engines, "resume", lambda *_: ["a\x1b[2J\n", "b"])
    assert waker.main([saved(tmp_path, os.getpid()), "vllm", "7"]) == 0
    assert outcome(tmp_path) == (True, "a?[2J?; b")
    assert capfd.readouterr().err == "a?[2J?; b\n"


def test_a_capture_waits_for_it(tmp_path: Path, init: subprocess.Popen[bytes]) -> None:
    """As long as it lives, from before it has begun."""
    assert waker.wait(str(tmp_path), 0.1), "one that was not restored has none"
    wanted = Request(namespace="default", snapshot="model", engine="vllm")
    directory = saved(tmp_path, init.pid)
    with waker.reserved(directory) as log:
        assert not waker.wait(directory, 0.1), "from before it is started"
        assert waker.start(directory, wanted, {"process": {"args": []}}, log) == ""
    assert not waker.wait(directory, 0.3)
    init.kill()
    assert waker.wait(directory, 20)
    assert outcome(tmp_path)[0] is False
