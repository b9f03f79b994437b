"""CRIU images made by hand: protobuf's wire format, and the records that an image file holds."""

from __future__ import annotations

import struct


def varint(value: int) -> bytes:
    out = b""
    while value >= 0x80:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def image(*messages: bytes) -> bytes:
    return b"MAGICMAG" + b"".join(struct.pack("<I", len(m)) + m for m in messages)
