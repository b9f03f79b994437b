"""A container held still for a capture, that goes on whatever happens to rewarm.

`runc pause` freezes it by its cgroup. Processes that a signal had stopped are told to continue once they
are frozen, and to stop again before they are thawed: CRIU waits for ever for a stopped process in a frozen
cgroup (seen with the v1 freezer), and a frozen process runs nothing in between. A helper process (this
module run as a program) waits at the end of a pipe: when rewarm and the runc that it runs are gone without
a word, the helper resumes the container.

    python -m rewarm.frozen BINARY ROOT ID PID STOPPED…      (standard input: the pipe)
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from types import TracebackType

from rewarm import netlock, processes
from rewarm.errors import CaptureError
from rewarm.oci import runc
from rewarm.oci.runc import Container, Runc

_DONE = b"d"
_LONGEST_DUMP = 3600.0


class Frozen:
    """Context manager: paused inside, running again after. `seconds` is how long it was held still."""

    def __init__(self, low_level: Runc, container: Container) -> None:
        self._runc = low_level
        self._container = container
        self._read, self._write = os.pipe()
        self._helper: subprocess.Popen[bytes] | None = None
        self._began = 0.0
        self.seconds = 0.0
        self.stopped: frozenset[int] = frozenset()
        """Host pids of the processes that a signal had stopped."""

    @property
    def lifeline(self) -> int:
        """The pipe's write end: a program that inherits it keeps the helper waiting."""
        return self._write

    def __enter__(self) -> Frozen:
        container = self._container
        self.stopped = frozenset(pid for pid in processes.tree(container.pid) if _is_stopped(pid))
        words = [self._runc.binary, container.root, container.id, str(container.pid), *map(str, self.stopped)]
        self._helper = subprocess.Popen(
            [sys.executable, "-I", "-m", "rewarm.frozen", *words],
            stdin=self._read,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd="/",
        )
        os.close(self._read)
        self._began = time.monotonic()
        done = self._runc.run("pause", container.id, timeout=30)
        if done.returncode != 0:
            self._release()
            raise CaptureError("pause container", container.id, runc.message(done), "is the freezer cgroup there?")
        for pid in self.stopped:
            processes.send(pid, signal.SIGCONT)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self.resume()

    def resume(self) -> None:
        """Let it run again; nothing happens the second time."""
        if self._helper is None:
            return
        for pid in self.stopped:
            processes.send(pid, signal.SIGSTOP)
        done = self._runc.run("resume", self._container.id, timeout=30)
        self.seconds = time.monotonic() - self._began
        self._release()
        if done.returncode != 0 and self._runc.status(self._container.id) == "paused":
            raise CaptureError(
                "resume container",
                self._container.id,
                runc.message(done),
                f"run `runc --root {self._container.root} resume {self._container.id}`",
            )

    def _release(self) -> None:
        os.write(self._write, _DONE)
        os.close(self._write)
        if self._helper is not None:
            self._helper.wait()
            self._helper = None


def _is_stopped(pid: int) -> bool:
    found = processes.stat(pid)
    return found is not None and found.state == "T"


def main(words: list[str]) -> int:
    binary, root, container_id, pid, *stopped = words
    if os.read(0, 1) == _DONE:
        return 0
    # A CRIU that outlived its caller is left to finish: killing it would break the processes that it is in.
    end = time.monotonic() + _LONGEST_DUMP
    while netlock.traced(int(pid)) and time.monotonic() < end:
        time.sleep(0.05)
    netlock.remove(int(pid))
    for one in stopped:
        processes.send(int(one), signal.SIGSTOP)
    return Runc(binary, root).run("resume", container_id, timeout=30).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
