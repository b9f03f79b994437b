"""System V objects and sysctls of IPC namespaces that are there: shared memory, message queues and semaphores outlive
the processes that made them, until somebody removes them or the namespace goes."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

SHM, MSG, SEM = "shm", "msg", "sem"
SYSCTLS = {
    "sem": "kernel/sem",
    **{name: f"kernel/{name}" for name in ("msgmax", "msgmnb", "msgmni", "auto_msgmni")},
    **{name: f"kernel/{name}" for name in ("shmmax", "shmall", "shmmni", "shm_rmid_forced")},
    **{
        name: f"fs/mqueue/{name}" for name in ("queues_max", "msg_max", "msgsize_max", "msg_default", "msgsize_default")
    },
}
"""Name -> file below /proc/sys, of all that an IPC namespace has of its own (but what the next object's id is)."""
PRIVATE = 0
"""IPC_PRIVATE: a key of no object, and of many."""
_SLOT = (1 << 15) - 1
"""Of an id the part that names the place in the kernel's table, in which there can be but one (ipc/util.h; 24 bits
where the kernel was told `ipcmni_extend`)."""
_FIRST_LIST, _LARGEST_LIST = 1 << 13, 8 << 20
_LARGEST_SYSCTL = 256
_ATTACHED = 6
_USERS = {SHM: (4, 5), MSG: (5, 6), SEM: ()}
"""Columns of /proc/sysvipc/KIND: how often it is attached, and who has made or used it last."""


class Object(NamedTuple):
    """One object: `attached` is how often shared memory is in address spaces, `users` are who the kernel's table says
    has made or used it last."""

    kind: str
    key: int
    id: int
    attached: int = 0
    users: frozenset[int] = frozenset()

    def __str__(self) -> str:
        words = {SHM: "shared memory", MSG: "message queue", SEM: "semaphores"}
        return f"{words[self.kind]} {self.id}" + (f" (key {self.key:#x})" if self.key != PRIVATE else "")


def in_the_way(found: Iterable[Object], wanted: Iterable[Object]) -> list[Object]:
    """Those of `found` that have to go before the wanted ones can be made."""
    taken = {(one.kind, one.id & _SLOT) for one in wanted}
    keys = {(one.kind, one.key) for one in wanted} - {(kind, PRIVATE) for kind in (SHM, MSG, SEM)}
    return [one for one in found if (one.kind, one.id & _SLOT) in taken or (one.kind, one.key) in keys]


def _same(found: Iterable[Object], wanted: Iterable[Object]) -> list[Object]:
    """Those of `found` that may be the wanted ones: CRIU gives each its key and the whole of its id, or it fails."""
    exact = {one[:3] for one in wanted}
    return [one for one in found if one[:3] in exact]


class Namespace:
    """An IPC namespace, for as long as the descriptor is open."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        status = os.fstat(fd)
        self.name = f"{status.st_dev}:{status.st_ino}"
        """Tells it from others, while it is there."""

    def objects(self) -> list[Object]:
        """Raises OSError."""
        return [one for kind in (SHM, MSG, SEM) for one in self._listed(kind)]

    def _listed(self, kind: str) -> Iterator[Object]:
        for words in self._table(kind):
            users = frozenset(words[at] for at in _USERS[kind]) - {0}
            yield Object(kind, words[0] & 0xFFFFFFFF, words[1], words[_ATTACHED] if kind == SHM else 0, users)

    def _table(self, kind: str) -> list[list[int]]:
        """The first columns of /proc/sysvipc/KIND: others may add to it while it is read."""
        from rewarm_native import ipc

        size = _FIRST_LIST
        while True:
            try:
                lines = ipc.read(self._fd, f"/proc/sysvipc/{kind}", size).splitlines()[1:]
                return [[int(word) for word in line.split()[: _ATTACHED + 1]] for line in lines]
            except OSError as error:
                if error.errno != errno.E2BIG or size >= _LARGEST_LIST:
                    raise
                size *= 8

    def users(self, one: Object) -> frozenset[int]:
        """Those who have used a listed message queue or semaphores last, as far as the kernel tells. Raises OSError."""
        from rewarm_native import ipc

        if one.kind != SEM:
            return one.users if one.kind == MSG else frozenset()
        try:
            return frozenset(ipc.semaphore_users(self._fd, one.id)) - {0}
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EIDRM):
                raise
            return frozenset()

    def is_others(self, one: Object) -> bool:
        """Whether what is listed where a restore, whose processes are dead, makes its own is not of that: a living
        process has made or used it last. CRIU uses all semaphores that it makes. Raises OSError."""
        users = one.users if one.kind == SHM else self.users(one)
        return any(os.path.exists(f"/proc/{pid}") for pid in users) or (one.kind == SEM and not users)

    def sysctls(self) -> dict[str, list[int]]:
        """Those of SYSCTLS that the kernel has. Raises OSError."""
        from rewarm_native import ipc

        found = {}
        for name, path in SYSCTLS.items():
            try:
                text = ipc.read(self._fd, f"/proc/sys/{path}", _LARGEST_SYSCTL)
            except FileNotFoundError:
                continue
            found[name] = [int(word) for word in text.split()]
        return found

    def remove(self, one: Object) -> bool:
        """Whether it could be, since nobody has it attached. One that is gone is none. Raises OSError."""
        from rewarm_native import ipc

        try:
            ipc.remove(self._fd, one.kind, one.id, one.key)
        except OSError as error:
            if error.errno == errno.EBUSY:
                return False
            if error.errno not in (errno.EINVAL, errno.EIDRM):
                raise
        return True

    def processes(self) -> list[int]:
        """Those of this node that are in it."""
        here = [int(name) for name in os.listdir("/proc") if name.isdigit()]
        return [pid for pid in here if self._has(pid)]

    def _has(self, pid: int) -> bool:
        try:
            status = os.stat(f"/proc/{pid}/ns/ipc")
        except OSError:
            return False  # it has ended
        return f"{status.st_dev}:{status.st_ino}" == self.name


@contextmanager
def namespace(path: str) -> Iterator[Namespace]:
    """The one of a namespace file; a new one for "". Raises OSError."""
    if path:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    else:
        from rewarm_native import ipc

        fd = ipc.new()
    try:
        yield Namespace(fd)
    finally:
        os.close(fd)


def planned(path: str, objects: Iterable[Object]) -> dict[str, Any]:
    """What a record has of objects that a restore is going to make. Raises OSError."""
    wanted = [[one.kind, one.key, one.id] for one in objects]
    if not wanted:
        return {}
    with namespace(path) as there:
        return {"path": path, "namespace": there.name, "objects": wanted}


def clear(plan: Mapping[str, Any], *, made: bool = False) -> Object | None:
    """Remove what is in the way of what a record has planned, or, `made`, has been made by it: others may have made
    something in the same place meanwhile. The first that could not be removed, since it is attached. A namespace that
    is gone has taken all with it. Raises OSError."""
    if not plan:
        return None
    wanted = [Object(*one) for one in plan["objects"]]
    try:
        with namespace(str(plan["path"])) as there:
            # /proc/PID/ns/ipc may be another's by now.
            there_now = there.objects() if there.name == plan["namespace"] else []
            found = _same(there_now, wanted) if made else in_the_way(there_now, wanted)
            stay = [one for one in found if not (made and there.is_others(one)) and not there.remove(one)]
    except FileNotFoundError:
        return None
    return stay[0] if stay else None
