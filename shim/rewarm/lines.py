"""Settings of plain lines, as most files of them are, without PyYAML: importing that takes 20 ms, and every restore
reads the settings (docs/decisions/0022).

What is read here is YAML of which there can be no two opinions: a key at the beginning of a line, and behind it a word,
a path, a number, a text in double quotes without a backslash, or a list of texts, also one in lines of its own. A file
with anything else is left to PyYAML as a whole (tests/unit/test_lines.py compares the two).
"""

from __future__ import annotations

import re
from typing import Any

_TEXT = r'"[ !#-\[\]-~]*"|/[A-Za-z0-9_./+-]*|[A-Za-z][A-Za-z0-9_./+-]*'
_NUMBER = r"0|[1-9][0-9]{0,17}"
_VALUE = rf"(?P<text>{_TEXT}|[1-9][0-9]{{0,17}}[KMGT])|(?P<number>{_NUMBER})|(?P<decimal>(?:{_NUMBER})\.[0-9]{{1,9}})"
_LIST = rf"\[(?P<list>(?:{_TEXT})(?:, *(?:{_TEXT}))*)?\]"
_COMMENT = r"(?: +#[ -~]*)?"
_KEY = rf"(?P<key>[a-z_]{{1,64}}):(?: +(?:{_VALUE}|(?P<all>{_LIST})))?{_COMMENT}"
_ITEM = rf"  - +(?P<text>{_TEXT}){_COMMENT}"
_NOTHING = r" *(?:#[ -~]*)?"
_WORDS = frozenset({"true", "false", "yes", "no", "on", "off", "y", "n", "null"})
"""YAML 1.1 makes booleans of these, and nothing."""


class _Another(Exception):
    """A file that is not of such lines."""


def read(data: bytes) -> dict[str, Any] | None:
    """Keys and values: str, int, float, or a list of str. None if there is anything else in the file."""
    try:
        return _read(data.decode("ascii"))
    except (UnicodeDecodeError, _Another):
        return None


def _read(text: str) -> dict[str, Any]:
    # Not before there is a file: compiling takes longer than reading it.
    nothing, entry, item = map(re.compile, (_NOTHING, _KEY, _ITEM))
    found: dict[str, Any] = {}
    items: list[str] | None = None
    for line in (whole.rstrip(" ") for whole in text.split("\n")):
        if nothing.fullmatch(line):
            continue
        if items is not None and (one := item.fullmatch(line)):
            items.append(_text(one["text"]))
            continue
        key = entry.fullmatch(line)
        if key is None or key["key"] in found or key["key"] in _WORDS or items == []:
            raise _Another
        items = None
        if key["all"] is not None:
            found[key["key"]] = [_text(word) for word in re.findall(_TEXT, key["list"] or "")]
        elif key["text"] is not None:
            found[key["key"]] = _text(key["text"])
        elif key["number"] is not None:
            found[key["key"]] = int(key["number"])
        elif key["decimal"] is not None:
            found[key["key"]] = float(key["decimal"])
        else:
            items = found[key["key"]] = []
    if items == []:
        raise _Another
    return found


def _text(word: str) -> str:
    if word.startswith('"'):
        return word[1:-1]
    if word.lower() in _WORDS:
        raise _Another
    return word
