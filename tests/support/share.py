"""A directory seen through bindfs, as over a network: it can be slow, hang, and go away."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from types import TracebackType

from support.proc import command, wait_for


class Share:
    """`source` at `target`, through one process of this object's; `rate` limits what is read, in bytes a second."""

    def __init__(self, source: Path, target: Path, rate: int = 0) -> None:
        self.target = target
        target.mkdir()
        limit = [f"--read-rate={rate}"] if rate else []
        self._server = subprocess.Popen(["bindfs", "-f", *limit, source, target])
        wait_for("bindfs", lambda: os.path.ismount(target))

    def __enter__(self) -> Share:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.go_on()
        self.vanish()
        self._server.terminate()
        self._server.wait(10)

    @property
    def pid(self) -> int:
        return self._server.pid

    def hang(self) -> None:
        """Whoever asks from now on waits, until `go_on`."""
        os.kill(self.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        if self._server.poll() is None:
            os.kill(self.pid, signal.SIGCONT)

    def break_off(self) -> None:
        """The server dies: every call fails, the mount stays."""
        self._server.kill()
        self._server.wait()

    def vanish(self) -> None:
        """The mount is gone from its place; files that are open can still be read. Again does nothing."""
        if str(self.target) in _mounted():
            command("umount", "--lazy", self.target)

    def read_so_far(self) -> int:
        """Bytes that the server has read from `source`."""
        words = Path(f"/proc/{self.pid}/io").read_text().split()
        return int(words[words.index("rchar:") + 1])


def _mounted() -> set[str]:
    return {line.split(" ")[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()}
