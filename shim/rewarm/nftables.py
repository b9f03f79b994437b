"""Tables of nf_tables in a network namespace: list them, delete one. Netlink alone, so no program is needed for it.

Linux' uapi: linux/netlink.h, linux/netfilter/nfnetlink.h, linux/netfilter/nf_tables.h. Changes come in batches.
"""

from __future__ import annotations

import errno
import socket
import struct
from typing import NamedTuple

from rewarm import netlink
from rewarm.netlink import ACK, DUMP, REQUEST

_NETLINK_NETFILTER = 12
_BATCH_BEGIN, _BATCH_END = 0x10, 0x11
_SUBSYSTEM = 10  # NFNL_SUBSYS_NFTABLES
_NEW_TABLE, _GET_TABLE, _DELETE_TABLE = (_SUBSYSTEM << 8 | number for number in (0, 1, 2))
_TABLE_NAME = 1
_ATTRIBUTES = 4
"""Where they begin: behind struct nfgenmsg."""
_TIMEOUT = 10.0


class Table(NamedTuple):
    """`family` is NFPROTO_*: 1 inet, 2 IPv4, 10 IPv6."""

    family: int
    name: str


def tables(pid: int) -> list[Table]:
    """All tables in the network namespace of process `pid`; [] on a kernel without nf_tables. Raises OSError."""
    from rewarm_native import process

    with process.open_socket_in_netns(pid, socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER) as connection:
        connection.settimeout(_TIMEOUT)
        connection.sendall(_message(_GET_TABLE, REQUEST | DUMP, 0, 0, b""))
        found = []
        try:
            for kind, payload in netlink.answers(connection):
                if kind == _NEW_TABLE:
                    found += [
                        Table(payload[0], _text(value))
                        for key, value in netlink.attributes(payload, _ATTRIBUTES)
                        if key == _TABLE_NAME
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
        _message(_BATCH_BEGIN, REQUEST, 0, _SUBSYSTEM, b"")
        + _message(_DELETE_TABLE, REQUEST | ACK, table.family, 0, attribute)
        + _message(_BATCH_END, REQUEST, 0, _SUBSYSTEM, b"")
    )
    with process.open_socket_in_netns(pid, socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER) as connection:
        connection.settimeout(_TIMEOUT)
        connection.sendall(batch)
        for _ in netlink.answers(connection):
            continue  # the acknowledgement alone


def _message(kind: int, flags: int, family: int, resource: int, attributes: bytes) -> bytes:
    return netlink.message(kind, flags, struct.pack(">BBH", family, 0, resource) + attributes)


def _text(value: bytes) -> str:
    return value.rstrip(b"\0").decode("utf-8", "surrogateescape")
