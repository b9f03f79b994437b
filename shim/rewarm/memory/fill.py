"""Filling carved memory into the stopped processes, with many threads.

Each thread reads and verifies one chunk after the other and writes it where it belongs. They begin before there are any
processes: what is verified by then waits in a bounded buffer until `release`. Unverified bytes are never written.
"""

from __future__ import annotations

import mmap
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Protocol

from rewarm import aside
from rewarm.aside import Task
from rewarm.errors import RestoreError
from rewarm.memory.places import WINDOW, Place
from rewarm.trace import Trace
from rewarm_native.memory import Target

_WARM = 512 << 20
"""Bytes that a thread reads ahead from memory at most: more than that it does not get done while CRIU works."""
_COLD = 128 << 20
"""The same from storage: a fast disk gives no more than that while CRIU works, and with more, reading and verifying
would keep the processors from CRIU."""
_SHARE = 16
"""One part in so many of the memory that is available beside what is filled may hold verified chunks that wait for the
processes."""
_FEW = 4
"""Threads, for which reading the tenth of a second before CRIU is started makes a difference."""
_LEAVE = 4
"""One thread in so many does not read before there are processes: CRIU and those whom it traces wait for each other a
hundred times, and for a processor each time."""
_WAITED = 0.005
"""Seconds for a chunk beyond which it has probably come from storage: from memory it takes one or two thousandths."""


class Stream(Protocol):
    """One thread's share of the chunks."""

    def next(self, buffer: memoryview) -> tuple[int, memoryview] | None:
        """The number and the verified bytes of the next chunk, in `buffer` (WINDOW bytes); None at the end."""

    def finish(self) -> None:
        """Do what others wait for, before waiting oneself."""


class Reader(Protocol):
    """All chunks of a snapshot; `parallel` is how many streams pay, `cold` whether they have to wait for storage."""

    parallel: int
    cold: bool

    def stream(self) -> Stream: ...


