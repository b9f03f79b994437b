"""The device memory library in one process of a container, spoken to from outside (native/device_memory).

Its thread waits at one end of a socket pair; its name tells the number of the other end, which is taken out of the
process (pidfd_getfd). So there is no path that somebody could replace, and nothing that CRIU would not dump. What comes
from inside is not believed: whatever it says, it costs its own container something, and nobody else.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import struct
import time
from array import array
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from rewarm import processes
from rewarm.aside import Task
from rewarm.errors import GpuError
from rewarm_native import process

from . import threads
from .awake import LIBRARY_THREAD
from .pieces import MAX_PIECES, Span, is_span

_MESSAGE = struct.Struct("<IIQiIQQQ16s")
_MAGIC = 0x314D4452
_HELLO, _LIST, _OWN, _EXPORT, _UNMAP, _MAP = range(1, 7)
_PROTOCOL = 1
_WINDOW = 32
"""Requests that are on their way at once: answers wait in the socket's buffer, which is bounded."""
_SHORT = 2.0
_IMPORTED, _AWAY = 1, 2
_LOST = "lost"
"""In the place of the number in the thread's name."""
_NVIDIA_MAJOR = 195
_SCM_PIDFD = 4
"""What comes with every message if the process has set SO_PASSPIDFD: a descriptor, too."""
_MAX_ERRNO = 4095


class Busy(GpuError):
    """A thread that stands still has locked the library's table: at another moment it would not."""


class Listed(NamedTuple):
    """A piece: the process's ordinal of its GPU and that one's UUID (16 bytes), whether its memory is imported (so that
    it cannot be exported again), and whether it is not mapped."""

    span: Span
    ordinal: int
    uuid: bytes
    imported: bool
    away: bool


