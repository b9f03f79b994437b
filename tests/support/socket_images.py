"""Records of files.img for inet sockets, made by hand."""

from __future__ import annotations

import socket
import struct

from support.criu_images import field

LISTEN, CLOSE, ESTABLISHED = 10, 7, 1


def words(number: int, address: str) -> bytes:
    raw = socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)
    return b"".join(field(number, word) for (word,) in struct.iter_unpack("=I", raw))


def record(
    near: str,
    port: int = 80,
    *,
    far: str = "",
    far_port: int = 0,
    state: int = LISTEN,
    protocol: int = socket.IPPROTO_TCP,
    inode: int = 7,
    number: int = 23,
    network: int = 0,
) -> bytes:
    family = socket.AF_INET6 if ":" in near else socket.AF_INET
    far = far or ("::" if ":" in near else "0.0.0.0")
    entry = field(1, number) + field(2, inode) + field(3, family) + field(4, 1) + field(5, protocol) + field(6, state)
    entry += field(7, port) + field(8, far_port) + words(11, near) + words(12, far) + field(13, b"") + field(19, 1)
    entry += field(18, network) if network else b""
    return field(1, 4) + field(2, number) + field(4, entry)
