"""Whether an engine would still be told of a program that is about to be removed. Standard library only."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from engine import PROGRAM
from journal import Journal, Refused, read_bytes

# Where an engine looks for a name without a path.
_PATH = f"{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def check(journal: Journal, files: Iterable[Path], parse: Callable[[str, Path], Any], binary: str) -> None:
    """Raises Refused if one of the files that the engine reads would name the program once rewarm's parts are out."""
    for path in dict.fromkeys((*map(Path, journal.entries), *files)):
        text = (_without_ours(journal, path) or b"").decode("utf-8", "surrogateescape")
        if PROGRAM not in text:
            continue
        for keys in _places(parse(text, path), binary):
            raise Refused(
                f"{path} names {binary}, which would be gone, in {'.'.join(keys)}; "
                "install.sh has no record of writing that: take it out there, then run again"
            )


def _without_ours(journal: Journal, path: Path) -> bytes | None:
    if str(path) in journal.entries:
        return journal.left(path, read_bytes(path))
    try:
        return read_bytes(path)
    except Refused:  # no engine makes anything of it either
        return None


def _places(value: Any, binary: str, keys: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _places(inner, binary, (*keys, key))
    elif isinstance(value, list):
        for inner in value:
            yield from _places(inner, binary, keys)
    elif isinstance(value, str) and _is_same(value, binary):
        yield keys


def _is_same(value: str, binary: str) -> bool:
    """The program, or the link to it that install.sh puts where it is found without a path; both go."""
    if os.path.basename(value) != PROGRAM:
        return False
    found = value if "/" in value else shutil.which(value, path=_PATH)
    return found is not None and os.path.realpath(found) == os.path.realpath(binary)
