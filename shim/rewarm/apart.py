"""Doing something in a process of its own, so that the process that the engine waits for can always come to its end.

A thread in a call that no signal ends (a FUSE server that has taken a request and does not answer, a driver that hangs)
keeps its whole process from exiting and from execve(2): the kernel waits for every thread first. So what may hang is a
child's work. The parent has no threads, touches no store and no driver, and can start the container cold whatever has
become of the child.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import FrameType, TracebackType
from typing import Any, NoReturn

from rewarm import aside, deadline
from rewarm.errors import NotUndone, RestoreError

_LONGEST_START = deadline.SWEEPING
"""Seconds that a child may take until it calls `begin`."""
_LONGEST_UNDOING = 90.0
"""Seconds that a child that was told to end may take for undoing what it has begun."""
_LONGEST_EXIT = 1.0
_ENDING = (signal.SIGTERM, signal.SIGINT)


class Died(Exception):
    """The child is gone, hangs as a whole, or never was; what it had begun is undone."""

    def __init__(self, cause: str, next_step: str) -> None:
        super().__init__(cause, next_step)
        self.cause, self.next_step = cause, next_step


class Child:
    """What the child's work has of its parent: `life` is the read end of a pipe that hangs up when the parent has ended
    or does not count on the child any more (native/guard.c)."""

    def __init__(self, life: int, answer: int) -> None:
        self.life = life
        self._answer = answer

    def begin(self) -> None:
        """From now on the clock of `run` counts."""
        os.write(self._answer, b"\n")


def run(work: Callable[[Child], str], limit: float, undo: Callable[[], None]) -> str:
    """What `work` returns, in a child that dies with this process: "", or the reason why it was in vain.

    `limit`: seconds from the child's `begin` to its answer. `undo` is called here if it gives none. SIGTERM and SIGINT
    are passed on to it, once, as SIGTERM: KeyboardInterrupt is raised when all is undone for that; one that comes too
    late has no effect. Raises NotUndone as `work` and `undo` do, and Died.
    """
    _open_streams()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    with _Signals() as signals:
        try:
            reason = _run(work, limit, signals)
        except Died:
            undo()
            if signals.noted:
                raise KeyboardInterrupt from None
            raise
        if reason and signals.noted:
            raise KeyboardInterrupt
        signals.kept = not reason
    return reason


class _Signals:
    """SIGTERM and SIGINT are noted and wake who waits for `fd`: a handler that raises could do so anywhere. SIGCHLD is
    not ignored, as it may be by inheritance: the kernel would throw the child's exit status away."""

    def __init__(self) -> None:
        self.noted: list[int] = []
        self.kept = False
        """Whether signals go on to be noted, and nothing else, after the end."""

    def __enter__(self) -> _Signals:
        self.fd, self._end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
        self._before: dict[signal.Signals, Any] = {signal.SIGCHLD: signal.signal(signal.SIGCHLD, signal.SIG_DFL)}
        for number in _ENDING:
            if signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        signal.set_wakeup_fd(self._end, warn_on_full_buffer=False)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        signal.set_wakeup_fd(-1)
        for number, handler in self._before.items():
            if number == signal.SIGCHLD or not self.kept:
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
        os.close(self.fd)
        os.close(self._end)
        self.unblock()
        if kind is None and self.noted and not self.kept:
            raise KeyboardInterrupt  # it came when all was done but this

    def unblock(self) -> None:
        """Let what came since the beginning come through."""
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)

    def in_child(self) -> None:
        """SIGTERM raises KeyboardInterrupt there, but only once: who signals all of a group or cgroup sends it a second
        one. SIGINT, which a terminal sends to both, does nothing; ignored it would be for every program below."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, _once())
        signal.signal(signal.SIGINT, lambda number, frame: None)
        self.unblock()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.noted.append(number)


def _once() -> Callable[[int, FrameType | None], None]:
    came: list[int] = []

    def handler(number: int, frame: FrameType | None) -> None:
        came.append(number)
        if len(came) == 1:
            raise KeyboardInterrupt

    return handler


def _open_streams() -> None:
    """Where the caller has closed standard streams, no other descriptor is to take their place (as in Go's runtime)."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


def _run(work: Callable[[Child], str], limit: float, signals: _Signals) -> str:
    parent = os.getpid()
    fds: list[int] = []
    try:
        life, end = pipe = os.pipe()
        fds += pipe
        answers, answer = pipe = os.pipe()
        fds += pipe
        # Signals are blocked: the child is never to go on with what is its parent's to do.
        pid = os.fork()
    except OSError as error:
        for fd in fds:
            os.close(fd)
        text = "see the limits of processes, memory and files of who calls rewarm"
        raise Died(f"start its process: {error.strerror or error}", text) from error
    if pid == 0:
        try:
            os.close(end)
            os.close(answers)
            signals.in_child()
            _child(work, parent, life, answer)
        finally:
            os._exit(1)
    signals.unblock()
    try:
        os.close(life)
        os.close(answer)
        said = _answer(pid, answers, limit, signals)
        # What it has open may hang when it exits, too (FUSE asks the server even then): it is left behind, and does
        # nothing.
        left = said is not None and (said["hangs"] or said["lingers"])
        status = _reap(pid, 0 if left else _LONGEST_EXIT)
        if said is None:
            raise _death(status)
    except OSError as error:
        _kill(pid)
        raise Died(f"wait for its process: {error.strerror or error}", "") from error
    finally:
        os.close(answers)
        os.close(end)
    if "not_undone" in said:
        raise NotUndone(*said["not_undone"])
    if "interrupted" in said:
        raise KeyboardInterrupt
    return str(said["reason"])


def _answer(pid: int, answers: int, limit: float, signals: _Signals) -> dict[str, Any] | None:
    """The child's last line; None if it has ended without one. Raises Died, and kills it, if it gives none in time."""
    data = b""
    given = _LONGEST_START
    end = time.monotonic() + given
    told = False
    while True:
        ready = select.select([answers, signals.fd], [], [], max(0.0, end - time.monotonic()))[0]
        if signals.noted and not told:
            told, given = True, _LONGEST_UNDOING
            end = time.monotonic() + given
            _kill(pid, signal.SIGTERM)
        if signals.fd in ready:
            os.read(signals.fd, 4096)
        if answers in ready:
            piece = os.read(answers, 1 << 16)
            if not piece:
                return None
            data += piece
            if data.startswith(b"\n"):
                data = data[1:]
                if not told:
                    given = limit
                    end = time.monotonic() + given
            if data.endswith(b"\n"):
                found: dict[str, Any] = json.loads(data)
                return found
        elif time.monotonic() >= end:
            _kill(pid)
            _reap(pid, _LONGEST_EXIT)
            step = "look for state D in `ps`, and at the store"
            raise Died(f"its process has given no answer within {given:g} s", step)


def _death(status: int | None) -> Died:
    if status is None:
        return Died("its process hangs", "look for state D in `ps`")
    if status >= 0:
        return Died(f"its process ended with status {status}", "report it")
    step = "see the kernel log for an OOM kill" if status == -signal.SIGKILL else "report it"
    return Died(f"its process was killed by signal {-status}", step)


def _kill(pid: int, number: int = signal.SIGKILL) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _reap(pid: int, seconds: float) -> int | None:
    """Wait for the child's end: its exit status, negative for a signal; None if it has not ended by then."""
    pidfd = os.pidfd_open(pid)
    try:
        if not select.select([pidfd], [], [], seconds)[0]:
            return None
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    finally:
        os.close(pidfd)


def _child(work: Callable[[Child], str], parent: int, life: int, answer: int) -> NoReturn:
    said: dict[str, Any]
    try:
        from rewarm_native import process

        process.set_pdeathsig(signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)  # it died before that: nobody sends the signal any more
        said = {"reason": work(Child(life, answer))}
    except NotUndone as error:
        said = {"not_undone": error.args}
    except KeyboardInterrupt:
        said = {"interrupted": True}
    except BaseException as error:
        said = {"reason": f"restore container: internal error {error!r}; report it"}
    signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    said["hangs"] = aside.hangs()
    # The kernel takes tenths of a second to take a CUDA context down. A cold start may need the memory of it.
    said["lingers"] = "rewarm_native.device" in sys.modules and not said.get("reason", "failed")
    if said["hangs"]:
        _let_go(answer)
    elif said["lingers"]:
        _let_go_of_streams()
    with os.fdopen(answer, "wb") as file:
        file.write(json.dumps(said).encode() + b"\n")
    # At once: taking the interpreter down costs milliseconds.
    os._exit(0)


def _let_go(keep: int) -> None:
    """Close all descriptors but one, as far as that does not hang: locks, sockets, and the container's streams, whose
    other ends wait for their last holder."""
    _let_go_of_streams()
    fds = {int(name) for name in os.listdir("/proc/self/fd")} - {0, 1, 2, keep}
    tasks = [aside.Task(partial(_close, fd), "close") for fd in fds]
    with suppress(RestoreError):  # no more threads: what is open then is closed when this process ends
        for task in tasks:
            task.start()
    aside.wait(tasks)


def _let_go_of_streams() -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)


def _close(fd: int) -> None:
    with suppress(OSError):  # that of the listing itself
        os.close(fd)
