"""CRIU image files: 8 bytes of magic, then records of (little-endian u32 size, protobuf message).

Only the wire format is decoded, by field number; the numbers are those of CRIU's `images/*.proto`, which
never change. The files are hostile input: every length is checked against what is there.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

Message = dict[int, list[int | bytes]]

_MAGIC = 8
_LARGEST = 16 << 20
"""Bytes of an image that is read here. Those of 65000 mappings have 4 MB, and Python takes 50 times that."""
_VARINT, _I64, _LEN, _I32 = 0, 1, 2, 5
_LONGEST = 10
"""Bytes of a number."""


class ImageError(ValueError):
    """An image file is not what CRIU writes; the text names the file and the place."""


def records(path: Path, largest: int = _LARGEST, magic: int = _MAGIC) -> Iterator[Message]:
    """The messages of one image file, in order. One of more than `largest` bytes is refused. `magic`: bytes before the
    first."""
    for data in _records(path, largest, magic):
        yield decode(data, path.name)


def raw_records(path: Path) -> Iterator[Iterator[tuple[int, bytes, int | bytes]]]:
    """The messages of one image file, each as its fields in order: number, the field as it is encoded, its value."""
    for data in raw(path):
        yield fields(data, path.name)


def raw(path: Path, magic: int = _MAGIC) -> Iterator[bytes]:
    """The messages of one image file as they are encoded."""
    return _records(path, _LARGEST, magic)


def _records(path: Path, largest: int, magic: int = _MAGIC) -> Iterator[bytes]:
    data = Mixed(path, largest, magic)
    while (found := data.record()) is not None:
        yield found


def mixed(path: Path) -> Mixed:
    """An image in which other things than messages lie between them."""
    return Mixed(path, _LARGEST, _MAGIC)


class Mixed:
    """An image file that is read from front to end."""

    def __init__(self, path: Path, largest: int, magic: int) -> None:
        size = path.stat().st_size
        if size > largest:
            raise ImageError(f"{path.name}: {size} bytes are more than any such image has")
        self._name, self._data, self._at = path.name, path.read_bytes(), magic
        if len(self._data) < magic:
            raise ImageError(f"{path.name}: {len(self._data)} bytes are too few for an image")

    def record(self) -> bytes | None:
        """The message that follows, as it is encoded; None at the end."""
        if self._at == len(self._data):
            return None
        if self._at + 4 > len(self._data):
            raise ImageError(f"{self._name}: it ends inside a record's size, at byte {self._at}")
        (length,) = struct.unpack_from("<I", self._data, self._at)
        at = self._at + 4
        if at + length > len(self._data):
            raise ImageError(f"{self._name}: a record of {length} bytes at byte {at} reaches beyond the end")
        self._at = at + length
        return self._data[at : self._at]

    def skip(self, length: int) -> None:
        if self._at + length > len(self._data):
            raise ImageError(f"{self._name}: {length} bytes at byte {self._at} reach beyond the end")
        self._at += length


def decode(data: bytes, name: str = "message") -> Message:
    """A protobuf message as field number -> values in order (integers, or bytes for anything of a length)."""
    message: Message = {}
    at, end = 0, len(data)
    while at < end:
        # Most numbers have one byte. A call for each would take half as long again, and processes have thousands of
        # mappings.
        key = data[at]
        at += 1
        if key > 0x7F:
            key, at = _varint(data, at - 1, name)
        value: int | bytes
        if key & 7 == _VARINT and at < end and data[at] <= 0x7F:
            value = data[at]
            at += 1
        else:
            value, at = _value(data, at, key, name)
        number = key >> 3
        if number in message:
            message[number].append(value)
        else:
            message[number] = [value]
    return message


def fields(data: bytes, name: str = "message") -> Iterator[tuple[int, bytes, int | bytes]]:
    """A message as its fields in order: number, the field as it is encoded, its value."""
    at = 0
    while at < len(data):
        begin = at
        key, at = _varint(data, at, name)
        value, at = _value(data, at, key, name)
        yield key >> 3, data[begin:at], value


def _value(data: bytes, at: int, key: int, name: str) -> tuple[int | bytes, int]:
    kind = key & 7
    if kind == _VARINT:
        return _varint(data, at, name)
    if kind == _LEN:
        length, at = _varint(data, at, name)
        return _take(data, at, length, name)
    if kind in (_I64, _I32):
        raw, at = _take(data, at, 8 if kind == _I64 else 4, name)
        return int.from_bytes(raw, "little"), at
    raise ImageError(f"{name}: field {key >> 3} has wire type {kind}")


def number(message: Message, field: int, default: int = 0) -> int:
    """The last value of an integer field, as protobuf reads a repeated scalar."""
    value = message.get(field, [default])[-1]
    if not isinstance(value, int):
        raise ImageError(f"field {field} is not a number")
    return value


def u32(message: Message, field: int, default: int = 0) -> int:
    """An unsigned 32-bit field. CRIU would take the low 32 bits of a larger number: such a one is refused."""
    value = number(message, field, default)
    if value >> 32:
        raise ImageError(f"field {field} has more than 32 bits")
    return value


def text(message: Message, field: int) -> str:
    value = message.get(field, [b""])[-1]
    if not isinstance(value, bytes):
        raise ImageError(f"field {field} is not a string")
    return value.decode("utf-8", "surrogateescape")


def messages(message: Message, field: int) -> Iterator[Message]:
    """The values of a field that holds messages, one at a time: decoded they take many times their size."""
    for value in message.get(field, []):
        if not isinstance(value, bytes):
            raise ImageError(f"field {field} is not a message")
        yield decode(value)


def numbers(message: Message, field: int) -> list[int]:
    """The values of a repeated integer field, packed or not."""
    found: list[int] = []
    for value in message.get(field, []):
        if isinstance(value, int):
            found.append(value)
            continue
        at = 0
        while at < len(value):
            one, at = _varint(value, at, f"field {field}")
            found.append(one)
    return found


def _varint(data: bytes, at: int, name: str) -> tuple[int, int]:
    value = shift = 0
    for byte in data[at : at + _LONGEST]:
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise ImageError(f"{name}: a number at byte {at} does not end")


def _take(data: bytes, at: int, length: int, name: str) -> tuple[bytes, int]:
    if at + length > len(data):
        raise ImageError(f"{name}: {length} bytes at byte {at} reach beyond the end")
    return data[at : at + length], at + length