class Served:
    """The library in the process `pid` (host). Raises GpuError in all that it does."""

    def __init__(self, pid: int, number: int, limit: float) -> None:
        """`number`: its end of the socket pair; `limit`: seconds for a call of the driver."""
        self.pid = pid
        self.changing = 0
        """At the last `list`: threads that were in the middle of serving or freeing a piece, which it may not show."""
        self._limit = limit
        self._sequence = int.from_bytes(os.urandom(4), "little") << 24
        try:
            fd = process.get_fd(pid, number)
        except OSError as error:
            raise self._error("reach", error.strerror or str(error)) from None
        try:
            self._socket = socket.socket(fileno=fd)
        except OSError:
            _close([fd])
            raise self._error("reach", f"descriptor {number} is no socket any more") from None
        if self._socket.family != socket.AF_UNIX or self._socket.type != socket.SOCK_SEQPACKET:
            _close([self._socket.detach()])
            raise self._error("reach", f"descriptor {number} is not its socket any more")

    def close(self) -> None:
        self._socket.close()

    def hello(self) -> tuple[int, int]:
        """Bytes and number of its pieces."""
        answer, _ = self._one(_HELLO, Span(0, 0), _SHORT)
        status, protocol, _, size, count, _ = answer
        self._check(status, "ask")
        if protocol != _PROTOCOL:
            raise self._error("ask", f"it speaks version {protocol} of the protocol, this rewarm {_PROTOCOL}")
        return size, count

    def imported(self) -> int:
        """Bytes that are not its own, but were mapped."""
        (status, _, address, _, _, _), _ = self._one(_HELLO, Span(0, 0), _SHORT)
        self._check(status, "ask")
        return address

    def list(self) -> list[Listed]:
        """All pieces, in the order of their addresses."""
        self._send(_LIST, Span(0, 0), time.monotonic() + self._limit)
        found: list[Listed] = []
        end = 0
        deadline = time.monotonic() + self._limit
        while True:
            (status, ordinal, address, size, count, uuid), fds = self._receive(_LIST, self._sequence, deadline)
            _close(fds)
            self._check(status, "list pieces of")
            if size == 0:
                self.changing = address
                if count != len(found):
                    raise self._error("list pieces of", f"it names {len(found)} of {count}")
                return found
            if not is_span(address, size) or address < end or len(found) == MAX_PIECES:
                raise self._error("list pieces of", f"it names {size} bytes at {address:#x}")
            end = address + size
            found.append(Listed(Span(address, size), ordinal, uuid, bool(count & _IMPORTED), bool(count & _AWAY)))

    def own(self, spans: Sequence[Span]) -> None:
        """Replace imported memory by memory of the process's own with the same content."""
        self._each(_OWN, spans, "make its own memory in")

    def export(self, spans: Sequence[Span], took: Callable[[int, int], None]) -> None:
        """A descriptor for each piece: `took` gets its index and the descriptor, and has to close it."""
        self._each(_EXPORT, spans, "export memory of", took=took)

    def unmap(self, spans: Sequence[Span]) -> None:
        """Take the memory away; the addresses stay."""
        self._each(_UNMAP, spans, "unmap memory of")

    def map(self, spans: Sequence[Span], fds: Sequence[int]) -> None:
        """Put the memory behind the descriptors, which stay the caller's, to where it belongs; what is there stays."""
        self._each(_MAP, spans, "map memory of", fds=fds)

    def _each(
        self,
        op: int,
        spans: Sequence[Span],
        operation: str,
        *,
        fds: Sequence[int] | None = None,
        took: Callable[[int, int], None] | None = None,
    ) -> None:
        first = self._sequence + 1
        deadline = time.monotonic() + self._limit
        for at in range(len(spans) + _WINDOW):
            if at < len(spans):
                self._send(op, spans[at], deadline, None if fds is None else fds[at])
            if at >= _WINDOW:
                (status, *_), received = self._receive(op, first + at - _WINDOW, deadline)
                self._answered(status, received, spans[at - _WINDOW], operation, at - _WINDOW, took)

    def _answered(
        self,
        status: int,
        received: array[int],
        span: Span,
        operation: str,
        index: int,
        took: Callable[[int, int], None] | None,
    ) -> None:
        if status or took is None or len(received) != 1 or not _is_memory(received[0]):
            _close(received)
            self._check(status, operation, f" ({span.size} bytes at {span.address:#x})")
            if took is not None:
                raise self._error(operation, f"it has sent {len(received)} descriptors, or none of device memory")
            return
        took(index, received[0])

    def _one(self, op: int, span: Span, limit: float) -> tuple[tuple[int, int, int, int, int, bytes], array[int]]:
        deadline = time.monotonic() + limit
        self._send(op, span, deadline)
        answer, fds = self._receive(op, self._sequence, deadline)
        _close(fds)
        return answer, fds

    def _send(self, op: int, span: Span, deadline: float, fd: int | None = None) -> None:
        self._sequence += 1
        data = _MESSAGE.pack(_MAGIC, op, self._sequence, 0, 0, span.address, span.size, 0, b"")
        rights = [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [fd]))]
        try:
            self._socket.settimeout(self._left(deadline))
            self._socket.sendmsg([data], rights, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
        except OSError as error:
            raise self._error("tell", str(error.strerror or error)) from None

    def _receive(
        self, op: int, sequence: int, deadline: float
    ) -> tuple[tuple[int, int, int, int, int, bytes], array[int]]:
        """The answer to a request; what is left of somebody who was killed is passed over."""
        while True:
            try:
                self._socket.settimeout(self._left(deadline))
                data, fds = self._read()
            except OSError as error:
                raise self._error("hear", str(error.strerror or error)) from None
            if not data:
                raise self._error("hear", "it has closed its socket")
            if len(data) == _MESSAGE.size:
                magic, its, echoed, status, device, address, size, count, uuid = _MESSAGE.unpack(data)
                if (magic, its, echoed) == (_MAGIC, op, sequence):
                    return (status, device, address, size, count, uuid), fds
            if not all(map(_is_memory, fds)):
                _close(fds)
                raise self._error("hear", "it has sent descriptors of other things than device memory")
            _close(fds)

    def _read(self) -> tuple[bytes, array[int]]:
        fds = array("i")
        room = socket.CMSG_SPACE(4 * fds.itemsize)
        # The process has this end as well, and may change its flags: it is not to wait, whatever they say.
        flags = socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
        data, control, _, _ = self._socket.recvmsg(_MESSAGE.size + 1, room, flags)
        for level, kind, rights in control:
            if level == socket.SOL_SOCKET and kind in (socket.SCM_RIGHTS, _SCM_PIDFD):
                fds.frombytes(rights[: len(rights) - len(rights) % fds.itemsize])
        return data, fds

    def _left(self, deadline: float) -> float:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError(errno.ETIMEDOUT, f"it has not answered within {self._limit:g} s")
        return left

    def _check(self, status: int, operation: str, what: str = "") -> None:
        if status:
            cause = f"CUDA error {status}" if status > 0 else os.strerror(min(-status, _MAX_ERRNO))
            if status == 2:
                cause = "the GPU has not enough free memory"
            error = self._error(operation, cause + what)
            if status == -errno.EAGAIN:
                raise Busy(error.operation, error.object, error.cause, error.next_step)
            raise error

    def _error(self, operation: str, cause: str) -> GpuError:
        what = f"the device memory library in process {self.pid} ({processes.command(self.pid)})"
        return GpuError(operation, what, cause, "rewarm.dev/device-memory: off leaves the library out")


def find(pid: int, limit: float) -> Served | None:
    """The library in a process (host pid), None if it serves nothing there. Raises GpuError."""
    for tid in processes.threads(pid):
        prefix, _, number = threads.name(pid, tid).rpartition("-")
        if f"{prefix}-" == LIBRARY_THREAD and number == _LOST:
            what = f"the device memory library in process {pid} ({processes.command(pid)})"
            cause = "the program has closed its socket, and has memory that only the library could take out"
            raise GpuError("reach", what, cause, "restart the container")
        if f"{prefix}-" == LIBRARY_THREAD and number.isascii() and number.isdigit():
            return Served(pid, int(number), limit)
    return None


def _is_memory(fd: int) -> bool:
    """Whether it is NVIDIA's, or a memfd, as a driver for tests has it: with both, nothing waits for anybody."""
    if stat.S_ISCHR(os.fstat(fd).st_mode):
        return os.major(os.fstat(fd).st_rdev) == _NVIDIA_MAJOR
    try:
        fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        return False
    return True


def _close(fds: Sequence[int]) -> None:
    """In a thread, unless it is device memory: the end of a socket or of a file of FUSE waits for somebody."""
    for fd in fds:
        if _is_memory(fd):
            os.close(fd)
        else:
            Task(partial(os.close, fd), "close").start()
