"""How commands print: JSON, plain aligned columns, sizes, ages. Standard output is the result, standard error the rest.

Columns are plain text, whole and uncut, on a terminal as in a pipe. What comes out of a store or a log is printed
with its control characters escaped: a snapshot of another node must not be able to write to this terminal.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

import click

_UNITS = ("KiB", "MiB", "GiB", "TiB", "PiB")
_AGES = ((86400 * 365, "year"), (86400 * 30, "month"), (86400, "day"), (3600, "hour"), (60, "minute"), (1, "second"))


def printable(text: str) -> str:
    """`text` in one line, with everything that a terminal would act on as an escape like \\x1b."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def complain(text: str) -> None:
    """One line on standard error."""
    click.echo(f"rewarm: {printable(text)}", err=True)


def document(value: object) -> None:
    """Print JSON; ASCII, so that no locale can make it fail."""
    click.echo(json.dumps(value, indent=2))


def size(count: int) -> str:
    """Bytes for a human: "17 B", "3.0 MiB"."""
    if count < 1024:
        return f"{count} B"
    number = float(count)
    for unit in _UNITS:
        number /= 1024
        if number < 1023.95 or unit == _UNITS[-1]:
            break
    return f"{number:.1f} {unit}"


def seconds(value: float) -> str:
    """A duration for a human: "0.84 s", "2 min 5 s"."""
    if value < 60:
        return f"{value:.2f} s"
    return "{} min {} s".format(*divmod(round(value), 60))


def age(created: str, now: datetime | None = None) -> str:
    """How long ago an RFC 3339 time in UTC was; the time itself when it is no date (the 31st of February)."""
    try:
        then = datetime.fromisoformat(created[:19]).replace(tzinfo=UTC)
    except ValueError:
        return created
    past = int(((now or datetime.now(UTC)) - then).total_seconds())
    for length, name in _AGES:
        if past >= length:
            count = past // length
            return f"{count} {name}{'s' * (count > 1)} ago"
    return "just now"  # also for a node whose clock is behind that of the one that captured


def columns(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows under a header, left-aligned."""
    lines = [list(header), *([printable(cell) for cell in row] for row in rows)]
    widths = [max(len(line[index]) for line in lines) for index in range(len(header))]
    for line in lines:
        click.echo("   ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def fields(pairs: Iterable[tuple[str, str]], indent: str = "") -> None:
    """Print `name   value` lines with the values in one column."""
    pairs = list(pairs)
    width = max((len(name) for name, _ in pairs), default=0)
    for name, value in pairs:
        click.echo(f"{indent}{name.ljust(width)}   {printable(value)}".rstrip())


def numbers(values: Iterable[int]) -> str:
    """A set of numbers in the kernel's list format: "0-3,8"."""
    runs: list[list[int]] = []
    for value in sorted(set(values)):
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
