"""Tables of nf_tables in a network namespace: list them, delete one. Netlink alone, so no program is needed for it.

Linux' uapi: linux/netlink.h, linux/netfilter/nfnetlink.h, linux/netfilter/nf_tables.h. Changes come in batches.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass

_NETLINK_NETFILTER = 12
_REQUEST, _ACK, _DUMP = 0x1, 0x4, 0x300
_ERROR, _DONE = 2, 3
_BATCH_BEGIN, _BATCH_END = 0x10, 0x11
_SUBSYSTEM = 10  # NFNL_SUBSYS_NFTABLES
_NEW_TABLE, _GET_TABLE, _DELETE_TABLE = (_SUBSYSTEM << 8 | number for number in (0, 1, 2))
_TABLE_NAME = 1
_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence number, port
_TIMEOUT = 10.0


@dataclass(frozen=True)
class Table:
    """`family` is NFPROTO_*: 1 inet, 2 IPv4, 10 IPv6."""

    family: int
    name: str


def tables(pid: int) -> list[Table]:
    """All tables in the network namespace of process `pid`; [] on a kernel without nf_tables. Raises OSError."""
    from rewarm_native import process

    with process.open_socket_in_netns(pid, socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER) as connection:
        connection.settimeout(_TIMEOUT)
        connection.sendall(_message(_GET_TABLE, _REQUEST | _DUMP, 0, 0, b""))
        found = []
        try:
            for kind, payload in _answers(connection):
                if kind == _NEW_TABLE:
                    found += [
                        Table(payload[0], _text(value)) for key, value in _attributes(payload) if key == _TABLE_NAME
                    ]
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOENT):
                return []  # nf_tables is neither built in nor loaded
            raise
        return found


def delete(pid: int, table: Table) -> None:
    """Delete a table with all that is in it. Raises OSError: ENOENT when it is gone already."""
    from rewarm_native import process

    name = table.name.encode() + b"\0"
    attribute = struct.pack("=HH", 4 + len(name), _TABLE_NAME) + name + b"\0" * (-len(name) % 4)
    batch = (
        _message(_BATCH_BEGIN, _REQUEST, 0, _SUBSYSTEM, b"")
        + _message(_DELETE_TABLE, _REQUEST | _ACK, table.family, 0, attribute)
        + _message(_BATCH_END, _REQUEST, 0, _SUBSYSTEM, b"")
    )
    with process.open_socket_in_netns(pid, socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER) as connection:
        connection.settimeout(_TIMEOUT)
        connection.sendall(batch)
        for _ in _answers(connection):
            continue  # the acknowledgement alone


def _message(kind: int, flags: int, family: int, resource: int, attributes: bytes) -> bytes:
    payload = struct.pack(">BBH", family, 0, resource) + attributes
    return _HEADER.pack(_HEADER.size + len(payload), kind, flags, 1, 0) + payload


def _answers(connection: socket.socket) -> Iterator[tuple[int, bytes]]:
    """Type and payload of each message, up to the end of a dump or an acknowledgement. Raises OSError."""
    while True:
        data = connection.recv(1 << 16)
        while len(data) >= _HEADER.size:
            length, kind, _, _, _ = _HEADER.unpack_from(data)
            if not _HEADER.size <= length <= len(data):
                raise OSError(errno.EBADMSG, "netlink message of a wrong length")
            payload, data = data[_HEADER.size : length], data[(length + 3) & ~3 :]
            if kind == _DONE:
                return
            if kind == _ERROR:
                (number,) = struct.unpack_from("=i", payload)
                if number:
                    raise OSError(-number, os.strerror(-number))
                return
            yield kind, payload


def _attributes(payload: bytes) -> Iterator[tuple[int, bytes]]:
    at = 4  # behind struct nfgenmsg
    while at + 4 <= len(payload):
        length, kind = struct.unpack_from("=HH", payload, at)
        if length < 4:
            return
        yield kind & 0x3FFF, payload[at + 4 : at + length]
        at += (length + 3) & ~3


def _text(value: bytes) -> str:
    return value.rstrip(b"\0").decode("utf-8", "surrogateescape")
