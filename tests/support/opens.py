"""Whether anybody opens a file: what a device does when it is opened cannot be had in a test."""

from __future__ import annotations

import ctypes
import os
import stat
import struct
from pathlib import Path

_OPEN = 0x20
"""IN_OPEN of inotify(7). Opening with O_PATH is none: the driver does not hear of it."""
_libc = ctypes.CDLL(None, use_errno=True)


class Planted:
    """A character device in the place of whatever has its name, as a container with CAP_MKNOD makes one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.unlink(missing_ok=True)
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        self._events = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._events < 0 or _libc.inotify_add_watch(self._events, os.fsencode(path), _OPEN) < 0:
            raise OSError(ctypes.get_errno(), "cannot watch", str(path))

    def opens(self) -> int:
        """How often it was opened; equal events after each other are one."""
        try:
            data = os.read(self._events, 1 << 16)
        except BlockingIOError:
            return 0
        found = 0
        while data:
            _, mask, _, length = struct.unpack_from("=iIII", data)
            found += mask & _OPEN != 0
            data = data[16 + length :]
        return found

    def close(self) -> None:
        os.close(self._events)

    def __enter__(self) -> Planted:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
