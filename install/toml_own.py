"""Takes rewarm's part out of a TOML file, whatever has become of it. Standard library only.

Programs that load a file and print it anew (nvidia-ctk, the GPU operator) lose comments, and rewarm's marks are some;
and people write between the marks. So a block is cut out whole only if every word of it is rewarm's. Of any other, and
where the marks are gone, the tables go that are rewarm's by their program; the rest stays.
"""

from __future__ import annotations

import copy
import re
import tomllib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from engine import PROGRAM
from journal import Refused, digest
from marked import cut
from toml_text import check_whole, parse, toml_key

Keys = tuple[str, ...]
# Where rewarm's runtime is in a file's data, as far as it is there and runs rewarm.
Own = Callable[[dict[str, Any], Path], list[Keys]]
_MAX_LINES = 200  # of one value


def strip(text: str, path: Path, blocks: Collection[str] | None, own: Own) -> str:
    """The text without rewarm's part. Refused where that cannot be told from the rest.

    `blocks` are the digests of the blocks that rewarm wrote there, None if it has nothing on record with this engine:
    then a runtime without marks is somebody else's.
    """
    check_whole(text, path)
    unmarked = blocks is not None

    def keep(block: str, inside: str) -> str:
        nonlocal unmarked
        if digest(block.encode("utf-8", "surrogateescape")) in (blocks or ()) or _is_own(inside, path, own):
            return ""
        unmarked = True
        return inside

    rest = cut(text, keep)
    if not unmarked or PROGRAM not in rest:
        return rest
    for keys in own(parse(rest, path), path):
        rest = without(rest, path, keys)
    return rest


def _is_own(inside: str, path: Path, own: Own) -> bool:
    """Whether a block holds nothing but rewarm's runtime."""
    try:
        data = parse(inside, path)
    except Refused:  # it leans on what stands above it
        return False
    for keys in own(data, path):
        data = _less(data, keys)
    return not data.keys() - {"version"}


def without(text: str, path: Path, keys: Keys) -> str:
    """The text without what is at `keys`, and without the headers of tables that are empty then. Raises Refused."""
    wanted = _less(parse(text, path), keys)
    lines = re.split(r"(?<=\n)", text)
    gone: set[int] = set()
    for start, end, table in _sections(lines):
        if table[: len(keys)] == keys:
            gone.update(range(start, _end_of_values(lines, start, end)))
        elif table == keys[: len(table)]:
            gone.update(_values(lines, start + 1, end, keys[len(table) :]))
            if table and not _has(wanted, table):
                gone.add(start)
    rest = "".join(line for number, line in enumerate(lines) if number not in gone)
    try:
        if parse(rest, path) == wanted:
            return rest
    except Refused:
        pass
    name = ".".join(map(toml_key, keys))
    raise Refused(f"{path} has rewarm's {name} in a form that cannot be taken out; remove it by hand, then run again")


def _less(data: dict[str, Any], keys: Keys) -> dict[str, Any]:
    """The data without what is at `keys`, and without tables that are empty then."""
    data = copy.deepcopy(data)
    parents = [data]
    for key in keys[:-1]:
        parents.append(parents[-1][key])
    for parent, key in zip(reversed(parents), reversed(keys), strict=True):
        del parent[key]
        if parent:
            break
    return data


def _has(data: Any, keys: Keys) -> bool:
    for key in keys:
        if not isinstance(data, dict) or key not in data:
            return False
        data = data[key]
    return True


def _sections(lines: list[str]) -> Iterator[tuple[int, int, Keys]]:
    """Each table's header and the lines below it; before the first header (at line -1) is the root table.

    A line within a longer value may look like a header: `without` looks at what has become of the data.
    """
    heads = [(-1, ())] + [(n, keys) for n, line in enumerate(lines) if (keys := _header(line)) is not None]
    ends = [start for start, _ in heads[1:]] + [len(lines)]
    for (start, keys), end in zip(heads, ends, strict=True):
        yield start, end, keys


def _header(line: str) -> Keys | None:
    return _only_key(line) if line.lstrip().startswith("[") else None


def _only_key(text: str) -> Keys | None:
    """The keys of a text that names one thing, and gives it no value of its own."""
    try:
        data: Any = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return None
    keys: list[str] = []
    while isinstance(data, dict) and len(data) == 1:
        key, data = next(iter(data.items()))
        keys.append(key)
    return tuple(keys) or None


def _end_of_values(lines: list[str], start: int, end: int) -> int:
    """Behind a section's last value: comments below it may be of what follows."""
    while end > start + 1 and (not lines[end - 1].strip() or lines[end - 1].lstrip().startswith("#")):
        end -= 1
    return end


def _values(lines: list[str], start: int, end: int, keys: Keys) -> Iterator[int]:
    """The lines that give a value to `keys`, or to what is below them, in the lines of one table."""
    number = start
    while number < end:
        name, equals, _ = lines[number].partition("=")
        found = _only_key(f"{name}= 0") if equals else None
        length = 1
        if found is not None and found[: len(keys)] == keys:
            while length < _MAX_LINES and not _is_whole("".join(lines[number : number + length])):
                length += 1
            yield from range(number, number + length)
        number += length


def _is_whole(text: str) -> bool:
    try:
        tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return False
    return True