class Fill:
    """Writes every chunk that `reader` gives to its place. `stop` is set by the first failure, and ends all threads.

    `ahead` is how many bytes may wait for the processes, over all threads.
    """

    def __init__(
        self, reader: Reader, places: Sequence[Place], stop: threading.Event, trace: Trace, *, ahead: int
    ) -> None:
        self._reader = reader
        self._places = places
        self._stop = stop
        self._trace = trace
        each = _COLD if reader.cold else _WARM
        filled = len(places) * WINDOW
        self._ahead = min(ahead, max(0, available() - filled) // _SHARE, each * reader.parallel)
        self._released = threading.Event()
        self._targets: dict[int, Target] = {}
        self._lock = threading.Lock()
        self._written = bytearray(len(places))
        self._failure: Exception | None = None
        self._ready: deque[tuple[int, memoryview]] = deque()
        self._spaces: list[mmap.mmap] = []
        self._waiting: list[Task] = []
        self._tasks: list[Task] = []

    def start(self) -> None:
        """Start to read: with all threads if they will mostly wait for storage. Else each would hold up who prepares
        the rest, since all of Python takes turns: with one if they are few, with none if CRIU leaves them time enough.
        Raises RestoreError if no thread can be made.
        """
        count = min(self._reader.parallel, len(self._places))
        # Whichever thread is the fastest may read all that there is.
        windows = max(1, min(len(self._places), self._ahead // WINDOW // max(1, count)))
        self._waiting = [Task(lambda: self._run(windows), "fill") for _ in range(count)]
        self._start(count if self._reader.cold else min(count, 1 if self._reader.parallel <= _FEW else 0))

    def hurry(self) -> None:
        """All threads but those whose cores are CRIU's and the rest of rewarm's, one of them at least; one at least
        reads from now on. Raises RestoreError."""
        count = len(self._waiting) + len(self._tasks)
        left = max(1, count // _LEAVE)
        self._start(max(len(self._waiting) - left, 0 if self._tasks else min(1, len(self._waiting))))

    def release(self, pids: Mapping[int, int]) -> None:
        """Begin to write: `pids` are the processes' host pids by their numbers in the images; all are stopped.

        Raises RestoreError if one that has memory to come is not there, or if no thread can be made.
        """
        for pid in {place.pid for place in self._places}:
            if pid not in pids:
                raise RestoreError("fill memory", f"process {pid}", "it is not among the restored processes")
            try:
                self._targets[pid] = Target(pids[pid])
            except OSError as error:
                raise RestoreError("fill memory", f"process {pid}", error.strerror or str(error)) from None
        for pid in {place.pid for place in self._places if place.forced}:
            try:
                self._targets[pid].open_forced()
            except OSError as error:
                raise RestoreError("open memory", f"process {pid}", error.strerror or str(error)) from None
        self._released.set()
        self._start(len(self._waiting))

    def join(self) -> None:
        """Wait until everything is written; raises the first failure, or RestoreError if anything is missing."""
        for task in self._tasks:
            task.wait()
        self.raise_failure()
        missing = self._written.count(0)
        if missing:
            raise RestoreError("fill memory", f"{missing} of {len(self._places)} chunks", "they were not written")
        self._close()
        # No Task: nobody has to wait for it.
        with suppress(RuntimeError):  # no more threads: it is given back when this process ends
            threading.Thread(target=self._spaces.clear, name="free", daemon=True).start()

    def raise_failure(self) -> None:
        """Raise the first failure so far, if there is one."""
        if self._failure is not None:
            raise self._failure

    def abandon(self) -> None:
        """Have the threads end, if they can: one that hangs in a dead file system's read ends with the process."""
        self._stop.set()
        self._released.set()
        if aside.wait(self._tasks):
            self._close()
        # A thread that hangs keeps this process, and its own window, but nothing else.
        self._ready.clear()
        self._spaces.clear()

    def _start(self, count: int) -> None:
        for _ in range(count):
            task = self._waiting.pop()
            task.start()
            self._tasks.append(task)

    def _close(self) -> None:
        for target in self._targets.values():
            target.close()
        self._targets.clear()

    def _run(self, ahead: int) -> None:
        try:
            stream = self._reader.stream()
            began = time.monotonic_ns()
            room, early = self._read_ahead(stream, 0 if self._released.is_set() else ahead)
            self._trace.add("memory.read", began, time.monotonic_ns(), bytes=early)
            if not self._released.is_set():
                stream.finish()
            self._released.wait()
            began, late = time.monotonic_ns(), 0
            reading = True
            while not self._stop.is_set():
                asked = time.monotonic()
                item = stream.next(room) if reading else None
                reading = item is not None
                if item is not None:
                    waited = self._reader.cold or time.monotonic() - asked > _WAITED
                    self._write(*item)
                    late += len(item[1])
                    if not waited:
                        continue  # what is ready comes last: one chunk at a time, so that all threads end together
                # In turn: while all threads wrote what is ready, the storage would have nothing to do.
                ready = self._next_ready()
                if ready is not None:
                    self._write(*ready)
                elif not reading:
                    break
            # Only what was read in this phase as well counts as its bytes, so that its rate is not flattered.
            self._trace.add("memory.fill", began, time.monotonic_ns(), bytes=late)
        except Exception as error:
            with self._lock:
                self._failure = self._failure or error  # raised by `join`
            self._stop.set()

    def _read_ahead(self, stream: Stream, ahead: int) -> tuple[memoryview, int]:
        """Make chunks ready for as long as there is room and nowhere to write them.

        Returns a buffer for those that come later, and the bytes that were read.
        """
        try:
            space = mmap.mmap(-1, (ahead + 1) * WINDOW, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError:  # a limit on address space: what is needed is one window
            ahead, space = 0, mmap.mmap(-1, WINDOW, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        # Else the first touch of 8 GB would be two million page faults, while CRIU wants the processors.
        with suppress(OSError):  # a kernel without them
            space.madvise(mmap.MADV_HUGEPAGE)
        # Giving back gigabytes takes time, which is not to be the fill's.
        self._spaces.append(space)
        rooms = memoryview(space)
        early = 0
        for at in range(0, ahead * WINDOW, WINDOW):
            room = rooms[at : at + WINDOW]
            if self._released.is_set() or self._stop.is_set():
                return room, early
            item = stream.next(room)
            if item is None:
                return room, early
            self._ready.append(item)
            early += len(item[1])
        return rooms[ahead * WINDOW :], early

    def _next_ready(self) -> tuple[int, memoryview] | None:
        try:
            return self._ready.popleft()
        except IndexError:
            return None

    def _write(self, number: int, data: memoryview) -> None:
        if self._stop.is_set():
            return
        place = self._places[number]
        target = self._targets[place.pid]
        try:
            if place.forced:
                target.write_forced(place.base, place.mask, data)
            else:
                target.write(place.base, place.mask, data)
        except OSError as error:
            raise RestoreError("fill memory", f"process {place.pid}", error.strerror or str(error)) from None
        self._written[number] = 1


def available() -> int:
    """Bytes of memory that can be had without swapping, as the kernel reckons; 0 where it does not say."""
    with open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    return 0
