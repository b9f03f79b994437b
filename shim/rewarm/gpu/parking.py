"""Parking: the threads of a container's programs are held still, all but those that do the driver's work.

CUDA's lock keeps a program from calling the driver; it goes on computing, and touches what it has mapped. While device
memory is taken away under it, or not there yet, none of its own threads may run. They are traced from outside (ptrace),
so that they go on by themselves, from where they were, whatever becomes of rewarm.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from types import TracebackType

from rewarm import processes
from rewarm.aside import PATIENCE, Task
from rewarm.errors import GpuError
from rewarm_native import parking

_PAUSE = 0.0002
_SLICE = 0.02
_TRIES = 3
_OPERATION = "hold still"


class Parking:
    """Context manager: inside, no thread of the processes runs but those that may.

    It makes a thread of its own, since the kernel knows a tracer by its thread. Threads and processes that are born
    while it begins are held as well, later ones can only come from threads that may run. Threads that end are no
    failure. What was interrupted in the kernel goes on, but for the calls that signal(7) names under "Interruption of
    system calls by stop signals" (epoll_wait, semop, …): they return EINTR, as after every stop.

    A signal to the whole process goes to a thread that may run, unless that blocks it (kernel/signal.c, wants_signal),
    and its handler is the program's own.
    """

    def __init__(self, pids: Callable[[], Iterable[int]], may_run: Callable[[int, int], bool], limit: float) -> None:
        """`pids` gives the processes (host pids) as they are now, `may_run` says of a process and a thread of it
        whether it goes on; `limit` is how many seconds it may take until all others have stopped."""
        self._pids = pids
        self._may_run = may_run
        self._limit = limit
        self._parked = threading.Event()
        self._end = threading.Event()
        self._held: dict[int, int] = {}
        """Process by thread."""
        self._ended: set[int] = set()
        """Processes and threads that were listed and can run no more."""
        self._refused: dict[int, int] = {}
        """How often a thread was."""
        self._failure: BaseException | None = None
        self._task = Task(self._work, "parking")
        self._tid = 0

    def __enter__(self) -> Parking:
        """Raises GpuError that names the first thread that cannot be held; all go on then."""
        try:
            self._task.start()
            while not self._parked.wait(_SLICE):
                self._collect_ended()
            if self._failure is not None:
                self._wait_for_the_end()
                raise self._failure
        except BaseException:
            self._give_up()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        """Let all go on."""
        try:
            self._end.set()
            self._wait_for_the_end()
        except BaseException:  # of a signal's handler
            self._give_up()
            raise

    @property
    def count(self) -> int:
        """How many threads are held."""
        return len(self._held)

    def _collect_ended(self) -> None:
        """PTRACE_SEIZE waits for an execve(2) of the process, which waits until its other threads are collected, which
        are held already: by a thread that is not in there."""
        for tid in list(self._held):
            with suppress(OSError):
                parking.is_held(tid)

    def _give_up(self) -> None:
        self._end.set()
        self._task.wait(PATIENCE)  # it may never have been started

    def _wait_for_the_end(self) -> None:
        """Of the thread itself: then nobody is traced any more."""
        self._task.wait()
        end = time.monotonic() + PATIENCE
        while os.path.exists(f"/proc/self/task/{self._tid}") and time.monotonic() < end:
            time.sleep(_PAUSE)

    def _work(self) -> None:
        self._tid = threading.get_native_id()
        try:
            self._hold_all()
        except BaseException as error:
            self._failure = error
        self._parked.set()
        if self._failure is None:
            self._end.wait()
        for tid in self._held:
            try:
                parking.let_go(tid)
            except OSError:
                continue  # it has ended, or has not stopped: the end of this thread, which is now, lets it go

    def _hold_all(self) -> None:
        end = time.monotonic() + self._limit
        while not self._end.is_set():
            # Only who runs makes threads: if nothing new is listed while all are still, that is all there is.
            moving = self._moving()
            if not self._hold_new() and moving is None:
                return
            if time.monotonic() > end:
                raise self._late(moving)
            time.sleep(_PAUSE)

    def _moving(self) -> int | None:
        """A thread that has not stopped yet. Forgets those that have ended."""
        for tid, pid in list(self._held.items()):
            try:
                if parking.is_held(tid) or _cannot_run(pid, tid) or self._waits_for_child(pid, tid):
                    continue
            except OSError as error:
                if error.errno != errno.ESRCH:
                    raise
                del self._held[tid]
                continue
            if processes.tracer(pid, tid) == self._tid:
                with suppress(OSError):  # it has ended just now
                    # Again: whoever calls execve(2) while it is seized changes its number before it is told.
                    parking.interrupt(tid)
                return tid
            del self._held[tid]  # another has its number now, by execve(2) as well
        return None

    def _hold_new(self) -> bool:
        """Whether any thread was listed that was not known: held now, or gone, but who knows what it has made."""
        new = False
        for pid in self._pids():
            tids = processes.threads(pid)
            new |= not tids and self._is_news(pid)
            for tid in tids:
                try:
                    if tid in self._held or self._may_run(pid, tid):
                        continue
                    parking.hold(tid)
                except OSError as error:
                    if error.errno in (errno.ESRCH, errno.ENOENT) or _cannot_run(pid, tid):
                        new |= self._is_news(tid)
                        continue
                    if processes.tracer(pid, tid) != self._tid:
                        self._try_again(pid, tid, error)
                        new = True
                        continue
                    # It is held under another number: who calls execve(2) gets that of the process's first thread.
                self._held[tid] = pid
                new = True
        return new

    def _try_again(self, pid: int, tid: int, error: OSError) -> None:
        """A thread that ends is refused as well, and its number may be another's by now. Raises GpuError the third
        time, or if another traces it."""
        self._refused[tid] = self._refused.get(tid, 0) + 1
        if processes.tracer(pid, tid) or self._refused[tid] == _TRIES:
            raise _refused(pid, tid, error) from None

    def _is_news(self, number: int) -> bool:
        known = number in self._ended
        self._ended.add(number)
        return not known

    def _waits_for_child(self, pid: int, tid: int) -> bool:
        """Whether it stands in vfork(2), as all do that start programs, until a child goes on that is held: it stops
        when it comes out of there."""
        found = processes.stat(pid, tid)
        return found is not None and found.state == "D" and not set(processes.children(pid)).isdisjoint(self._held)

    def _late(self, tid: int | None) -> GpuError:
        if tid is None:
            cause = f"it has made new threads or processes for {self._limit:g} s; all go on"
            return GpuError(_OPERATION, "the container", cause, "look at what it starts all the time")
        pid = self._held[tid]
        found = processes.stat(pid, tid)
        cause = f"it has not stopped within {self._limit:g} s (state {found.state if found else '?'}); all go on"
        return GpuError(_OPERATION, _name(pid, tid), cause, f"look at /proc/{pid}/task/{tid}/stack")


def _cannot_run(pid: int, tid: int) -> bool:
    found = processes.stat(pid, tid)
    return found is None or found.state in "ZX"


def _name(pid: int, tid: int) -> str:
    return f"thread {tid} of process {pid} ({processes.command(pid)})"


def _refused(pid: int, tid: int, error: OSError) -> GpuError:
    tracer = processes.tracer(pid, tid)
    if tracer:
        cause = f"process {tracer} ({processes.command(tracer)}) traces it, as a debugger does"
        return GpuError(_OPERATION, _name(pid, tid), cause, "end that one first")
    return GpuError(
        _OPERATION,
        _name(pid, tid),
        error.strerror or str(error),
        "rewarm needs CAP_SYS_PTRACE, and no policy of the node against ptrace",
    )
