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
INET_SOCKET = 4  # images/fdinfo.proto: fd_types
_TYPE, _ENTRY = 1, 4  # file_entry
ID, INODE, FAMILY, PROTOCOL, STATE, PORT, FAR_PORT, SOURCE, DESTINATION, NETWORK = 1, 2, 3, 5, 6, 7, 8, 11, 12, 18
"""Fields of inet_sk_entry (images/sk-inet.proto)."""
_FAMILIES = {int(socket.AF_INET): 4, int(socket.AF_INET6): 16}
"""Bytes of an address."""
_MAPPED = bytes(10) + b"\xff\xff"


def readdress(checkpoint: Path, before: Sequence[str], here: Sequence[str]) -> None:
    """Bind what was bound to the source's address to the one of its kind that the container has. `before` are the
    addresses of the network namespace of the source, `here` those of the one that the container gets, both without
    loopback and link-local ones. Ends of connections whose address cannot be told stay as they are (connections.py).

    Raises Unfit where the source or the container has not just one of that kind: a guess could open a port to others
    than before. images.ImageError; OSError.
    """
    path = checkpoint / FILES
    if not path.exists():
        return
    old, new = [_kinds(addresses) for addresses in (before, here)]
    moved: dict[bytes, bytes] = {}
    for entry in filter(None, map(entry_of, images.records(path))):
        own = plain(address(entry, SOURCE))
        if not images.u32(entry, PORT) or not _is_of_a_pod(own) or own in new.get(len(own), ()):
            continue
        was, now = old.get(len(own), []), new.get(len(own), [])
        if was == [own] and len(now) == 1:
            moved[own] = now[0]
        elif not is_connection(entry):
            raise _unknown(own, was, now)
    if moved:
        rewrite(path, lambda entry: _replacements(entry, moved))


def _kinds(addresses: Sequence[str]) -> dict[int, list[bytes]]:
    """By their length in bytes: of IPv4, and of IPv6."""
    found: dict[int, list[bytes]] = {}
    for one in addresses:
        raw = socket.inet_pton(socket.AF_INET6 if ":" in one else socket.AF_INET, one)
        found.setdefault(len(raw), []).append(raw)
    return found


def _unknown(own: bytes, was: list[bytes], now: list[bytes]) -> Unfit:
    family, kind = (socket.AF_INET, "IPv4") if len(own) == 4 else (socket.AF_INET6, "IPv6")
    counts = f"the source had {len(was) or 'no'} {kind} address{'es' * (len(was) > 1)}, this container has"
    return Unfit(
        "restore snapshot",
        f"sockets bound to {socket.inet_ntop(family, own)}",
        f"{counts} {len(now) or 'none'}, and they have to have one each to tell which becomes which",
        "have the program listen on any address, or on loopback",
    )


def rewrite(path: Path, change: Callable[[Message], dict[int, bytes]]) -> None:
    """Write files.img anew with the fields of its inet sockets that `change` gives, encoded, by number."""
    records = [b"".join(_changed(record, change)) for record in images.raw_records(path)]
    write_records(path, magic_of(path), records)


def _changed(
    record: Iterable[tuple[int, bytes, int | bytes]], change: Callable[[Message], dict[int, bytes]]
) -> Iterator[bytes]:
    fields = list(record)
    is_socket = (_TYPE, INET_SOCKET) in ((number, value) for number, _, value in fields)
    for number, raw, value in fields:
        new = change(images.decode(value, FILES)) if is_socket and number == _ENTRY and isinstance(value, bytes) else {}
        if new and isinstance(value, bytes):
            kept = b"".join(raw for number, raw, _ in images.fields(value, FILES) if number not in new)
            raw = nested(_ENTRY, kept + b"".join(new.values()))
        yield raw


def entry_of(record: Message) -> Message | None:
    """The socket of a record of files.img, if it is one."""
    if images.u32(record, _TYPE) != INET_SOCKET:
        return None
    entries = list(images.messages(record, _ENTRY))
    if len(entries) > 1:
        raise images.ImageError(f"{FILES}: a socket is there {len(entries)} times, which protobuf would merge")
    return entries[0] if entries else None


def is_connection(entry: Message) -> bool:
    """What CRIU takes for a TCP connection (criu/sk-inet.c: tcp_connection)."""
    return images.u32(entry, PROTOCOL) == socket.IPPROTO_TCP and images.u32(entry, FAR_PORT) != 0


def address(entry: Message, field: int) -> bytes:
    """As in sockaddr_in and sockaddr_in6, b"" if it is none."""
    length = _FAMILIES.get(images.u32(entry, FAMILY), 0)
    words = [word & 0xFFFFFFFF for word in images.numbers(entry, field)]
    return struct.pack(f"={len(words)}I", *words)[:length]


def plain(address: bytes) -> bytes:
    """IPv4 where IPv6 stands for it (RFC 4291, 2.5.5.2)."""
    return address.removeprefix(_MAPPED) if len(address) == 16 else address


def is_loopback(address: bytes) -> bool:
    return address[:1] == b"\x7f" if len(address) == 4 else address == bytes(15) + b"\x01"


def _is_of_a_pod(address: bytes) -> bool:
    """Whether it is one that `addresses` would tell: not any, nor loopback, multicast or of one link."""
    if len(address) == 4:
        return any(address) and address[0] != 127 and address[0] < 224 and address[:2] != b"\xa9\xfe"
    if len(address) == 16:
        link_local = address[0] == 0xFE and address[1] & 0xC0 == 0x80
        return any(address[:15]) and address[0] != 0xFF and not link_local
    return False


def _replacements(entry: Message, moved: dict[bytes, bytes]) -> dict[int, bytes]:
    """It may be connected to another of the container's own sockets: so the destination's, too."""
    found = {}
    for field in (SOURCE, DESTINATION):
        old = address(entry, field)
        if new := moved.get(plain(old)):
            found[field] = words(field, _MAPPED + new if len(new) < len(old) else new)
    return found


def words(field: int, value: bytes) -> bytes:
    """An address, encoded."""
    return b"".join(integer(field, word) for (word,) in struct.iter_unpack("=I", value))
