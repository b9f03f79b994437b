"""Work in a process that nobody waits for longer than he wants to."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

from rewarm import briefly
from support.proc import reap_orphans


def fail() -> None:
    raise ValueError


def late(path: Path) -> None:
    time.sleep(1)
    path.touch()


def test_what_is_done_in_time(tmp_path: Path) -> None:
    assert briefly.run(lambda: (tmp_path / "done").touch(), 10)
    assert (tmp_path / "done").exists()
    assert briefly.run(fail, 10)


def test_what_hangs(tmp_path: Path) -> None:
    """It is killed, and holds nothing of the caller's meanwhile."""
    out, end = os.pipe()
    began = time.monotonic()
    assert not briefly.run(lambda: late(tmp_path / "late"), 0.1)
    os.close(end)
    assert os.read(out, 1) == b"", "it has the other end"
    assert time.monotonic() - began < 0.9
    os.close(out)
    os.waitpid(-1, 0)
    assert not (tmp_path / "late").exists()


def test_what_it_answers() -> None:
    assert briefly.ask(lambda: b"x" * 200_000, 5) == b"x" * 200_000  # more than a pipe holds
    assert briefly.ask(lambda: os.listdir("/proc/self/fd").__repr__().encode(), 5) == b"['0', '1', '2', '3', '4']"
    assert briefly.ask(lambda: bytes(1 // 0), 5) == b""
    assert briefly.ask(lambda: subprocess.check_output(["sleep", "60"]), 0.2) is None
    reap_orphans()
