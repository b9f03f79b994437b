"""The restoring runc under its guard (native/guard.c).

The guard is the parent of `runc restore` and the subreaper of everything below it. It kills all of that
when rewarm says so or is gone, whatever the moment; told to commit, it steps aside and the container's
init becomes the child of whoever is the subreaper above: the shim.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time

from rewarm import installation
from rewarm.errors import RestoreError


class Guard:
    """Starts `words` with the caller's own standard streams (a restored container inherits them)."""

    def __init__(self, words: list[str], recovery: list[str], env: dict[str, str]) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        program = installation.guard()
        try:
            self._process = subprocess.Popen(
                [program, str(theirs.fileno()), str(len(recovery)), *recovery, *words],
                pass_fds=(theirs.fileno(),),
                env=env,
            )
        except OSError as error:
            ours.close()
            raise RestoreError("start guard", program, error.strerror or str(error), "reinstall rewarm") from error
        finally:
            theirs.close()
        self._socket = ours
        self._buffer = b""

    def wait(self, deadline: float) -> str:
        """How the program ended: "exit N" or "signal N". Raises RestoreError at `deadline` (time.monotonic seconds)."""
        return self._line(deadline)

    def commit(self) -> None:
        """Leave the descendants alive; the guard ends."""
        self._socket.sendall(b"c")
        self._socket.close()
        if self._process.wait(timeout=10) != 0:
            raise RestoreError("release container", "guard", f"it ended with status {self._process.returncode}")

    def abort(self) -> None:
        """Kill every descendant and wait until none is left; harmless after the guard has ended."""
        # A guard that is gone already has left nothing, or what the record finds.
        with contextlib.suppress(OSError):
            self._socket.sendall(b"a")
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._socket.close()

    def _line(self, deadline: float) -> str:
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0:
                raise RestoreError(
                    "wait for runc restore", "the deadline", "it has passed", "see `deadline` in the settings"
                )
            self._socket.settimeout(left)
            try:
                data = self._socket.recv(256)
            except TimeoutError:
                continue
            if not data:
                raise RestoreError("wait for runc restore", "guard", "it died", "see the kernel log for an OOM kill")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.decode("ascii", "replace")
