"""POSIX named semaphores, sem_open(3), by ctypes: Python's own are unlinked as soon as they are made."""

from __future__ import annotations

import ctypes
import os

_libc = ctypes.CDLL(None, use_errno=True)
_libc.sem_open.restype = ctypes.c_void_p


class NamedSemaphore:
    """The semaphore /dev/shm/sem.NAME, made with value 0 unless it is there. Raises OSError.

    glibc makes it under a temporary name that it unlinks: the mapping is one of a deleted file with another link.
    """

    def __init__(self, name: str) -> None:
        arguments = (f"/{name}".encode(), ctypes.c_int(os.O_CREAT), ctypes.c_uint(0o600), ctypes.c_uint(0))
        found = _libc.sem_open(*arguments)
        if not found:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), f"sem_open {name}")
        self._semaphore = ctypes.c_void_p(found)

    def value(self) -> int:
        result = ctypes.c_int()
        _libc.sem_getvalue(self._semaphore, ctypes.byref(result))
        return result.value

    def post(self) -> None:
        _libc.sem_post(self._semaphore)

    def close(self) -> None:
        _libc.sem_close(self._semaphore)
