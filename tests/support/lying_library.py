"""A process that says it has the device memory library, and plays that over the control socket as badly as it likes."""

from __future__ import annotations

import array
import contextlib
import ctypes
import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rewarm.gpu import served
from rewarm.gpu.pieces import Span
from rewarm.gpu.served import Served
from support.device_program import EXPORT, HELLO, LIST, MAGIC, MAP, MESSAGE, Message
from support.proc import wait_for

PR_SET_NAME = 15
LIMIT = 10.0
Play = Callable[["End"], None]


class End:
    """The library's end of the socket pair, inside the process; `other` is the one that rewarm takes."""

    def __init__(self, own: socket.socket, other: socket.socket) -> None:
        self.own = own
        self.other = other

    def receive(self) -> tuple[Message, list[int]]:
        """The next request and what came with it. Ends the process when there can be none."""
        data, controls, _, _ = self.own.recvmsg(1024, socket.CMSG_SPACE(64))
        if not data:
            os._exit(0)
        numbers = array.array("i")
        for _, _, content in controls:
            numbers.frombytes(content)
        return Message(*MESSAGE.unpack(data)[1:]), list(numbers)

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.own.sendmsg([data], rights)

    def answer(self, to: Message, fds: Sequence[int] = (), **fields: int) -> None:
        self.send(answered(to, **fields), fds)


def answered(to: Message, **fields: int) -> bytes:
    """The answer to a request, with other values where `fields` has them."""
    values = {"magic": MAGIC, "op": to.op, "sequence": to.sequence, "status": 0, "device": 0}
    values |= {"address": to.address, "size": to.size, "count": 0} | fields
    return MESSAGE.pack(*values.values(), b"\x10" * 16)


def memory(content: bytes = b"") -> int:
    found = os.memfd_create("device")
    os.write(found, content)
    return found


def honest(*spans: tuple[int, int], before: Callable[[End, Message], object] | None = None) -> Play:
    """One that answers as it should, for these pieces; the content of each is its address. `before` is called with each
    request before that is answered."""

    def play(end: End) -> None:
        while True:
            request, fds = end.receive()
            for fd in fds:
                os.close(fd)
            if before is not None:
                before(end, request)
            if request.op == HELLO:
                end.answer(request, device=1, address=0, size=sum(size for _, size in spans), count=len(spans))
            elif request.op == LIST:
                for address, size in spans:
                    end.answer(request, address=address, size=size)
                end.answer(request, size=0, count=len(spans))
            elif request.op == EXPORT:
                fd = memory(request.address.to_bytes(8, "little"))
                end.answer(request, [fd])
                os.close(fd)
            else:
                end.answer(request, status=-9 if request.op == MAP and len(fds) != 1 else 0)

    return play


def listing(*pieces: tuple[int, int], count: int | None = None) -> Play:
    """One that lists these, and then says how many they are, or another number."""

    def play(end: End) -> None:
        request, _ = end.receive()
        for address, size in pieces:
            end.answer(request, address=address, size=size)
        end.answer(request, size=0, count=len(pieces) if count is None else count)

    return play


def sends(*make: Callable[[], int], status: int = 0) -> Play:
    """These with the answer to an EXPORT."""

    def play(end: End) -> None:
        while True:
            request, _ = end.receive()
            fds = [one() for one in make]
            end.answer(request, fds, status=status)
            for fd in fds:
                os.close(fd)

    return play


def regular() -> int:
    with tempfile.TemporaryFile(dir="/var/tmp") as file:
        return os.dup(file.fileno())


STRANGE: dict[str, Callable[[], int]] = {
    "pipe": lambda: os.pipe()[0],
    "writing": lambda: os.pipe()[1],
    "socket": lambda: socket.socket().detach(),
    "unix": lambda: socket.socketpair()[0].detach(),
    "null": lambda: os.open("/dev/null", os.O_RDWR),
    "zero": lambda: os.open("/dev/zero", os.O_RDWR),
    "regular": regular,
    "directory": lambda: os.open("/", os.O_RDONLY),
    "path": lambda: os.open("/dev/null", os.O_PATH),
    "process": lambda: os.pidfd_open(os.getpid()),
}


WRONG: list[Callable[[Message], bytes]] = [
    lambda to: answered(to)[:-1],
    lambda to: answered(to) + b"\0",
    lambda to: answered(to) * 2,
    lambda to: b"x",
    lambda to: answered(to, magic=0),
    lambda to: answered(to, op=to.op + 1),
    lambda to: answered(to, op=0),
    lambda to: answered(to, sequence=to.sequence - 1),
    lambda to: answered(to, sequence=to.sequence + 40),
    lambda to: answered(to, sequence=0),
    lambda to: answered(to, sequence=to.sequence ^ 1 << 63),
]


class Lying:
    """A child whose only thread is named as the library's and does `play`, and then nothing.

    `make` gives both ends (a pair by default); `name`, of the number of rewarm's end, the thread's name.
    """

    def __init__(
        self,
        play: Play | None = None,
        make: Callable[[], tuple[socket.socket, socket.socket]] | None = None,
        name: Callable[[int], str] = "rewarm-mem-{}".format,
    ) -> None:
        ready, said = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                own, other = (make or pair)()
                ctypes.CDLL(None).prctl(PR_SET_NAME, name(other.fileno()).encode(), 0, 0, 0)
                os.write(said, b"x")
                if play is not None:
                    play(End(own, other))
                while True:
                    time.sleep(60)
            except BaseException:
                os._exit(1)
        os.close(said)
        try:
            assert os.read(ready, 1) == b"x"
        finally:
            os.close(ready)

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)


def pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def two(family: int, kind: int) -> Callable[[], tuple[socket.socket, socket.socket]]:
    """Sockets that have nothing to do with each other."""
    return lambda: (socket.socket(family, kind), socket.socket(family, kind))


def open_files() -> list[str]:
    """What this process has open, without the directory that tells."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.append(f"{name} {os.readlink(f'/proc/self/fd/{name}')}")
    return sorted(found)


@contextlib.contextmanager
def nothing_stays_open() -> Iterator[None]:
    """Inside as many descriptors come as go. What is not device memory a thread closes."""
    before = open_files()
    yield
    wait_for("descriptors that were closed", lambda: open_files() == before, timeout=5)


def threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


@contextlib.contextmanager
def reached(process: Lying, limit: float = LIMIT) -> Iterator[Served]:
    found = served.find(process.pid, limit)
    assert found is not None
    try:
        yield found
    finally:
        found.close()


def noting(took: list[int]) -> Callable[[int, int], None]:
    def note(index: int, fd: int) -> None:
        took.append(index)
        os.close(fd)

    return note


def exported(library: Served, spans: list[Span]) -> list[bytes]:
    """What is in the memory of each, in their order."""
    contents: list[bytes] = []

    def took(index: int, fd: int) -> None:
        assert index == len(contents)
        contents.append(os.pread(fd, 8, 0))
        os.close(fd)

    library.export(spans, took)
    return contents
