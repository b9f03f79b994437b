"""A container held still for a capture, that goes on whatever happens to rewarm.

`runc pause` freezes it by its cgroup. Processes that a signal had stopped are told to continue once they
are frozen, and to stop again before they are thawed: CRIU waits for ever for a stopped process in a frozen
cgroup (seen with the v1 freezer), and a frozen process runs nothing in between.
"""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator
from types import TracebackType

from rewarm import processes
from rewarm.errors import CaptureError
from rewarm.lifeline import Lifeline
from rewarm.oci import runc
from rewarm.oci.runc import Container, Runc

_RUNC_TIMEOUT = 30.0
_RESUMED = "it was resumed while it was being captured, or has ended"


class Frozen:
    """Context manager: paused inside, running again after. `seconds` is how long it was held still.

    The helper behind `lifeline` takes over if this process cannot do its part.
    """

    def __init__(self, low_level: Runc, container: Container, lifeline: Lifeline) -> None:
        self._runc = low_level
        self._container = container
        self._lifeline = lifeline
        self._began = 0.0
        self.frozen = False
        """Whether it may be held still: a thaw that failed leaves it so, for the helper to mend."""
        self.seconds = 0.0
        self.stopped: dict[int, int] = {}
        """Host pids of the processes that a signal had stopped, and their start times."""

    def __enter__(self) -> Frozen:
        container = self._container
        self.stopped = dict(_stopped(container))
        self._lifeline.freezing(self.stopped)
        self.frozen = True
        self._began = time.monotonic()
        try:
            done = _call(self._runc, "pause", container.id, self._lifeline.fd)
            if done.returncode != 0:
                raise CaptureError("pause container", container.id, runc.message(done), "is the freezer cgroup there?")
            for pid in self.stopped:
                processes.send(pid, signal.SIGCONT)
        except BaseException:
            self.frozen = self._thaw().returncode != 0 and self._status() == "paused"
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self.resume(killed=kind is not None)  # what has failed already is not to be covered up

    def resume(self, *, killed: bool = False) -> None:
        """Let it run again; nothing happens the second time. Raises CaptureError when it stays paused, or was resumed
        by somebody else: what was read of it by then is not of one moment. The latter does not matter for what is
        `killed` by then, or given up.
        """
        if not self.frozen:
            return
        done = self._thaw()
        if done.returncode != 0:
            status = self._status()
            self.frozen = status == "paused"
            if self.frozen or not killed:
                next_step = f"run `runc --root {self._container.root} resume {self._container.id}`"
                raise CaptureError(
                    "resume container",
                    self._container.id,
                    runc.message(done) if self.frozen else _RESUMED,
                    next_step if self.frozen else "see `capture_timeout` in the settings",
                )
        self.frozen = False
        self.seconds = time.monotonic() - self._began
        self._lifeline.resumed()

    def keep(self) -> None:
        """Hold it until it is killed. CaptureError if it runs again, since it was held for longer than it may be."""
        self._lifeline.kept()
        if self._runc.status(self._container.id) != "paused":
            raise CaptureError(
                "stop container",
                self._container.id,
                "the store took so long that it was resumed meanwhile; the snapshot is complete, and it runs on",
                "see `capture_timeout` in the settings",
            )

    def check(self) -> None:
        """CaptureError unless runc says that it is paused: what was read of one that somebody else has let go on is not
        of one moment."""
        if self._runc.status(self._container.id) != "paused":
            raise CaptureError(
                "capture container", self._container.id, _RESUMED, "see `capture_timeout` in the settings"
            )

    def _status(self) -> str:
        """What runc says of it. If that is nothing and its init lives, it is as it was: what kept `resume` from its
        work keeps `state` from it, too."""
        there = processes.start_time(self._container.pid) == self._container.start_time
        return self._runc.status(self._container.id) or ("paused" if there else "")

    def _thaw(self) -> subprocess.CompletedProcess[str]:
        for pid, start in self.stopped.items():
            if processes.start_time(pid) == start:
                processes.send(pid, signal.SIGSTOP)
        return _call(self._runc, "resume", self._container.id)


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


def _stopped(container: Container) -> Iterator[tuple[int, int]]:
    for pid in _all(container):
        found = processes.stat(pid)
        if found is not None and found.state == "T":
            yield pid, found.start_time
