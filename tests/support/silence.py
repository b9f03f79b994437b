"""A read-only view of a directory by a FUSE server that can fall silent: it takes requests and does not answer.

As long as a FUSE request waits to be taken, a fatal signal ends the wait for it; once the server has it, only the
answer does (Linux, fs/fuse/dev.c, request_wait_answer), or the end of the server.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from support.proc import command

# The protocol, version 7.31: include/uapi/linux/fuse.h.
OPERATIONS = {
    1: "LOOKUP", 3: "GETATTR", 14: "OPEN", 15: "READ", 17: "STATFS", 18: "RELEASE", 25: "FLUSH", 26: "INIT",
    27: "OPENDIR", 28: "READDIR", 29: "RELEASEDIR", 35: "CREATE",
}  # fmt: skip
ALL = frozenset(OPERATIONS.values()) - {"INIT"}
_UNANSWERED = (2, 36, 42)  # FORGET, INTERRUPT, BATCH_FORGET
_HEADER = struct.Struct("=IIQQIIII")  # len, opcode, unique, nodeid, uid, gid, pid, padding
_ANSWER = struct.Struct("=IiQ")  # len, error, unique
_INIT = struct.Struct("=IIIIHHI36x")  # major, minor, max_readahead, flags, two limits, max_write
_ENTRY = struct.Struct("=QQQQII")  # nodeid, generation, entry and attribute validity
_VALID = struct.Struct("=QII")
_ATTR = struct.Struct("=QQQQQQIIIIIIIIII")
_OPEN = struct.Struct("=QII")
_READ = struct.Struct("=QQI")
_DIRENT = struct.Struct("=QQII")
_STATFS = struct.Struct("=QQQQQIIII24x")
_LARGEST = 1 << 20


class Silence:
    """`source` at `target`; without a source everything is asked for in vain."""

    def __init__(self, target: Path, source: Path | None = None) -> None:
        self.target = target
        target.mkdir()
        self.silent = frozenset[str]() if source else ALL
        self._only: Path | None = None
        self.asked = threading.Event()
        """Set when somebody hangs."""
        self._paths: list[Path] = [source or target]  # by nodeid, from 1
        self._fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        options = f"fd={self._fd},rootmode=40755,user_id=0,group_id=0,allow_other"
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mount(b"silence", os.fsencode(target), b"fuse.silence", 0, options.encode()) != 0:
            error = ctypes.get_errno()
            os.close(self._fd)
            raise OSError(error, os.strerror(error), str(target))
        threading.Thread(target=self._serve, daemon=True).start()

    def __enter__(self) -> Silence:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.end()

    def fall_silent(self, *operations: str, only: Path | None = None) -> None:
        """Answer these no more, all without any; if `only` is given, for that file of the source."""
        self._only = only
        self.silent = frozenset(operations) or ALL

    def end(self) -> None:
        """Unmount, so that whoever hangs goes on with an error. A second call does nothing."""
        if self._fd >= 0:
            command("umount", "--force", "--lazy", self.target)
            os.close(self._fd)
            self._fd = -1

    def _serve(self) -> None:
        answers: dict[str, Callable[[int, bytes], bytes]] = {
            "INIT": lambda node, body: _INIT.pack(7, 31, 1 << 17, 0, 16, 12, 1 << 17),
            "LOOKUP": self._lookup,
            "GETATTR": lambda node, body: _VALID.pack(0, 0, 0) + self._attributes(node),
            "OPEN": lambda node, body: _OPEN.pack(node, 0, 0),
            "OPENDIR": lambda node, body: _OPEN.pack(node, 0, 0),
            "READ": self._read,
            "READDIR": self._list,
            "STATFS": lambda node, body: _STATFS.pack(0, 0, 0, 0, 0, 4096, 255, 4096, 0),
            "FLUSH": lambda node, body: b"",
            "RELEASE": lambda node, body: b"",
            "RELEASEDIR": lambda node, body: b"",
        }
        while True:
            try:
                request = os.read(self._fd, _LARGEST)
                _, opcode, unique, node, *_ = _HEADER.unpack_from(request)
                name = OPERATIONS.get(opcode, "")
                if name in self.silent and self._only in (None, self._paths[node - 1]):
                    self.asked.set()
                elif opcode not in _UNANSWERED:
                    body, error = b"", 0
                    try:
                        answer = answers.get(name)
                        body, error = (b"", errno.ENOSYS) if answer is None else (answer(node, request[40:]), 0)
                    except OSError as caught:
                        error = caught.errno or errno.EIO
                    os.write(self._fd, _ANSWER.pack(_ANSWER.size + len(body), -error, unique) + body)
            except FileNotFoundError:
                continue  # who asked has been interrupted
            except OSError:
                return  # unmounted

    def _lookup(self, node: int, body: bytes) -> bytes:
        path = self._paths[node - 1] / os.fsdecode(body[:-1])
        path.lstat()
        if path not in self._paths:
            self._paths.append(path)
        number = self._paths.index(path) + 1
        return _ENTRY.pack(number, 0, 0, 0, 0, 0) + self._attributes(number)

    def _attributes(self, node: int) -> bytes:
        found = self._paths[node - 1].lstat()
        times = [int(time) for time in (found.st_atime, found.st_mtime, found.st_ctime)]
        parts = [time % 10**9 for time in (found.st_atime_ns, found.st_mtime_ns, found.st_ctime_ns)]
        who = (found.st_mode, found.st_nlink, found.st_uid, found.st_gid)
        return _ATTR.pack(node, found.st_size, found.st_blocks, *times, *parts, *who, 0, 4096, 0)

    def _read(self, node: int, body: bytes) -> bytes:
        _, offset, size = _READ.unpack_from(body)
        with self._paths[node - 1].open("rb") as file:
            return os.pread(file.fileno(), size, offset)

    def _list(self, node: int, body: bytes) -> bytes:
        _, offset, size = _READ.unpack_from(body)
        found = b""
        for at, path in enumerate(sorted(self._paths[node - 1].iterdir())):
            name = os.fsencode(path.name)
            kind = stat.S_IFMT(path.lstat().st_mode) >> 12
            entry = _DIRENT.pack(2**32 + at, at + 1, len(name), kind) + name
            entry += bytes(-len(entry) % 8)
            if at >= offset and len(found) + len(entry) <= size:
                found += entry
        return found
