"""Processes: waiting with a deadline, subreaping, process trees, and pipes that are drained while nobody reads them.

A container's init is a grandchild of whoever calls the OCI runtime; the runtime leaves, so init goes to the nearest
subreaper (a containerd shim in production, the test process here), which alone can learn its exit code.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

PR_SET_CHILD_SUBREAPER = 36
_libc = ctypes.CDLL(None, use_errno=True)


class Timeout(Exception):
    """What was waited for did not happen in time; the message names it."""


class CommandFailed(Exception):
    """A command ended with a status other than 0; the message holds its arguments, status and output."""

    def __init__(self, argv: Iterable[str], status: int, output: str) -> None:
        self.argv = list(argv)
        self.status = status
        self.output = output
        super().__init__(f"{' '.join(self.argv)}: exit status {status}\n{output}")


def wait_for(what: str, probe: Callable[[], T | None], *, timeout: float = 30.0, interval: float = 0.02) -> T:
    """Calls `probe` every `interval` seconds until it gives something true, and returns that.

    Raises Timeout naming `what` after `timeout` seconds. Exceptions of `probe` pass through.
    """
    deadline = time.monotonic() + timeout
    while True:
        value = probe()
        if value:
            return value
        if time.monotonic() >= deadline:
            raise Timeout(f"{what}: not within {timeout:g} s")
        time.sleep(interval)


def command(
    *argv: str | Path,
    timeout: float = 60.0,
    check: bool = True,
    env: Mapping[str, str] | None = None,
    input: str | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs a command that leaves nothing running behind it, with its output captured as text.

    Raises CommandFailed for a status other than 0 when `check` is set, and subprocess.TimeoutExpired.
    """
    args = [str(a) for a in argv]
    done = subprocess.run(
        args, text=True, capture_output=True, timeout=timeout, env=None if env is None else dict(env), input=input
    )
    if check and done.returncode != 0:
        raise CommandFailed(args, done.returncode, done.stdout + done.stderr)
    return done


def become_subreaper() -> None:
    """Makes this process the new parent of orphaned descendants (prctl(2) PR_SET_CHILD_SUBREAPER). Raises OSError."""
    if _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), "PR_SET_CHILD_SUBREAPER")


def wait_exit(process: subprocess.Popen[bytes], timeout: float) -> int:
    """The exit status, at once when there is one: Popen.wait with a timeout looks only every 50 ms.

    Raises subprocess.TimeoutExpired.
    """
    pidfd = os.pidfd_open(process.pid)
    try:
        select.select([pidfd], [], [], timeout)
    finally:
        os.close(pidfd)
    return process.wait(0.001)


def reap(pid: int, *, timeout: float = 30.0) -> int:
    """Waits for a child of this process and returns its exit code, 128 + N after a death by signal N.

    A child that an earlier call has reaped raises ChildProcessError. Raises Timeout.
    """

    def probe() -> tuple[int] | None:
        done, status = os.waitpid(pid, os.WNOHANG)
        return (status,) if done else None

    code = os.waitstatus_to_exitcode(wait_for(f"end of process {pid}", probe, timeout=timeout)[0])
    return code if code >= 0 else 128 - code


def state_of(pid: int) -> str | None:
    """State letter of a process ("R", "S", "T", "Z" and so on), or None when there is none of that pid."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return text.rpartition(")")[2].split()[0]


def children(pid: int) -> list[int]:
    """Children of all threads of a process, zombies included; empty when the process is gone."""
    found: list[int] = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it may end while it is read
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += [int(word) for word in (task / "children").read_text().split()]
    return sorted(found)


def descendants(pid: int) -> list[int]:
    """Children, their children and so on, parents before children."""
    found: list[int] = []
    for child in children(pid):
        found += [child, *descendants(child)]
    return found


def arguments(pid: int) -> list[str]:
    """Arguments of a process; empty for zombies and processes that are gone."""
    try:
        data = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return data.removesuffix(b"\0").decode(errors="replace").split("\0") if data else []


def command_line(pid: int) -> str:
    """The same, joined by spaces."""
    return " ".join(arguments(pid)).strip()


def reap_orphans() -> list[int]:
    """Reaps zombies that came to this process as subreaper and returns their pids.

    Children of live `subprocess.Popen` objects are left alone: stealing one would make its `wait` report 0.
    """
    owned = {item.pid for item in gc.get_objects() if isinstance(item, subprocess.Popen) and item.returncode is None}
    reaped = []
    for pid in children(os.getpid()):
        if pid in owned or state_of(pid) != "Z":
            continue
        with contextlib.suppress(ChildProcessError):  # another thread was faster
            os.waitpid(pid, os.WNOHANG)
            reaped.append(pid)
    return reaped


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    """Sends a signal; a process that is gone already is no error."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


class Drain:
    """Reads one end of a pipe into memory on a thread of its own, so that a writer never blocks.

    Give `write_end` to the process that is started and call `started` afterwards: the reader sees the end of the
    stream only when every copy of the write end is closed.
    """

    def __init__(self) -> None:
        self._read_end, self.write_end = os.pipe2(os.O_CLOEXEC)
        self._data = bytearray()
        self._changed = threading.Condition()
        self._ended = False
        self._thread = threading.Thread(target=self._read, name="drain", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            while piece := os.read(self._read_end, 65536):
                with self._changed:
                    self._data += piece
                    self._changed.notify_all()
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()
            os.close(self._read_end)

    def started(self) -> None:
        """Closes this process's copy of the write end."""
        if self.write_end >= 0:
            os.close(self.write_end)
            self.write_end = -1

    def text(self) -> str:
        """All that was read so far."""
        with self._changed:
            return self._data.decode(errors="replace")

    def wait_text(self, part: str, *, timeout: float = 60.0) -> str:
        """Waits until `part` was read and returns everything. Raises Timeout with what there is instead."""
        with self._changed:
            self._changed.wait_for(lambda: part.encode() in self._data or self._ended, timeout)
            text = self._data.decode(errors="replace")
        if part not in text:
            raise Timeout(f"{part!r} in the output, which {'ended' if self._ended else 'is still open'} with: {text}")
        return text

    def wait_end(self, *, timeout: float = 30.0) -> str:
        """Waits until every writer has closed the pipe and returns everything. Raises Timeout."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._ended, timeout):
                raise Timeout(f"end of output, still open with: {self._data.decode(errors='replace')}")
            return self._data.decode(errors="replace")
