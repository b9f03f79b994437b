"""Writing CRIU image files: the wire format of protobuf for the few messages that rewarm writes anew."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path

from rewarm.criu import images


def varint(value: int) -> bytes:
    """A number of 0..2^64-1 as a protobuf varint."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def integer(field: int, value: int) -> bytes:
    """One integer field."""
    return varint(field << 3) + varint(value)


def nested(field: int, message: bytes) -> bytes:
    """One field of bytes, a string or a message."""
    return varint(field << 3 | 2) + varint(len(message)) + message


def write_records(path: Path, magic: bytes, messages: Iterable[bytes]) -> None:
    """Write an image anew, beside the old one, and put it into its place. Raises OSError."""
    temporary = path.with_name(path.name + ".new")
    with temporary.open("xb") as file:
        file.write(magic)
        for message in messages:
            file.write(struct.pack("<I", len(message)) + message)
    temporary.replace(path)


def magic_of(path: Path) -> bytes:
    """The first 8 bytes of an image. Raises images.ImageError."""
    with path.open("rb") as file:
        found = file.read(8)
    if len(found) != 8:
        raise images.ImageError(f"{path.name}: {len(found)} bytes are too few for an image")
    return found
