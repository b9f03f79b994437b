"""TOML: reading files with errors that name them, and writing tables.

Standard library only. The user's part of a file is never printed anew: comments and layout are the user's.
"""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

from journal import Refused
from marked import BEGIN, END, torn


def check_whole(text: str, path: Path) -> None:
    """Refused if a part of rewarm's block is there."""
    if torn(text):
        raise Refused(f"{path} has '{BEGIN[:22]}' without '{END}'; remove what is left of the block by hand")


def parse(text: str, path: Path) -> dict[str, Any]:
    """The file's data; a byte order mark at its begin is passed over, as Go's parsers do. Raises Refused."""
    try:
        return tomllib.loads(text.removeprefix("\ufeff"))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise Refused(f"{path} is not valid TOML: {error}; mend it and run again") from error


def table(data: dict[str, Any], path: Path, *keys: str) -> dict[str, Any]:
    """The table at `keys`, {} where there is none. Refused where something else is there."""
    for depth, key in enumerate(keys, 1):
        data = data.get(key, {})
        if not isinstance(data, dict):
            raise Refused(f"{path}: {'.'.join(keys[:depth])} is not a table; mend it and run again")
    return data


def strings(data: dict[str, Any], path: Path, key: str) -> list[str]:
    """The list of strings at `key`, [] where there is none. Refused where something else is there."""
    value = data.get(key, [])
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise Refused(f"{path}: {key} is not a list of strings; mend it and run again")
    return list(value)


def toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, str):
        # A JSON string is a TOML basic string, but for DEL, which TOML wants escaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")
    if isinstance(value, list):
        return "[" + ", ".join(toml_value(v) for v in value) + "]"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{toml_key(k)} = {toml_value(v)}" for k, v in value.items()) + " }"
    raise Refused(f"a runtime option has the value {value!r}, which cannot be copied")


def toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else toml_value(key)


def toml_table(path: tuple[str, ...], data: dict[str, Any]) -> list[str]:
    lines = [f"[{'.'.join(toml_key(p) for p in path)}]"]
    lines += [f"  {toml_key(k)} = {toml_value(v)}" for k, v in data.items() if not isinstance(v, dict)]
    for key, value in data.items():
        if isinstance(value, dict):
            lines += toml_table((*path, key), value)
    return lines
