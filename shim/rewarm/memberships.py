"""Multicast groups that a container's sockets have joined: CRIU keeps none of them, and nothing tells the program.

The kernel tells them by network namespace, which the containers of a pod share, and not by socket.
"""

from __future__ import annotations

import ipaddress
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from rewarm.criu import images, sockets

_LARGEST = 1 << 20
_NAMED = 4
_KIND, _DATAGRAM, _RAW = 4, 2, 3
"""Of inet_sk_entry (images/sk-inet.proto): TCP has no memberships."""
_KERNELS_OWN = frozenset("224.0.0.1 ff01::1 ff02::1 ff01::2 ff02::2 ff05::2 224.0.0.106 ff02::6a".split())  # noqa: SIM905
"""Which it joins by itself: all nodes, all routers where it forwards, and all snoopers on a bridge."""
_SOLICITED = ipaddress.IPv6Network("ff02::1:ff00:0/104")


def notes(pid: int, checkpoint: Path) -> list[str]:
    """A line if the network namespace of process `pid` has such groups, and the container's images sockets that may
    have joined them. None where that cannot be told."""
    with suppress(images.ImageError, OSError):
        if _may_have_joined(checkpoint) and (found := groups(pid)):
            more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
            return [
                f"multicast groups do not come back: {', '.join(found[:_NAMED])}{more} of its network namespace "
                "have to be joined again after a restore (see on_restore)"
            ]
    return []


def groups(pid: int) -> list[str]:
    """`GROUP on DEVICE` of all that the kernel has not joined by itself, IPv4 first. Raises OSError."""
    found = [*_igmp(_read(f"/proc/{pid}/net/igmp")), *_igmp6(_read(f"/proc/{pid}/net/igmp6"))]
    return [
        f"{group} on {device}"
        for group, device in found
        if str(group) not in _KERNELS_OWN and (group.version == 4 or group not in _SOLICITED)
    ]


def _read(path: str) -> list[str]:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read(_LARGEST).splitlines()
    except FileNotFoundError:
        return []  # a kernel without it


def _igmp(lines: list[str]) -> Iterator[tuple[ipaddress.IPv4Address, str]]:
    """A line for each device, and an indented one for each of its groups: its 32 bits as this machine has them."""
    device = ""
    for line in lines[1:]:
        words = line.split()
        if not line[:1].isspace() and len(words) > 1:
            device = words[1].rstrip(":")
        elif words:
            yield ipaddress.IPv4Address(int(words[0], 16).to_bytes(4, sys.byteorder)), device


def _igmp6(lines: list[str]) -> Iterator[tuple[ipaddress.IPv6Address, str]]:
    for words in map(str.split, lines):
        if len(words) > 2:
            yield ipaddress.IPv6Address(bytes.fromhex(words[2])), words[1]


def _may_have_joined(checkpoint: Path) -> bool:
    path = checkpoint / sockets.FILES
    entries = map(sockets.entry_of, images.records(path)) if path.exists() else iter(())
    return any(entry is not None and images.u32(entry, _KIND) in (_DATAGRAM, _RAW) for entry in entries)
