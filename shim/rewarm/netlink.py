"""Netlink messages (linux/netlink.h), as far as the few questions that rewarm has need them."""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator

REQUEST, ACK, DUMP = 0x1, 0x4, 0x300
_ERROR, _DONE = 2, 3
_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence number, port
_TYPE = 0x3FFF
"""Of an attribute's type, without its flags."""


def message(kind: int, flags: int, payload: bytes) -> bytes:
    return _HEADER.pack(_HEADER.size + len(payload), kind, flags, 1, 0) + payload


def answers(connection: socket.socket) -> Iterator[tuple[int, bytes]]:
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


def attributes(payload: bytes, at: int) -> Iterator[tuple[int, bytes]]:
    """Type and value of each attribute, from byte `at` on."""
    while at + 4 <= len(payload):
        length, kind = struct.unpack_from("=HH", payload, at)
        if length < 4:
            return
        yield kind & _TYPE, payload[at + 4 : at + length]
        at += (length + 3) & ~3
