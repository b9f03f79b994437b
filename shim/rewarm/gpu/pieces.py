"""The snapshot's file `device/pieces`: which chunk goes where in which device memory.

A piece is device memory at one address of one process. Each of its windows of CHUNK bytes is a chunk
of `memory/chunks` (the first ones there are those of device memory), or zeros. The file is hostile input.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable, Sequence
from typing import NamedTuple

PIECES = "device/pieces"
LIBRARY = "device/library.so"
"""The library that serves the memory, as the source had it: the processes have it mapped."""
WINDOW = 2 << 20
MAX = 1 << 40
"""Bytes of the largest piece: the library's own have up to 1 GiB, those that programs create any size."""
ZEROS = 0xFFFFFFFF
"""In the place of a chunk's number: the window is zeros."""
TOP = 1 << 47
MAX_PIECES = 1 << 17

_HEAD = struct.Struct("<IIQQ")


class Span(NamedTuple):
    """A piece as the library names it: address and bytes."""

    address: int
    size: int


class Piece(NamedTuple):
    """`pid` is the process's number in the container, `gpu` the index in the manifest's list of GPUs, `chunks` has a
    number for each window."""

    pid: int
    gpu: int
    address: int
    size: int
    chunks: array[int]

    @property
    def span(self) -> Span:
        return Span(self.address, self.size)


class Bad(ValueError):
    """What is wrong with the file, naming the piece."""


def is_span(address: int, size: int) -> bool:
    """Whether there can be a piece like this."""
    return 0 < size <= MAX and not (address | size) % WINDOW and 0 < address <= TOP - size


def encode(pieces: Iterable[Piece]) -> bytes:
    return b"".join(_HEAD.pack(*piece[:4]) + piece.chunks.tobytes() for piece in pieces)


def decode(data: bytes, sizes: Sequence[int], gpus: int, pids: Iterable[int]) -> list[Piece]:
    """The pieces; `sizes` are the bytes of the chunks that are theirs, `gpus` how many GPUs there are, `pids` the
    processes that use CUDA. Raises Bad for all that a capture would not have written."""
    found: list[Piece] = []
    allowed = set(pids)
    at = 0
    while at < len(data):
        if len(data) - at < _HEAD.size or len(found) == MAX_PIECES:
            raise Bad(f"it goes on for {len(data) - at} bytes after piece {len(found) - 1}")
        pid, gpu, address, size = _HEAD.unpack_from(data, at)
        at += _HEAD.size
        if pid not in allowed or gpu >= gpus or not is_span(address, size):
            raise Bad(f"piece {len(found)} is of process {pid}, GPU {gpu}, {size} bytes at {address:#x}")
        if len(data) - at < size // WINDOW * 4:
            raise Bad(f"piece {len(found)} is cut off")
        chunks = array("I", data[at : at + size // WINDOW * 4])
        at += len(chunks) * chunks.itemsize
        found.append(Piece(pid, gpu, address, size, chunks))
    _check_chunks(found, sizes)
    _check_overlaps(found)
    return found


def _check_chunks(pieces: Sequence[Piece], sizes: Sequence[int]) -> None:
    """Every chunk of device memory is a whole window, and in one place."""
    seen = bytearray(len(sizes))
    for number, piece in enumerate(pieces):
        for chunk in piece.chunks:
            if chunk != ZEROS and (chunk >= len(sizes) or seen[chunk] or sizes[chunk] != WINDOW):
                raise Bad(f"piece {number} names chunk {chunk}, which is not its own")
            if chunk != ZEROS:
                seen[chunk] = 1
    if seen.count(0):
        raise Bad(f"{seen.count(0)} chunks of device memory are in no piece")


def _check_overlaps(pieces: Sequence[Piece]) -> None:
    last, end = -1, 0
    for piece in sorted(pieces, key=lambda piece: (piece.pid, piece.address)):
        if piece.pid == last and piece.address < end:
            raise Bad(f"two pieces overlap in process {piece.pid} at {piece.address:#x}")
        last, end = piece.pid, piece.address + piece.size
