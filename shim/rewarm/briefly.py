"""Doing something that may hang where nothing may: in a process of its own, which is left behind if it does.

A share's server that does not answer ends neither by a signal nor with the process that waits for it (apart.py).
"""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable
from contextlib import suppress

_KEPT = 3


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


def ask(work: Callable[[], bytes], seconds: float) -> bytes | None:
    """What `work` returns; None if that is not there within so many seconds, nothing if its process dies. Raises
    OSError."""
    answers, answer = os.pipe()
    with os.fdopen(answers, "rb", buffering=0) as file:
        try:
            pid = os.fork()
            if pid == 0:
                try:
                    _let_go(answer)
                    with os.fdopen(_KEPT, "wb") as out:
                        out.write(work())
                finally:
                    os._exit(0)
        finally:
            os.close(answer)
        said = b""
        end = time.monotonic() + seconds
        while select.select([file], [], [], max(0.0, end - time.monotonic()))[0]:
            piece = file.read(1 << 16)
            if not piece:
                with suppress(ChildProcessError):
                    os.waitpid(pid, 0)
                return said
            said += piece
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        return None


def _let_go(keep: int | None = None) -> None:
    """Close all descriptors but the one to `keep`, which becomes _KEPT."""
    if keep is not None:
        os.dup2(keep, _KEPT)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.closerange(_KEPT if keep is None else _KEPT + 1, os.sysconf("SC_OPEN_MAX"))
