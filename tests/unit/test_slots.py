"""The node's slots for reading ahead: so many processes, each until its end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from rewarm import slots

TAKE = "import sys; from rewarm import slots; print(slots.take(sys.argv[1]), flush=True); sys.stdin.read()"


def taker(directory: Path) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", TAKE, str(directory)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(words, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_as_many_as_there_are(tmp_path: Path) -> None:
    several = [taker(tmp_path) for _ in range(slots.COUNT + 1)]
    try:
        assert sorted(map(said, several)) == ["False", *["True"] * slots.COUNT]
        assert not slots.take(str(tmp_path))
        for process in several[:2]:
            process.kill()  # SIGKILL gives its slot back as well
            process.wait()
        again = taker(tmp_path)
        several.append(again)
        assert said(again) == "True"
    finally:
        for process in several:
            process.kill()
            process.communicate()


def test_no_place_for_slots(tmp_path: Path) -> None:
    (tmp_path / "read-ahead").write_text("")
    assert not slots.take(str(tmp_path))
