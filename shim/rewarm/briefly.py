"""Doing something that may hang where nothing may: in a process of its own, which is left behind if it does.

A share's server that does not answer ends neither by a signal nor with the process that waits for it (apart.py).
"""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Callable
from contextlib import suppress


def run(work: Callable[[], object], seconds: float) -> bool:
    """Whether `work` is done, in whichever way, within so many seconds; what is left of it is killed as soon as it no
    longer hangs. It has no descriptors of the caller's: locks and pipes would wait for it. Raises OSError."""
    pid = os.fork()
    if pid == 0:
        try:
            _let_go()
            work()
        finally:
            os._exit(0)
    with suppress(ProcessLookupError, ChildProcessError):  # where SIGCHLD is ignored, it may be gone already
        pidfd = os.pidfd_open(pid)
        try:
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            if not poll.poll(seconds * 1000):
                os.kill(pid, signal.SIGKILL)
                return False
        finally:
            os.close(pidfd)
        os.waitpid(pid, 0)
    return True


def _let_go() -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
