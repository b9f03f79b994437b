"""The restoring runc under its guard (native/guard.c).

The guard is the parent of `runc restore` and the subreaper of everything below it. Once rewarm hangs up, for
whatever reason and at whatever moment, it kills all of that and becomes the recovery, which undoes the rest; told
to commit, it steps aside and the container's init becomes the child of whoever is the subreaper above: the shim.
"""

from __future__ import annotations

import os
import select
import signal
import socket
from contextlib import suppress

from rewarm import installation
from rewarm.errors import RestoreError

_RECOVERY_TIMEOUT = 30.0


class Guard:
    """One guard, of one restore. The caller's signal handlers may raise at any point in here."""

    def __init__(self, life: int) -> None:
        """`life`: the read end of a pipe whose hang-up tells that rewarm is dead, even if it cannot end."""
        self._life = life
        self._socket, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._pid = 0
        self._went = False
        self._status: int | None = None
        self._buffer = b""

    def start(self, words: list[str], recovery: list[str], env: dict[str, str]) -> None:
        """Start the guard: from here on `recovery` runs if rewarm dies. `go` has it run `words`, with the caller's own
        standard streams (a restored container inherits them)."""
        program = installation.guard()
        theirs = self._theirs.fileno()
        self._theirs.set_inheritable(True)
        os.set_inheritable(self._life, True)
        argv = [program, str(theirs), str(self._life), str(len(recovery)), *recovery, *words]
        try:
            # Not subprocess: its import alone is a tenth of what rewarm adds. Python ignores SIGPIPE; others must not.
            self._pid = os.posix_spawn(program, argv, env, setsigdef=[signal.SIGPIPE, signal.SIGXFSZ])
        except OSError as error:
            raise RestoreError("start guard", program, error.strerror or str(error), "reinstall rewarm") from error
        finally:
            self._theirs.close()
            os.set_inheritable(self._life, False)

    def go(self) -> None:
        """Have the program run. RestoreError if the guard has died."""
        self._went = True
        try:
            self._socket.sendall(b"s")
        except OSError as error:
            raise RestoreError("start runc restore", "guard", error.strerror or str(error)) from error

    def wait(self) -> str:
        """How the program ended: "exit N" or "signal N". RestoreError if the guard ended before it."""
        while b"\n" not in self._buffer:
            try:
                data = self._socket.recv(256)
            except ConnectionError:
                data = b""
            if not data:
                raise RestoreError("wait for runc restore", "guard", "it died", "see the kernel log for an OOM kill")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.decode("ascii", "replace")

    def commit(self) -> None:
        """Leave the descendants alive; the guard ends. RestoreError if it cannot any more."""
        try:
            self._socket.sendall(b"c")
        except OSError as error:
            raise RestoreError("release container", "guard", error.strerror or str(error)) from error
        if self._wait(None) != 0:
            raise RestoreError("release container", "guard", f"it ended with status {self._status}")

    def recover(self) -> bool:
        """Hang up and wait until the guard has killed every descendant and undone the restore.

        False if it did not do all of that: it was killed, or never started, or had nothing to run yet, or the recovery
        failed.
        """
        self._theirs.close()
        if self._pid and not self._went:
            with suppress(OSError):  # it was killed
                self._socket.sendall(b"a")
        self._socket.close()
        if not self._pid:
            return False
        if self._wait(_RECOVERY_TIMEOUT) is None:
            os.kill(self._pid, signal.SIGKILL)
            self._wait(None)
            return False
        return self._status == 0

    def _wait(self, timeout: float | None) -> int | None:
        """The guard's exit status, negative for a signal; None if it still runs after `timeout` seconds."""
        if self._status is None:
            pidfd = os.pidfd_open(self._pid)
            try:
                # Not select(2): with memory of GPUs behind descriptors there may be thousands.
                poll = select.poll()
                poll.register(pidfd, select.POLLIN)
                if poll.poll(None if timeout is None else timeout * 1000):
                    self._status = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
            finally:
                os.close(pidfd)
        return self._status
