"""How the `rewarm` command prints, and its progress display."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import UTC, datetime

import pytest

from rewarm.cli import output
from support.snapshots import MIB


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (3 * MIB, "3.0 MiB"),
        (MIB - 1, "1.0 MiB"),
        (1 << 60, "1024.0 PiB"),
    ],
)
def test_size(count: int, text: str) -> None:
    assert output.size(count) == text


@pytest.mark.parametrize(
    ("created", "text"),
    [
        ("2026-03-01T12:00:00Z", "just now"),
        ("2026-03-01T12:00:09Z", "just now"),
        ("2026-03-01T11:59:59.123456Z", "1 second ago"),
        ("2026-03-01T11:58:00Z", "2 minutes ago"),
        ("2026-02-28T11:00:00Z", "1 day ago"),
        ("2024-03-01T12:00:00Z", "2 years ago"),
        ("2026-02-31T12:00:00Z", "2026-02-31T12:00:00Z"),
    ],
)
def test_age(created: str, text: str) -> None:
    assert output.age(created, datetime(2026, 3, 1, 12, tzinfo=UTC)) == text


def test_numbers() -> None:
    assert output.numbers([8, 3, 1, 0, 2]) == "0-3,8"
    assert output.numbers([]) == ""


PROGRESS = """
import sys, time
from rewarm.cli.progress import Progress
with Progress("reading [bold]snapshots", 10 << 20, delay=0.05) as progress:
    progress.advance(1 << 20)
    end = time.monotonic() + (30 if sys.stderr.isatty() else 0.3)
    while progress._bar is None and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.3)
    progress.step("nearly there")
    time.sleep(0.3)
sys.exit("rich" not in sys.modules)
"""


def test_progress_on_a_terminal() -> None:
    master, terminal = os.openpty()
    try:
        done = subprocess.Popen([sys.executable, "-c", PROGRESS], stderr=terminal, env={**os.environ, "TERM": "xterm"})
        os.close(terminal)
        shown = b""
        while True:
            try:
                piece = os.read(master, 4096)
            except OSError:
                break  # EIO: the last holder of the terminal is gone
            if not piece:
                break
            shown += piece
        assert done.wait() == 0
    finally:
        os.close(master)
    assert b"reading [bold]snapshots" in shown and b"nearly there" in shown


def test_progress_is_silent_without_a_terminal() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRESS], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")
