"""A helper process that lets a container go on if the rewarm that captures it cannot.

It waits at the end of a socket pair until the capture is over. When rewarm and the runc that it runs are gone without a
word, or when the container is still held long after its memory was copied (a store that hangs), the helper resumes it,
and after a death removes what the capture had gathered.

    python -m rewarm.lifeline JSON LOCK     (standard input: the socket)
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from rewarm import aside, netlock, processes, scratch
from rewarm.errors import CaptureError, RewarmError
from rewarm.oci.runc import Runc

if TYPE_CHECKING:
    from rewarm.gpu.nvml import Nvml
    from rewarm.gpu.pieces import Span
    from rewarm.gpu.room import Needed
    from rewarm_native.cuda import Driver

_HOLDING, _LOCKED, _TAKEN, _RELEASED = "holding", "locked", "taken", "released"
_TAKING, _PIECE, _QUIET, _LOUD = "taking", "piece", "quiet", "loud"
_FREEZING, _DUMPING, _DUMPED, _RESUMED, _KEPT, _DONE = "freezing", "dumping", "dumped", "resumed", "kept", "done"
_READY = b"ready\n"
_START = 20.0
_PATIENCE = 5.0
_MARGIN = 1.0
_PAUSE, _LONGEST_PAUSE = 0.2, 10.0
_RUNC_TIMEOUT = 30.0
_SHORT = 60.0
"""Seconds that whatever but a dump may take to its end after rewarm's."""
_LONGEST_DUMP = 3600.0
_LONGEST_CALL = 120.0
"""Seconds that a driver call of a rewarm that was killed may take to its end."""


@dataclass(frozen=True)
class Held:
    """What the helper has to know to let a container go on: runc's `binary`, `root` and `id`, the init's host pid and
    start time, the `owner` (rewarm's pid), and the `directory` that is the capture's own; `libcuda` (the setting) and
    the host pids, start times and commands of the processes whose device memory will be held, and the seconds that a
    lock may wait for their GPUs."""

    binary: str
    root: str
    id: str
    pid: int
    start: int
    owner: int
    directory: str
    libcuda: str = "auto"
    cuda: tuple[tuple[int, int, str], ...] = ()
    lock_timeout: float = 0.0


class Lifeline:
    """One helper, of one capture. `fd` is an end of its socket: a program that inherits it keeps the helper waiting."""

    def __init__(self, held: Held, lock: int) -> None:
        """Start the helper, which keeps the descriptor `lock` open (alone.py). Raises CaptureError."""
        self._taking = False
        # Not a pipe: descriptors of device memory go this way.
        self._socket, theirs = socket.socketpair()
        self.fd = self._socket.fileno()
        try:
            self._helper = subprocess.Popen(
                [sys.executable, "-I", "-m", "rewarm.lifeline", json.dumps(asdict(held)), str(lock)],
                stdin=theirs.fileno(),
                pass_fds=(lock,),
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                cwd="/",
            )
        except OSError as error:
            self._socket.close()
            raise CaptureError("start helper", sys.executable, error.strerror or str(error)) from error
        finally:
            theirs.close()
        # Before anything is held: nobody may be there to undo it, or nothing of what that takes.
        assert self._helper.stdout is not None
        with self._helper.stdout as answer:
            ready = select.select([answer], [], [], _START)[0] and answer.readline() == _READY
        if not ready:
            self._socket.close()
            self._helper.kill()
            self._helper.wait()
            raise CaptureError("start helper", sys.executable, "it does not start", "reinstall rewarm")

    def holding(self) -> None:
        """The device memory is about to be taken."""
        self._tell(_HOLDING)

    def locked(self) -> None:
        """All processes are locked, so no lock is on its way any more."""
        self._tell(_LOCKED)

    def quiet(self, engine: str, port: int, limit: float) -> None:
        """The container's engine is about to be told to be quiet; `limit` are the seconds for telling it to go on."""
        self._tell(_QUIET, engine, str(port), str(limit))

    def loud(self) -> None:
        """It was told to go on, or is gone."""
        self._tell(_LOUD)

    def taking(self, pids: Collection[int]) -> None:
        """The device memory of these processes (host pids) is about to be taken; they are stopped for it."""
        self._taking = True
        self._tell(_TAKING, *map(str, pids))

    def piece(self, pid: int, span: Span, fd: int) -> None:
        """This piece is about to be taken; `fd` is its memory, which the helper keeps as well."""
        self._tell(_PIECE, str(pid), str(span.address), str(span.size), fds=[fd])

    def taken(self, needed: Needed) -> None:
        """What has to be free on the GPUs for the device memory that is, or is about to be, in the processes' own."""
        sizes = [f"{uuid}={pid}={size}" for uuid, found in needed.items() for pid, size in found.items()]
        self._tell(_TAKEN, *sizes)

    def released(self) -> None:
        """The processes have their device memory again."""
        self._taking = False
        self._tell(_RELEASED)

    def freezing(self, stopped: Mapping[int, int]) -> None:
        """The container is about to be frozen; `stopped` are host pids and start times of processes that a signal has
        stopped."""
        self._tell(_FREEZING, *(f"{pid}={start}" for pid, start in stopped.items()))

    def dumping(self, pid: int, limit: float) -> None:
        """`pid` leads the session of the dump, which may take `limit` seconds more if this process ends meanwhile."""
        self._tell(_DUMPING, str(pid), str(processes.start_time(pid) or 0), str(limit))

    def dumped(self, limit: float) -> None:
        """CRIU is done. From here on the container may be held for `limit` seconds more."""
        self._tell(_DUMPED, str(limit))

    def resumed(self) -> None:
        """The container runs again."""
        self._tell(_RESUMED)

    def kept(self) -> None:
        """It is held for good, to be killed: no limit any more."""
        self._tell(_KEPT)

    def __enter__(self) -> Lifeline:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        """Wait for the helper's end. If the capture has failed it makes sure that the container runs, and is left to
        that if it takes long: what went wrong is to be said meanwhile."""
        if kind is None:
            self._tell(_DONE)
        self._socket.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._helper.wait(None if kind is None else _PATIENCE)

    def _tell(self, *words: str, fds: Sequence[int] = ()) -> None:
        data = " ".join(words).encode() + b"\n"
        try:
            if fds:
                sent = socket.send_fds(self._socket, [data], fds)
                data = data[sent:]
            self._socket.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            # Somebody has killed the helper. What is held can be released without it, but nothing may be held.
            if words[0] in (_HOLDING, _FREEZING, _QUIET) or self._taking:
                raise CaptureError("reach helper", "of the capture", "it was killed", "capture it again") from None


