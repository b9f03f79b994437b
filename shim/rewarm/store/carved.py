"""What a manifest says of carved memory as a whole; where each chunk goes stands in `memory/places`."""

from __future__ import annotations

from typing import NamedTuple

from . import fields
from .fields import Bad, Reader

_PAGE = 4096


class HugeMapping(NamedTuple):
    """Mapping [start, end) of process `pid` may have huge pages, which take `extra` bytes more than small ones."""

    pid: int
    start: int
    end: int
    extra: int


class Memory(NamedTuple):
    """Bytes that are filled from chunks, bytes of zeros that are nowhere, bytes that stayed in CRIU's images."""

    filled: int = 0
    zeros: int = 0
    left: int = 0
    huge: tuple[HugeMapping, ...] = ()


def read_memory(reader: Reader) -> Memory:
    """Raises Bad."""
    memory = Memory(
        filled=reader.integer("filled"),
        zeros=reader.integer("zeros"),
        left=reader.integer("left"),
        huge=tuple(_mapping(mapping) for mapping in reader.objects("huge")),
    )
    reader.done()
    return memory


def _mapping(reader: Reader) -> HugeMapping:
    mapping = HugeMapping(
        pid=reader.integer("pid", fields.MAX_PID),
        start=reader.integer("start"),
        end=reader.integer("end"),
        extra=reader.integer("extra"),
    )
    reader.done()
    if mapping.start % _PAGE or mapping.end % _PAGE or mapping.start >= mapping.end:
        raise Bad(f"field {reader.path('end')} must be above start, both at page boundaries")
    return mapping
