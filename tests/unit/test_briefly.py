"""Work in a process that nobody waits for longer than he wants to."""

from __future__ import annotations

import os
import time
from pathlib import Path

from rewarm import briefly


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
