"""A container held still for a capture, that goes on whatever happens to rewarm.

`runc pause` freezes it by its cgroup. Processes that a signal had stopped are told to continue once they
are frozen, and to stop again before they are thawed: CRIU waits for ever for a stopped process in a frozen
cgroup (seen with the v1 freezer), and a frozen process runs nothing in between. A helper process (this
module run as a program) waits at the end of a pipe until the capture is over: when rewarm and the runc that
it runs are gone without a word, the helper resumes the container and removes what the capture had gathered.

    python -m rewarm.frozen BINARY ROOT ID PID SCRATCH STOPPED…      (standard input: the pipe)
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

from rewarm import netlock, processes, scratch
from rewarm.errors import CaptureError
from rewarm.oci import runc
from rewarm.oci.runc import Container, Runc

_RESUMED, _DONE = b"r", b"d"
_RUNC_TIMEOUT = 30.0
_LONGEST_DUMP = 3600.0


class Frozen:
    """Context manager: paused inside, running again after. `seconds` is how long it was held still.

    `directory` is the capture's own, which the helper removes if it has to take over.
    """

    def __init__(self, low_level: Runc, container: Container, directory: Path) -> None:
        self._runc = low_level
        self._container = container
        self._directory = directory
        self._write = -1
        self._helper: subprocess.Popen[bytes] | None = None
        self._began = 0.0
        self._resumed = False
        self.seconds = 0.0
        self.stopped: frozenset[int] = frozenset()
        """Host pids of the processes that a signal had stopped."""

    @property
    def lifeline(self) -> int:
        """The pipe's write end: a program that inherits it keeps the helper waiting."""
        return self._write

    def __enter__(self) -> Frozen:
        container = self._container
        self.stopped = frozenset(pid for pid in _all(container) if _is_stopped(pid))
        self._start_helper()
        self._began = time.monotonic()
        try:
            done = _call(self._runc, "pause", container.id, self._write)
            if done.returncode != 0:
                raise CaptureError("pause container", container.id, runc.message(done), "is the freezer cgroup there?")
            for pid in self.stopped:
                processes.send(pid, signal.SIGCONT)
        except BaseException:
            self._end_helper(b"")
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        try:
            self.resume()
        finally:
            self._end_helper(_DONE if self._resumed else b"")

    def resume(self) -> None:
        """Let it run again; nothing happens the second time. Raises CaptureError when it stays paused."""
        if self._resumed:
            return
        for pid in self.stopped:
            processes.send(pid, signal.SIGSTOP)
        done = _call(self._runc, "resume", self._container.id)
        if done.returncode != 0 and self._runc.status(self._container.id) == "paused":
            raise CaptureError(
                "resume container",
                self._container.id,
                runc.message(done),
                f"run `runc --root {self._container.root} resume {self._container.id}`",
            )
        self._resumed = True
        self.seconds = time.monotonic() - self._began
        self._tell(_RESUMED)

    def _start_helper(self) -> None:
        container = self._container
        words = [self._runc.binary, container.root, container.id, str(container.pid), str(self._directory)]
        read, self._write = os.pipe()
        try:
            self._helper = subprocess.Popen(
                [sys.executable, "-I", "-m", "rewarm.frozen", *words, *map(str, self.stopped)],
                stdin=read,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                cwd="/",
            )
        except OSError as error:
            os.close(self._write)
            raise CaptureError("start helper", sys.executable, error.strerror or str(error)) from error
        finally:
            os.close(read)

    def _tell(self, word: bytes) -> None:
        # A helper that somebody killed has nobody left to tell.
        with contextlib.suppress(BrokenPipeError):
            os.write(self._write, word)

    def _end_helper(self, word: bytes) -> None:
        """Wait for the helper's end. Without a `word` from us it finds the end of its pipe, and resumes."""
        self._tell(word)
        os.close(self._write)
        if self._helper is not None:
            self._helper.wait()


def _call(low_level: Runc, command: str, container_id: str, *inherited: int) -> subprocess.CompletedProcess[str]:
    """Run `runc pause` or `resume`, in a session of its own: Ctrl-C at a terminal is not meant for them."""
    words = low_level.words(command, container_id)
    try:
        return subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_RUNC_TIMEOUT,
            start_new_session=True,
            pass_fds=inherited,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CaptureError(f"{command} container", container_id, str(error)) from error


def _all(container: Container) -> set[int]:
    """The init's tree and what `runc exec` put beside it: all of that is frozen."""
    return {*processes.tree(container.pid), *processes.in_cgroups(container.cgroup_paths)}


def _is_stopped(pid: int) -> bool:
    found = processes.stat(pid)
    return found is not None and found.state == "T"


def _traced(pid: int) -> bool:
    """Whether some process (CRIU, a debugger) traces `pid`."""
    try:
        with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file:
            return any(line.startswith("TracerPid:") and line.split()[1] != "0" for line in file)
    except (FileNotFoundError, ProcessLookupError):
        return False


def main(words: list[str]) -> int:
    binary, root, container_id, pid, directory, *stopped = words
    told = b""
    while _DONE not in told and (word := os.read(0, 16)):
        told += word
    if _DONE in told:
        return 0
    if _RESUMED not in told:
        # A CRIU that outlived its caller is left to finish: killing it would break the processes that it is in.
        end = time.monotonic() + _LONGEST_DUMP
        while _traced(int(pid)) and time.monotonic() < end:
            time.sleep(0.05)
        for one in stopped:
            processes.send(int(one), signal.SIGSTOP)
        _call(Runc(binary, root), "resume", container_id)
        netlock.remove(int(pid))
    scratch.remove_dead(Path(directory))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
