"""IPC namespaces in CRIU's images: their sysctls and System V objects, each kind in an image of its own.

CRIU restores all of it, also into a namespace that is there and is joined (criu/ipc_ns.c). Behind the records of
message queues and semaphores lies what is in them, without a header.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rewarm.criu import encode, images, vmas
from rewarm.errors import Unfit

_DESCRIPTION = 1
_KEY, _UID, _GID, _MODE, _ID = 1, 2, 3, 6, 7  # images/ipc-desc.proto
_IN_PAGEMAPS, _HUGE = 3, 4  # ipc-shm.proto
_COUNT = {"msg": 3, "sem": 2}
"""Of a queue's messages (ipc-msg.proto), of a set's semaphores (ipc-sem.proto)."""
_MESSAGE_SIZE = 2
# images/ipc-var.proto
_VARIABLES = {"sem": 1, "msgmax": 2, "msgmnb": 3, "msgmni": 4, "auto_msgmni": 5, "shmmax": 6, "shmall": 7, "shmmni": 8}
_VARIABLES |= {"shm_rmid_forced": 9, "queues_max": 10, "msg_max": 11, "msgsize_max": 12}
_OPTIONAL = {"msg_default": 13, "msgsize_default": 14}
_SYSV = 1 << 10
"""VMA_AREA_SYSVIPC of criu/include/image.h."""
_STATUS, _SHMID = 7, 4  # images/vma.proto
_PERMISSIONS = 0o777
_SHM_STATES = 0o3000
"""Removed but attached, and locked: in shmget(2)'s flags they are what CRIU sets anyway."""
_HUGE_FLAGS = 0o4000 | 0x3F << 26
_MOST = 4096
_PAGES_ID = 1  # images/pagemap.proto: pagemap_head


class Entry(NamedTuple):
    """One System V object: `huge` are the flags for its huge pages."""

    kind: str
    key: int
    id: int
    uid: int
    gid: int
    mode: int
    huge: int


def entries(checkpoint: Path) -> list[Entry]:
    """All that CRIU would make. Raises images.ImageError, also if they are very many, and OSError."""
    found: list[Entry] = []
    for kind, path in _images(checkpoint):
        for message, _ in _records(path, kind):
            found.append(_entry(path, kind, message))
            if len(found) > _MOST:
                raise images.ImageError(f"{path.name}: it has more than {_MOST} System V objects")
    return found


def check(checkpoint: Path, may_own: Callable[[int, int], bool], *, huge: bool) -> None:
    """`may_own`: whether an object of the container's may be of this user and group; `huge`: whether it may use huge
    pages. How large they are and how many there can be the kernel says, by the namespace's sysctls (`write_variables`).

    Raises Unfit, images.ImageError.
    """
    for one in entries(checkpoint):
        where = f"System V object {one.kind} {one.id}"
        if not may_own(one.uid, one.gid):
            raise Unfit("restore snapshot", where, f"it is user {one.uid}'s and group {one.gid}'s, which none here is")
        if one.mode & ~(_PERMISSIONS | (_SHM_STATES if one.kind == "shm" else 0)) or one.id >> 31:
            raise images.ImageError(f"{where} has mode {one.mode:#o}")
        if one.huge & ~_HUGE_FLAGS or (one.huge and not huge):
            raise Unfit("restore snapshot", where, "it is of huge pages, which take CAP_IPC_LOCK here")


def attached(checkpoint: Path) -> set[int]:
    """Ids of the shared memory that processes have attached. Raises images.ImageError and OSError."""
    return {shmid for status, shmid in _mappings(checkpoint) if status & _SYSV}


def write_variables(checkpoint: Path, values: Mapping[str, Sequence[int]]) -> None:
    """Have CRIU set these sysctls, in whichever image it looks for them; what is not there it cannot set either."""
    numbers = [(field, number) for name, field in _VARIABLES.items() for number in values.get(name) or [0]]
    numbers += [(field, number) for name, field in _OPTIONAL.items() for number in values.get(name) or []]
    message = b"".join(encode.integer(field, number) for field, number in numbers)
    for path in sorted(checkpoint.glob("ipcns-var-*.img")):
        encode.write_records(path, encode.magic_of(path), [message])


def drop(checkpoint: Path, ids: Collection[int]) -> None:
    """Take shared memory with these ids out of the images, with its content. Raises images.ImageError and OSError."""
    if not ids:
        return
    for kind, path in _images(checkpoint):
        if kind == "shm":
            kept = [raw for message, raw in _records(path, kind) if _entry(path, kind, message).id not in ids]
            encode.write_records(path, encode.magic_of(path), kept)
    # Anonymous shared memory has numbers of its own, which may be the same.
    used = {shmid for status, shmid in _mappings(checkpoint) if status & vmas.ANON_SHARED}
    for number in set(ids) - used:
        path = checkpoint / f"pagemap-shmem-{number}.img"
        if path.exists():
            head = next(images.records(path), {})
            (checkpoint / f"pages-{images.u32(head, _PAGES_ID)}.img").unlink(missing_ok=True)
            path.unlink()


def _images(checkpoint: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(checkpoint.glob("ipcns-*.img")):
        found = re.fullmatch(r"ipcns-(shm|msg|sem)-\d+\.img", path.name)
        if found:
            yield found[1], path


def _mappings(checkpoint: Path) -> Iterator[tuple[int, int]]:
    """Kind, and number of the shared memory, of every mapping."""
    for path in sorted(checkpoint.glob("mm-*.img")):
        for record in images.records(path):
            for vma in images.messages(record, 14):
                yield images.u32(vma, _STATUS), images.number(vma, _SHMID)


def _entry(path: Path, kind: str, message: images.Message) -> Entry:
    descriptions = list(images.messages(message, _DESCRIPTION))
    if len(descriptions) != 1:
        raise images.ImageError(f"{path.name}: an object has {len(descriptions)} descriptions")
    (one,) = descriptions
    huge = images.u32(message, _HUGE) if kind == "shm" else 0
    key, number, uid, gid, mode = (images.u32(one, field) for field in (_KEY, _ID, _UID, _GID, _MODE))
    return Entry(kind, key, number, uid, gid, mode, huge)


def _records(path: Path, kind: str) -> Iterator[tuple[images.Message, bytes]]:
    """The objects of an image, decoded and as they are encoded."""
    data = images.mixed(path)
    while (raw := data.record()) is not None:
        message = images.decode(raw, path.name)
        if kind == "shm" and images.number(message, _IN_PAGEMAPS) != 1:
            raise images.ImageError(f"{path.name}: shared memory has its content elsewhere than in pagemaps")
        if kind == "sem":
            data.skip(_rounded(2 * images.u32(message, _COUNT[kind])))
        for _ in range(images.u32(message, _COUNT[kind]) if kind == "msg" else 0):
            inner = data.record()
            if inner is None:
                raise images.ImageError(f"{path.name}: messages are missing")
            data.skip(_rounded(images.u32(images.decode(inner, path.name), _MESSAGE_SIZE)))
        yield message, raw


def _rounded(size: int) -> int:
    return size + 7 & ~7
