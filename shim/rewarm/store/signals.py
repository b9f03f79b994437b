"""Which processes want a signal after a restore, as a manifest has it."""

from __future__ import annotations

from typing import NamedTuple

from . import fields
from .fields import Bad, Reader

NAMES = {"HUP": 1, "USR1": 10, "USR2": 12, "WINCH": 28}
"""What programs use to be told something; no signal that means to end, stop or go on. The numbers are those of every
architecture that rewarm runs on."""
ALLOWED = frozenset({*NAMES.values(), *range(34, 65)})
"""Real-time signals are without names: the C libraries keep different numbers of them to themselves."""
MOST = 256


class Wanted(NamedTuple):
    """A process, by its number in the container, and the number of the signal that it wants."""

    pid: int
    signal: int


def read_signals(reader: Reader, key: str) -> tuple[Wanted, ...]:
    """None in documents that have no such field. Raises Bad."""
    found = tuple(_wanted(one) for one in reader.objects_or_none(key))
    if len(found) > MOST:
        raise Bad(f"field {reader.path(key)} has more than {MOST} entries")
    if len({one.pid for one in found}) != len(found):
        raise Bad(f"field {reader.path(key)} names a process twice")
    return found


def _wanted(reader: Reader) -> Wanted:
    wanted = Wanted(reader.integer("pid", fields.MAX_PID), reader.integer("signal", 64))
    reader.done()
    if not wanted.pid:
        raise Bad(f"field {reader.path('pid')} is 0, which is no process")
    if wanted.signal not in ALLOWED:
        raise Bad(f"field {reader.path('signal')} is {wanted.signal}, which no process may want")
    return wanted
