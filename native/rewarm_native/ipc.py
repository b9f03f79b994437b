"""What another IPC namespace has, and how one is that nobody has changed. See ipc.c."""

from __future__ import annotations

import os

from ._native import ffi, lib

KINDS = ("shm", "msg", "sem")
"""Shared memory, message queues, semaphore sets: the numbers of native.h."""


def new() -> int:
    """A descriptor of an IPC namespace that is new, not inheritable. Needs CAP_SYS_ADMIN. Raises OSError."""
    return _checked(lib.rw_new_ipcns(), "make an IPC namespace")


def read(namespace: int, path: str, most: int) -> bytes:
    """A file of /proc that tells of the reader's IPC namespace, read in the one of a descriptor.

    Raises OSError: EINVAL for a descriptor of something else, E2BIG for a file of `most` bytes or more.
    """
    buffer = ffi.new("char[]", most)
    length = _checked(lib.rw_read_in_ipcns(namespace, path.encode(), buffer, most), f"read {path} in IPC namespace")
    return bytes(ffi.buffer(buffer, length))


def semaphore_users(namespace: int, number: int) -> list[int]:
    """The processes, by the caller's numbers, that have used each semaphore of a set last; 0 for none.

    Raises OSError.
    """
    most = 0
    while True:
        pids = ffi.new("int32_t[]", most)
        count = _checked(lib.rw_sem_pids_in_ipcns(namespace, number, pids, most), f"look at semaphores {number}")
        if count <= most:
            return [pids[at] for at in range(count)]
        most = count


def remove(namespace: int, kind: str, number: int, key: int) -> None:
    """Remove the System V object with this id in the IPC namespace of a descriptor, if it has this key.

    Raises OSError: EINVAL or EIDRM where there is none, EBUSY for shared memory that somebody has attached.
    """
    signed = key - (key >> 31 << 32)
    _checked(lib.rw_remove_in_ipcns(namespace, KINDS.index(kind), number, signed), f"remove {kind} {number}")


def _checked(result: int, what: str) -> int:
    if result < 0:
        raise OSError(-result, f"{what}: {os.strerror(-result)}")
    return result
