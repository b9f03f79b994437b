"""install/engines.sh: whether a daemon has still to be told of a change that an earlier run has made."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support.nodes import program
from support.proc import wait_for
from support.registering import INSTALL


@contextmanager
def daemon(directory: Path) -> Iterator[None]:
    """A process with the name of CRI-O's."""
    words = [program(directory / "crio", "read -r line")]
    with subprocess.Popen(words, stdin=subprocess.PIPE) as running:
        wait_for("the daemon's name", lambda: Path(f"/proc/{running.pid}/comm").read_text() == "crio\n")
        yield
        assert running.stdin is not None
        running.stdin.close()


def pending(state: Path) -> bool:
    """What the next run makes of the mark, which it makes anew."""
    script = '. "$1/lib.sh"; . "$1/engines.sh"; state=$2 pending=" "; note_restart crio; echo "$pending"'
    words = ["bash", "-euo", "pipefail", "-c", script, "bash", str(INSTALL), str(state)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr == "" and (state / "restart.crio").exists()
    return "crio" in done.stdout


def test_a_daemon_that_was_started_since(tmp_path: Path) -> None:
    """After --no-restart an administrator restarts it: once more would be for nothing."""
    state = tmp_path / "state"
    mark = state / "restart.crio"
    assert not pending(state), "nobody has changed anything"
    assert pending(state), "it does not run"
    os.utime(mark, (time.time() - 10,) * 2)
    with daemon(tmp_path):
        assert not pending(state)
        os.utime(mark, (time.time() + 10,) * 2)
        assert pending(state), "it was started before"
        later = time.time() + 3
        os.utime(mark, (later - 2,) * 2)
        wait_for("a later second", lambda: time.time() > later)
        with daemon(tmp_path / "other"):
            assert pending(state), "one of two was"
