"""The addresses of a network namespace, as the world sees them: rtnetlink (linux/rtnetlink.h, linux/if_addr.h)."""

from __future__ import annotations

import os
import socket
import struct

from rewarm import netlink

_NETLINK_ROUTE = 0
_NEW_ADDRESS, _GET_ADDRESS = 20, 22
_IFADDRMSG = struct.Struct("=BBBBI")  # family, prefix length, flags, scope, index
_ADDRESS, _LOCAL, _FLAGS = 1, 2, 8
_UNUSABLE = 0x08 | 0x20
"""IFA_F_DADFAILED, IFA_F_DEPRECATED."""
_UNIVERSE = 0
"""RT_SCOPE_UNIVERSE: neither of the loopback nor of one link only."""
_TIMEOUT = 10.0


def addresses(target: int | str | os.PathLike[str]) -> list[str]:
    """Those of IPv4 first, then of IPv6. `target` is a pid or the path of a namespace file. Raises OSError."""
    from rewarm_native import process

    found: list[tuple[int, str]] = []
    with process.open_socket_in_netns(target, socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_ROUTE) as connection:
        connection.settimeout(_TIMEOUT)
        question = _IFADDRMSG.pack(socket.AF_UNSPEC, 0, 0, 0, 0)
        connection.sendall(netlink.message(_GET_ADDRESS, netlink.REQUEST | netlink.DUMP, question))
        for kind, payload in netlink.answers(connection):
            if kind != _NEW_ADDRESS or len(payload) < _IFADDRMSG.size:
                continue
            family, _, flags, scope, _ = _IFADDRMSG.unpack_from(payload)
            values = dict(netlink.attributes(payload, _IFADDRMSG.size))
            # On a point-to-point link the other end's is the address.
            value = values.get(_LOCAL, values.get(_ADDRESS, b""))
            if len(values.get(_FLAGS, b"")) == 4:
                (flags,) = struct.unpack("=I", values[_FLAGS])
            if flags & _UNUSABLE:
                continue
            if scope == _UNIVERSE and len(value) == {socket.AF_INET: 4, socket.AF_INET6: 16}.get(family, -1):
                found.append((family, socket.inet_ntop(family, value)))
    return list(dict.fromkeys(address for _, address in sorted(found, key=lambda one: one[0])))
