"""Processes as /proc shows them."""

from __future__ import annotations

import os
import subprocess
import sys

from rewarm import processes
from support.proc import wait_for

# Its first thread ends, and the other one goes on.
HEADLESS = """
import ctypes, sys, threading
threading.Thread(target=sys.stdin.read).start()
print("there", flush=True)
ctypes.CDLL(None).pthread_exit(None)
"""


def test_who_is_dead() -> None:
    """A killed process is, before it is waited for; one that has only lost its first thread is not."""
    with subprocess.Popen([sys.executable, "-c", HEADLESS], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as program:
        started = processes.start_time(program.pid)
        assert started is not None and program.stdout is not None and program.stdout.readline() == b"there\n"
        wait_for("the first thread's end", lambda: processes.start_time(program.pid) is None)
        assert not processes.is_dead(program.pid, started) and processes.is_dead(program.pid, started + 1)
        program.kill()
        wait_for("its end", lambda: processes.is_dead(program.pid, started))
        assert os.path.exists(f"/proc/{program.pid}"), "it was waited for already"
    assert processes.is_dead(program.pid, started)