class _Watch:
    """What the helper has been told so far."""

    def __init__(self, held: Held) -> None:
        """Raises GpuError if there is no driver for what it may have to do."""
        self._held = held
        self._driver: Driver | None = None
        self._nvml: Nvml | None = None
        if held.cuda:
            # Now: they may be replaced by the time they are needed.
            from rewarm.gpu import container, descriptors, library, room, taking  # noqa: F401

            descriptors.allow()
            self._driver = library.load(held.libcuda)
            self._nvml = container.nvml(held.libcuda)
        self._frozen = False
        self._holding = self._locking = False
        self._needed: dict[str, dict[int, int]] = {}
        self._places: dict[int, list[tuple[Span, int]]] = {}
        self._fds: deque[int] = deque()
        self._engine: tuple[str, int, float] | None = None
        self._stopped: dict[int, int] = {}
        self._dump: tuple[int, int, float] | None = None
        self._orphan = False
        self._limit: float | None = None
        self.done = False

    def seconds(self) -> float | None:
        """How long it may take until the next word; None if it does not matter."""
        return None if self._limit is None else max(0.0, self._limit - time.monotonic())

    def receive(self, fds: Iterable[int]) -> None:
        """Descriptors, which come with the lines that they belong to, or before."""
        self._fds.extend(fds)

    def _forget_places(self) -> None:
        for found in self._places.values():
            for _, fd in found:
                os.close(fd)
        self._places = {}

    def hear(self, line: str) -> None:
        word, *rest = line.split()
        if word == _FREEZING:
            self._limit = None
            self._frozen = True
            self._stopped = {int(pid): int(start) for pid, start in (pair.split("=") for pair in rest)}
        elif word == _DUMPING:
            self._dump = int(rest[0]), int(rest[1]), float(rest[2])
        elif word == _DUMPED:
            self._dump, self._limit = None, time.monotonic() + float(rest[0])
        elif word == _RESUMED:
            self._frozen, self._limit = False, None
        elif word in (_HOLDING, _RELEASED):
            self._holding = self._locking = word == _HOLDING
            self._forget_places()
            if word == _RELEASED and not self._frozen:
                self._limit = None
        elif word == _TAKING:
            self._places = {int(pid): [] for pid in rest}
            self._limit = time.monotonic() + _LONGEST_CALL + self._held.lock_timeout
        elif word == _QUIET:
            self._engine = rest[0], int(rest[1]), float(rest[2])
        elif word == _LOUD:
            self._engine = None
        elif word == _PIECE:
            from rewarm.gpu.pieces import Span

            process, *span = map(int, rest)
            self._places[process].append((Span(*span), self._fds.popleft()))
        elif word == _LOCKED:
            self._locking, self._limit = False, None
        elif word == _TAKEN:
            self._limit = None
            for uuid, pid, size in (triple.split("=") for triple in rest):
                self._needed.setdefault(uuid, {})[int(pid)] = int(size)
        elif word == _KEPT:
            self._limit = None
        elif word == _DONE:
            self.done = True

    def resume(self) -> None:
        """Let the container run, if it is held."""
        self._limit = None
        if self._frozen:
            self._frozen = False
            for pid, start in self._stopped.items():
                if processes.start_time(pid) == start:
                    processes.send(pid, signal.SIGSTOP)
            self._thaw()
        if self._holding and self._held.cuda:
            self._release()  # again, if rewarm takes more before it says that all is released
            self._holding = not self._orphan
        alive = processes.start_time(self._held.pid) == self._held.start
        if self._engine is not None and self._orphan and alive:
            from rewarm import engines

            engine, port, limit = self._engine
            self._engine = None
            with contextlib.suppress(RewarmError, OSError):
                engines.resume(engine, self._held.pid, port, limit)

    def _thaw(self) -> None:
        """As long as it takes: a runc that cannot be run now may be mended, and nobody else will come."""
        low_level = Runc(self._held.binary, self._held.root)
        pause = _PAUSE
        while processes.start_time(self._held.pid) == self._held.start:
            # A call that fails says nothing of the container: only what runc says of its state does.
            with contextlib.suppress(OSError, RewarmError):
                done = low_level.run("resume", self._held.id, timeout=_RUNC_TIMEOUT)
                if done.returncode == 0 or low_level.status(self._held.id) not in ("paused", ""):
                    return
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _release(self) -> None:
        from rewarm.gpu import contexts, room, taking  # only where there is a GPU

        found = [contexts.Context(*one) for one in self._held.cuda]
        # The driver does not undo a restore that runs out of memory: whoever took it meanwhile has to let go first.
        while self._driver and self._nvml and any(processes.start_time(pid) == start for pid, start, _ in found):
            with contextlib.suppress(RewarmError):
                room.wait(self._driver, self._nvml, found, self._needed, _LONGEST_CALL)
                break

        # There is nobody to tell what went wrong: the processes show it.
        end = time.monotonic() + (self._held.lock_timeout + _MARGIN if self._locking else 0.0)
        pause = _PAUSE
        while self._driver is not None:
            done = False
            with contextlib.suppress(Exception):  # others' memory is here as well
                # A call that hangs is left to itself.
                work = partial(taking.go_on, self._driver, found, self._places, _LONGEST_CALL, _LONGEST_CALL)
                aside.run(work, 2 * _LONGEST_CALL)
                done = True
            # A lock that waited for its GPU when its caller was killed may come through yet. What was taken out of a
            # process nobody else has: a debugger that is in the way will go, and so may what hangs.
            alive = any(processes.start_time(pid) == start for pid, start, _ in self._held.cuda)
            if time.monotonic() > end and (done or not self._places or not alive):
                return
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def orphaned(self) -> None:
        """Rewarm has ended. A dump that goes on is let go on, for so long."""
        self._orphan = True
        self._limit = time.monotonic() + (_SHORT if self._dump is None else self._dump[2])

    def late(self) -> None:
        """The time is over in which something else was to happen."""
        if not self._orphan:
            self.resume()
            return
        if self._dump is not None:
            processes.kill_group(*self._dump[:2])  # so late its processes are lost, or it does nothing
        self.abandoned(_PATIENCE)
        self.done = True

    def abandoned(self, patience: float = _LONGEST_DUMP) -> None:
        """Everybody is gone; but for a CRIU that outlived its caller, since killing it would break the processes."""
        self._orphan = True
        if self._frozen:
            end = time.monotonic() + patience
            while processes.traced(self._held.pid) and time.monotonic() < end:
                if self._dump is not None and processes.is_dead(self._held.pid, self._held.start):
                    processes.kill_group(*self._dump[:2])  # it may wait for dead threads for ever (dump.py)
                time.sleep(0.05)
            if processes.start_time(self._held.pid) == self._held.start:
                with contextlib.suppress(CaptureError):
                    netlock.remove(self._held.pid)
        self.resume()
        scratch.remove_dead(Path(self._held.directory))


def main(words: list[str]) -> int:
    # What ends rewarm may be meant for all of its cgroup, as `systemctl stop` is. Handlers, since to ignore a signal
    # would be inherited by runc.
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    held = Held(**json.loads(words[0]))
    os.set_inheritable(int(words[1]), False)  # what the driver runs is not to keep it
    watch = _Watch(held)
    pipe = socket.socket(fileno=os.dup(0))
    owner = [os.pidfd_open(held.owner)]
    os.write(1, _READY)
    heard = b""
    while not watch.done:
        found = select.select([0, *owner], [], [], watch.seconds())[0]
        if not found:
            watch.late()
            continue
        if 0 not in found:
            owner = []  # whoever it has started may hold the pipe for as long as it likes
            watch.orphaned()
            continue
        data, fds, flags, _ = socket.recv_fds(pipe, 4096, 64)
        if flags & socket.MSG_CTRUNC:
            return 1  # no more descriptors: rewarm notices that nobody is here before anything is taken
        watch.receive(fds)
        if not data:
            watch.abandoned()
            return 0
        *lines, heard = (heard + data).split(b"\n")
        for line in lines:
            watch.hear(line.decode("ascii"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
