"""Sockets that are bound to an address of the source's: CRIU binds them to what is in the images (criu/sk-inet.c:
inet_bind), and a new pod has another.

IPv4's bind(2) fails then. IPv6's does not, since CRIU sets IP_FREEBIND: such a socket would never hear anything.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from rewarm.criu import images
from rewarm.criu.encode import integer, magic_of, nested, write_records
from rewarm.criu.images import Message
from rewarm.errors import Unfit

FILES = "files.img"
_INET_SOCKET = 4  # images/fdinfo.proto: fd_types
_TYPE, _ENTRY = 1, 4  # file_entry
INODE, FAMILY, PROTOCOL, STATE, PORT, FAR_PORT, SOURCE, DESTINATION = 2, 3, 5, 6, 7, 8, 11, 12
"""Fields of inet_sk_entry (images/sk-inet.proto)."""
_FAMILIES = {int(socket.AF_INET): 4, int(socket.AF_INET6): 16}
"""Bytes of an address."""
_MAPPED = bytes(10) + b"\xff\xff"


def readdress(checkpoint: Path, addresses: Sequence[str], *, connections: bool) -> None:
    """Bind what was bound to an address that is not there any more to the one of its kind that is. `addresses` are
    those of the network namespace that the container gets, without loopback and link-local ones. `connections`: whether
    TCP connections are more than closed sockets, which are bound to nothing.

    Raises Unfit where there is none of that kind, or several: a guess could open a port to others than before.
    images.ImageError; OSError.
    """
    path = checkpoint / FILES
    if not path.exists():
        return
    here = [socket.inet_pton(socket.AF_INET6 if ":" in one else socket.AF_INET, one) for one in addresses]
    moved: dict[bytes, bytes] = {}
    for entry in filter(None, map(entry_of, images.records(path))):
        old = _plain(address(entry, SOURCE))
        bound = images.number(entry, PORT) and (connections or not is_connection(entry))
        if bound and _is_of_a_pod(old) and old not in here:
            moved[old] = _only(old, [one for one in here if len(one) == len(old)])
    if moved:
        rewrite(path, lambda entry: _replacements(entry, moved))


def rewrite(path: Path, change: Callable[[Message], dict[int, bytes]]) -> None:
    """Write files.img anew with the fields of its inet sockets that `change` gives, encoded, by number."""
    records = [b"".join(_changed(record, change)) for record in images.raw_records(path)]
    write_records(path, magic_of(path), records)


def _changed(
    record: Iterable[tuple[int, bytes, int | bytes]], change: Callable[[Message], dict[int, bytes]]
) -> Iterator[bytes]:
    fields = list(record)
    is_socket = (_TYPE, _INET_SOCKET) in ((number, value) for number, _, value in fields)
    for number, raw, value in fields:
        new = change(images.decode(value, FILES)) if is_socket and number == _ENTRY and isinstance(value, bytes) else {}
        if new and isinstance(value, bytes):
            kept = b"".join(raw for number, raw, _ in images.fields(value, FILES) if number not in new)
            raw = nested(_ENTRY, kept + b"".join(new.values()))
        yield raw


def entry_of(record: Message) -> Message | None:
    """The socket of a record of files.img, if it is one."""
    if images.number(record, _TYPE) != _INET_SOCKET:
        return None
    entries = list(images.messages(record, _ENTRY))
    if len(entries) > 1:
        raise images.ImageError(f"{FILES}: a socket is there {len(entries)} times, which protobuf would merge")
    return entries[0] if entries else None


def is_connection(entry: Message) -> bool:
    """What CRIU takes for a TCP connection (criu/sk-inet.c: tcp_connection)."""
    return images.number(entry, PROTOCOL) == socket.IPPROTO_TCP and images.number(entry, FAR_PORT) != 0


def address(entry: Message, field: int) -> bytes:
    """As in sockaddr_in and sockaddr_in6, b"" if it is none."""
    length = _FAMILIES.get(images.number(entry, FAMILY), 0)
    words = [word & 0xFFFFFFFF for word in images.numbers(entry, field)]
    return struct.pack(f"={len(words)}I", *words)[:length]


def _plain(address: bytes) -> bytes:
    """IPv4 where IPv6 stands for it (RFC 4291, 2.5.5.2)."""
    return address.removeprefix(_MAPPED) if len(address) == 16 else address


def _is_of_a_pod(address: bytes) -> bool:
    """Whether it is one that `addresses` would tell: not any, nor loopback, multicast or of one link."""
    if len(address) == 4:
        return any(address) and address[0] != 127 and address[0] < 224 and address[:2] != b"\xa9\xfe"
    if len(address) == 16:
        link_local = address[0] == 0xFE and address[1] & 0xC0 == 0x80
        return any(address[:15]) and address[0] != 0xFF and not link_local
    return False


def _only(address: bytes, found: list[bytes]) -> bytes:
    if len(found) == 1:
        return found[0]
    family = socket.AF_INET if len(address) == 4 else socket.AF_INET6
    text = socket.inet_ntop(family, address)
    kind = "IPv4" if len(address) == 4 else "IPv6"
    raise Unfit(
        "restore snapshot",
        f"sockets bound to {text}",
        f"this container has {len(found) or 'no'} {kind} address{'es, which do not tell which' if found else ''}",
        "have the program listen on any address, or on loopback",
    )


def _replacements(entry: Message, moved: dict[bytes, bytes]) -> dict[int, bytes]:
    """It may be connected to another of the container's own sockets: so the destination's, too."""
    found = {}
    for field in (SOURCE, DESTINATION):
        old = address(entry, field)
        if new := moved.get(_plain(old)):
            found[field] = words(field, _MAPPED + new if len(new) < len(old) else new)
    return found


def words(field: int, value: bytes) -> bytes:
    """An address, encoded."""
    return b"".join(integer(field, word) for (word,) in struct.iter_unpack("=I", value))
