"""A process that says which signals reach its handlers, for tests of rewarm.notify and rewarm.registered."""

from __future__ import annotations

import signal
import subprocess
import sys
from types import TracebackType

from rewarm import processes
from rewarm.oci.runc import Container

PROGRAM = """
import os, signal, sys
say = lambda *words: os.write(1, f"{' '.join(map(str, words))}\\n".encode())
for number in map(int, sys.argv[1].split()): signal.signal(number, lambda number, _: say(number))
signal.pthread_sigmask(signal.SIG_BLOCK, set(map(int, sys.argv[2].split())))
say("ready", os.getpid())
while True: signal.pause()
"""


class Handler:
    """`catches` and `blocks`: numbers. `apart`: in a pid namespace of its own, as a container's init is."""

    def __init__(self, *catches: int, blocks: str = "", apart: bool = False) -> None:
        program = [sys.executable, "-I", "-c", PROGRAM, " ".join(map(str, catches)), blocks]
        words = ["unshare", "--pid", "--fork", "--kill-child", *program] if apart else program
        self._started = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        assert self._started.stdout is not None
        self.number = int(self._started.stdout.readline().split()[1])
        """Its own pid, as it sees it."""
        self.pid = processes.children(self._started.pid)[0] if apart else self._started.pid

    def __enter__(self) -> Handler:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        processes.send(self.pid, signal.SIGKILL)
        self._started.communicate()

    @property
    def container(self) -> Container:
        """As if it were a container's init."""
        start = processes.start_time(self.pid) or 0
        return Container("/run/runc", "c", self.pid, start, "/bundle", "/bundle/rootfs", {}, (), "")

    def stop(self) -> None:
        processes.send(self.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        processes.send(self.pid, signal.SIGCONT)

    def said(self) -> int:
        """The next signal that reached a handler; waits for it."""
        assert self._started.stdout is not None
        return int(self._started.stdout.readline())
