"""Huge pages for the memory that the driver takes in a process while it moves device memory there.

The driver (580) maps all of it at once, privately, and has it pinned at once, for seconds in which the process's memory
map is locked: with huge pages a checkpoint takes two thirds of the time, and what is dumped from them comes back into
them. Nothing gives a process huge pages from outside where the node's setting is `madvise` (process_madvise(2) refuses
MADV_HUGEPAGE, prctl(2) only takes them away), so the thread that does the driver's work is traced, and made to call
madvise(2) itself before it goes on from its mmap(2). That is done by a program of its own: the end of a tracer, however
it comes, lets go of a thread without interrupting what it does.

    python -m rewarm.gpu.advise TID…      (says "ready", then works until its standard input ends)
"""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import threading
from collections.abc import Collection
from types import TracebackType

from .threads import of_number

_ENABLED = "/sys/kernel/mm/transparent_hugepage/enabled"
_PATIENCE = 2.0
_SMALLEST = 32 << 20
"""Bytes of a mapping that is looked after."""


class HugePages:
    """Context manager: inside, large mappings that threads of processes make are told to use huge pages.

    Does nothing where the node's setting leaves no choice. What goes wrong costs time, and nothing else.
    """

    def __init__(self, pairs: Collection[tuple[int, int]]) -> None:
        """`pairs`: pid (host) and tid (host, or of the process's pid namespace) of each thread."""
        self._pairs = pairs
        self._helper: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> HugePages:
        if not self._pairs or not on_request():
            return self
        found = [of_number(pid, number) for pid, number in self._pairs]
        tids = [str(tid) for tid in found if tid is not None]
        if not tids:
            return self
        with contextlib.suppress(OSError):
            self._helper = subprocess.Popen(
                [sys.executable, "-I", "-m", "rewarm.gpu.advise", *tids],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                cwd="/",
            )
            assert self._helper.stdout is not None
            # It reads the container's memory, which the container may hold up.
            if not select.select([self._helper.stdout], [], [], _PATIENCE)[0]:
                self._helper.kill()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        if self._helper is not None:
            assert self._helper.stdin is not None and self._helper.stdout is not None
            self._helper.stdin.close()
            try:
                self._helper.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                self._helper.kill()
                with contextlib.suppress(subprocess.TimeoutExpired):  # a container's file system may hold it
                    self._helper.wait(_PATIENCE)
            self._helper.stdout.close()


def on_request() -> bool:
    """Whether this node gives huge pages to who asks for them, and to nobody else."""
    try:
        with open(_ENABLED, encoding="ascii") as file:
            return "[madvise]" in file.read()
    except OSError:
        return False


def main(words: list[str]) -> int:
    from rewarm_native import process

    begun = threading.Semaphore(0)

    def trace(tid: int) -> None:
        with contextlib.suppress(OSError):  # gone, or traced by another: no huge pages then
            try:
                traced = process.HugePages(tid, _SMALLEST)
            finally:
                begun.release()
            traced.work()

    for word in words:  # who traces is a thread, not a process
        threading.Thread(target=trace, args=(int(word),), daemon=True).start()
    for _ in words:
        begun.acquire()
    os.write(1, b"ready\n")
    os.read(0, 1)
    os._exit(0)  # without waiting for threads: none of them comes back from the kernel while what it traces lives


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
