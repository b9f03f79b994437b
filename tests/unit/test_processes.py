"""Processes as /proc shows them."""

from __future__ import annotations

import ctypes
import os
import signal
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


# The init of a pid namespace, whose second thread ends when it is told to.
INIT = """
import sys, threading, time
threading.Thread(target=sys.stdin.read).start()
print("there", flush=True)
time.sleep(600)
"""


def state_of(pid: int, tid: int) -> str:
    found = processes.stat(pid, tid)
    return "" if found is None else found.state


PTRACE_SEIZE, WALL = 0x4206, 0x40000000


def test_an_init_that_waits_for_its_tracer() -> None:
    """It is killed while one of its threads is traced: it is in no state of the dead, and no tracer's wait for it comes
    back before that for the thread does."""
    words = ["unshare", "--pid", "--fork", sys.executable, "-c", INIT]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as program:
        assert program.stdin is not None and program.stdout is not None and program.stdout.readline() == b"there\n"
        (init,) = processes.children(program.pid)
        started = processes.start_time(init)
        assert started is not None
        (thread,) = (tid for tid in map(int, os.listdir(f"/proc/{init}/task")) if tid != init)
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.ptrace(PTRACE_SEIZE, thread, None, None) == 0, os.strerror(ctypes.get_errno())
        assert not processes.is_dead(init, started)
        try:
            program.stdin.close()
            wait_for("the thread's end", lambda: state_of(init, thread) == "Z", timeout=10)
            os.kill(init, signal.SIGKILL)
            wait_for("its end", lambda: processes.is_dead(init, started), timeout=10)
            wait_for("it to look alive", lambda: state_of(init, init) == "S", timeout=10)
            assert processes.is_dead(init, started)
        finally:
            os.waitpid(thread, WALL)
    assert processes.start_time(init) is None
