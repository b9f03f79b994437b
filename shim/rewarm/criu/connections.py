"""TCP connections between processes of one container: they survive; all others come back closed.

CRIU dumps connections by putting the source's sockets into repair mode, in which a killed CRIU leaves them, those to
the outside as well. So it is told to close all of them (`tcp-close`), and what a restore needs for a connection with
both ends in the container is written here: they are stopped, so there is nothing to it but what waits to be read, and
that can be looked at from outside. Its sequence numbers may be any (soccr/soccr.c).
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
import struct
import time
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from rewarm.criu import images
from rewarm.criu.encode import integer, write_records
from rewarm.criu.images import Message
from rewarm.criu.namespaces import INVENTORY_MAGIC
from rewarm.criu.sockets import (
    DESTINATION,
    FAR_PORT,
    FILES,
    ID,
    INET_SOCKET,
    INODE,
    NETWORK,
    PORT,
    PROTOCOL,
    SOURCE,
    STATE,
    address,
    entry_of,
    is_connection,
    is_loopback,
    plain,
    rewrite,
    words,
)
from rewarm.criu.tree import living

_MAGIC = struct.pack("<II", 0x54564319, 0x51465506)  # criu/include/magic.h: IMG_COMMON_MAGIC, TCP_STREAM_MAGIC
_ESTABLISHED, _CLOSED = 1, 7  # linux/tcp_states.h
_TCP_CLOSE = 10  # images/inventory.proto
_FILES_ID = 2  # images/core.proto: task_kobj_ids_entry
_FD_ID, _FD_TYPE = 1, 3  # images/fdinfo.proto: fdinfo_entry
_SACK, _WINDOW_SCALE = 2, 4  # linux/tcp.h: TCPI_OPT_*
_SCALE = 7
_SEGMENT = 65463
"""Bytes: what fits into a packet of the loopback device beside the headers of IPv6."""
_WINDOW = 65535
_EPHEMERAL = (32768, 61000)
_LONGEST = 1 << 20
"""Bytes that may wait to be read."""
_PATIENCE = 0.25
"""Seconds for what is acknowledged late (40 ms as a rule: TCP_DELACK_MIN), of all connections together."""
_SO_PEEK_OFF = 42  # asm-generic/socket.h
_TCP_ULP = 31  # linux/tcp.h
_SOCKET = re.compile(r"socket:\[(\d+)\]")


class _End(NamedTuple):
    """One end of a connection: its numbers in the images, and both addresses with their ports. IPv4's are so in sockets
    of IPv6, too."""

    id: int
    inode: int
    state: int
    network: int
    near: tuple[bytes, int]
    far: tuple[bytes, int]


def stream(inode: int) -> str:
    return f"tcp-stream-{inode:x}.img"


def kept(checkpoint: Path) -> bool:
    """Whether these images have connections that survive."""
    return any(checkpoint.glob("tcp-stream-*.img"))


def keep(checkpoint: Path, pids: Iterable[int]) -> list[str]:
    """Have the connections between these stopped processes survive a restore, and all others be closed sockets. Returns
    a line for each that is closed though it is one of them.

    Raises images.ImageError and OSError.
    """
    path = checkpoint / FILES
    if not path.exists():
        return []
    pairs = {end: far for end, far in _ends(path).items() if far is not None and _ESTABLISHED == end.state == far.state}
    if not pairs:
        return []
    waiting = _waiting({end.inode for end in pairs}, pids)
    notes, numbers = [], {end: int.from_bytes(os.urandom(4), "little") for end in pairs}
    for end, far in pairs.items():
        if end.inode not in waiting or far.inode not in waiting:
            if end.inode < far.inode:
                notes.append(f"the connection of ports {end.near[1]} and {end.far[1]} comes back closed: it was busy")
            continue
        data = waiting[end.inode]
        sent, received = numbers[end], numbers[far]
        # What the far end has sent and this one has not read is behind it already.
        sent, received = sent + len(waiting[far.inode]) & 0xFFFFFFFF, received + len(data) & 0xFFFFFFFF
        message = _encoded(sent, received, len(data))
        (checkpoint / stream(end.inode)).write_bytes(_MAGIC + struct.pack("<I", len(message)) + message + data)
    if kept(checkpoint):
        rewrite(path, lambda entry: {} if (checkpoint / stream(images.u32(entry, INODE))).exists() else _closed(entry))
        _without_tcp_close(checkpoint / "inventory.img")
    return notes


def settle(checkpoint: Path, here: Sequence[str], taken: Collection[int]) -> None:
    """Leave those connections in the images of which CRIU makes both ends, between addresses that the container has:
    loopback, and `here`. All others become closed sockets, whatever the images say: with one end alone the container
    would speak in the middle of a connection of others. And none has a port of `taken`.

    Raises images.ImageError and OSError.
    """
    path = checkpoint / FILES
    if not path.exists():
        raise images.ImageError(f"{FILES}: it is not there, but connections are")
    own = {socket.inet_pton(socket.AF_INET6 if ":" in one else socket.AF_INET, one) for one in here}
    opened = _opened(checkpoint)
    ends = _ends(path)
    if len({end.id for end in ends}) != len(ends):
        raise images.ImageError(f"{FILES}: two connections have one id, and CRIU takes either")
    good = {
        end.id
        for end, far in ends.items()
        if far is not None
        and _ESTABLISHED == end.state == far.state
        and {end.id, far.id} <= opened
        and all(is_loopback(at) or at in own for at in (end.near[0], end.far[0]))
        and all((checkpoint / stream(one.inode)).exists() for one in (end, far))
    }
    rewrite(path, lambda entry: {} if images.u32(entry, ID) in good else _closed(entry))
    _renumber(path, taken)


def _opened(checkpoint: Path) -> set[int]:
    """Ids of the inet sockets that living processes have open: CRIU (criu/files.c: find_file_desc) looks for a file by
    id and type, and makes no others, whatever files.img has."""
    found: set[int] = set()
    for files in {images.u32(_first(checkpoint / f"ids-{pid}.img"), _FILES_ID) for pid in living(checkpoint)}:
        path = checkpoint / f"fdinfo-{files}.img"
        for one in images.records(path) if path.exists() else ():
            if images.u32(one, _FD_TYPE) == INET_SOCKET:
                found.add(images.u32(one, _FD_ID))
    return found


def _first(path: Path) -> Message:
    """CRIU reads one record of such an image."""
    return next(images.records(path), {}) if path.exists() else {}


def _renumber(path: Path, taken: Collection[int]) -> None:
    """Give a connection another port if one of `taken` would be in its way: those of a container that ended less than a
    minute ago, in the same pod, had the same. It is the port of the end that has connected, which nobody looks for.
    """
    entries = [entry for entry in map(entry_of, images.records(path)) if entry is not None]
    tcp = [entry for entry in entries if images.u32(entry, PROTOCOL) == socket.IPPROTO_TCP]
    served = {images.u32(entry, PORT) for entry in tcp if not is_connection(entry)}
    used = {*served, *taken, *(end.near[1] for end in _ends(path))}
    changed: dict[int, int] = {}
    for end in _ends(path):
        ports = sorted({end.near[1], end.far[1]} - served)
        if ports and ports[-1] in taken and ports[-1] not in changed:
            changed[ports[-1]] = _free(used)
            used.add(changed[ports[-1]])
    if changed:
        rewrite(path, lambda entry: _renumbered(entry, changed))


def _renumbered(entry: Message, changed: dict[int, int]) -> dict[int, bytes]:
    if not is_connection(entry):
        return {}
    ports = ((field, changed.get(images.u32(entry, field))) for field in (PORT, FAR_PORT))
    return {field: integer(field, port) for field, port in ports if port is not None}


def _free(used: Collection[int]) -> int:
    """A port of those that Linux takes by itself (net.ipv4.ip_local_port_range)."""
    free = [port for port in range(*_EPHEMERAL) if port not in used]
    if not free:
        raise images.ImageError("connections of the container: there is no free port for them")
    return free[int.from_bytes(os.urandom(4), "little") % len(free)]


def _ends(path: Path) -> dict[_End, _End | None]:
    """The TCP connections of files.img, each with its other end if that is there, too."""
    found = [_end(entry) for entry in map(entry_of, images.records(path)) if entry is not None and is_connection(entry)]
    by_address = {(end.network, end.near, end.far): end for end in found}
    far_ends = {end: by_address.get((end.network, end.far, end.near)) for end in found}
    return {end: None if far == end else far for end, far in far_ends.items()}


def _end(entry: Message) -> _End:
    near = plain(address(entry, SOURCE)), images.u32(entry, PORT)
    far = plain(address(entry, DESTINATION)), images.u32(entry, FAR_PORT)
    number, inode, state, network = (images.u32(entry, field) for field in (ID, INODE, STATE, NETWORK))
    return _End(number, inode, state, network, near, far)


def _closed(entry: Message) -> dict[int, bytes]:
    """What makes a socket of it that was never connected."""
    if not is_connection(entry):
        return {}
    nowhere = {field: words(field, bytes(4 * len(images.numbers(entry, field)))) for field in (SOURCE, DESTINATION)}
    return {STATE: integer(STATE, _CLOSED), PORT: integer(PORT, 0), FAR_PORT: integer(FAR_PORT, 0), **nowhere}


def _without_tcp_close(path: Path) -> None:
    """CRIU restores with `tcp-close` what it has dumped with it, by this mark."""
    records = [
        b"".join(raw for number, raw, _ in images.fields(record, path.name) if number != _TCP_CLOSE)
        for record in images.raw(path, INVENTORY_MAGIC)
    ]
    write_records(path, path.read_bytes()[:INVENTORY_MAGIC], records)


def _waiting(inodes: set[int], pids: Iterable[int]) -> dict[int, bytes]:
    """What waits to be read at each of these sockets; without those that still have something under way."""
    found: dict[int, bytes] = {}
    until = time.monotonic() + _PATIENCE
    for pid in pids:
        for name in _names(f"/proc/{pid}/fd"):
            link = _SOCKET.fullmatch(_link(f"/proc/{pid}/fd/{name}"))
            if link is None or int(link[1]) not in inodes or int(link[1]) in found:
                continue
            data = None
            with suppress(OSError):  # it comes back closed, then
                data = _look(pid, int(name), until)
            if data is not None:
                found[int(link[1])] = data
    return found


def _look(pid: int, descriptor: int, until: float) -> bytes | None:
    import termios  # a restore does without

    from rewarm_native import process

    with socket.socket(fileno=process.get_fd(pid, descriptor)) as taken:
        # TLS of the kernel's is nothing that could be restored; and looking would move the offset of a program's own.
        if taken.getsockopt(socket.IPPROTO_TCP, _TCP_ULP, 16).rstrip(b"\0"):
            return None
        if _has_peek_offset(taken):
            return None
        while _asked(taken, termios.TIOCOUTQ):
            if time.monotonic() >= until:
                return None
            time.sleep(0.002)
        length = _asked(taken, termios.FIONREAD)
        if length > _LONGEST:
            return None
        data = taken.recv(length, socket.MSG_PEEK | socket.MSG_DONTWAIT) if length else b""
        return data if len(data) == length else None


def _has_peek_offset(taken: socket.socket) -> bool:
    try:
        return taken.getsockopt(socket.SOL_SOCKET, _SO_PEEK_OFF) >= 0
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        return False  # Linux before 6.9 has none for TCP


def _asked(taken: socket.socket, question: int) -> int:
    (answer,) = struct.unpack("=i", fcntl.ioctl(taken, question, bytes(4)))
    return int(answer)


def _names(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:  # the process has ended
        return []


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def _encoded(sent: int, received: int, waits: int) -> bytes:
    """A tcp_stream_entry (images/tcp-stream.proto) of a connection on which nothing is under way."""
    values = {
        1: waits,
        2: received,
        3: 0,
        4: sent,
        5: _SACK | _WINDOW_SCALE,
        6: _SCALE,
        7: _SEGMENT,
        8: _SCALE,
        12: 0,
        13: received,
        14: _WINDOW,
        15: _WINDOW,
        16: _WINDOW,
        17: received,
    }
    return b"".join(integer(field, value) for field, value in values.items())
