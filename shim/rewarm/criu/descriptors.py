"""Open files that take a capability: CRIU has it, and would open them for a program that has not."""

from __future__ import annotations

import socket
from collections.abc import Collection
from pathlib import Path

from rewarm.criu import images
from rewarm.errors import Unfit

_TYPE, _INET = 1, 4  # file_entry; fd_types: INETSK
_FAMILY, _KIND = 3, 4  # inet_sk_entry
_NEEDS = {10: ("a packet socket", "NET_RAW"), 15: ("a network tunnel", "NET_ADMIN"), 19: ("a BPF map", "BPF")}
"""By fd_types (images/fdinfo.proto): PACKETSK, TUNF, BPFMAP."""


def check(directory: Path, held: Collection[str]) -> None:
    """Compare files.img with the capabilities that the container's processes may have, without CAP_. Raises Unfit for a
    file that they could not have opened, images.ImageError."""
    path = directory / "files.img"
    for record in images.records(path) if path.exists() else ():
        kind = images.u32(record, _TYPE)
        if kind in _NEEDS:
            _check(*_NEEDS[kind], held)
        for entry in images.messages(record, _INET) if kind == _INET else ():
            if images.u32(entry, _FAMILY) not in (socket.AF_INET, socket.AF_INET6):
                raise Unfit("restore snapshot", "files.img", f"an inet socket has family {images.u32(entry, _FAMILY)}")
            if images.u32(entry, _KIND) not in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
                _check("a raw socket", "NET_RAW", held)


def _check(what: str, capability: str, held: Collection[str]) -> None:
    if capability not in held:
        raise Unfit("restore snapshot", "files.img", f"it has {what}, for which this container lacks CAP_{capability}")
