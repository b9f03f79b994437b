"""The TCP ports that are in use in a network namespace, also by connections of processes that have ended: sock_diag
(linux/sock_diag.h, linux/inet_diag.h)."""

from __future__ import annotations

import os
import socket
import struct

from rewarm import netlink

_NETLINK_SOCK_DIAG = 4
_BY_FAMILY = 20
_REQUEST = struct.Struct("=BBBBI48x")  # family, protocol, extensions, padding, states, inet_diag_sockid
_PORTS = struct.Struct("=4x2s2s")  # inet_diag_msg: family, state, timer, retransmissions; the near port, the far one
_ALL_STATES = 0xFFFFFFFF
_TIMEOUT = 10.0


def ports(target: int | str | os.PathLike[str]) -> set[int]:
    """Those of both ends. `target` is a pid or the path of a namespace file. Raises OSError."""
    from rewarm_native import process

    found: set[int] = set()
    for family in (socket.AF_INET, socket.AF_INET6):
        with process.open_socket_in_netns(target, socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as connection:
            connection.settimeout(_TIMEOUT)
            question = _REQUEST.pack(family, socket.IPPROTO_TCP, 0, 0, _ALL_STATES)
            connection.sendall(netlink.message(_BY_FAMILY, netlink.REQUEST | netlink.DUMP, question))
            for kind, payload in netlink.answers(connection):
                if kind == _BY_FAMILY and len(payload) >= _PORTS.size:
                    found.update(int.from_bytes(port, "big") for port in _PORTS.unpack_from(payload))
    return found - {0}
