"""JSON as text: adds a member to an object and takes it out again; every other byte stays where it is.

Standard library only. What is not JSON, or has a key twice (programs differ in which one counts), is refused.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from journal import Refused

_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()


class Member(NamedTuple):
    """One member of an object; positions are in the text, ends behind the last character."""

    key: str
    value: Any
    key_at: int
    value_at: int
    end: int


class Object(NamedTuple):
    """An object's place: its `{`, its members, its `}`."""

    at: int
    members: list[Member]
    close: int

    def find(self, key: str) -> Member | None:
        return next((member for member in self.members if member.key == key), None)


def parse(text: str, path: Path) -> Any:
    """The data. Raises Refused."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for number, (key, _) in enumerate(pairs):
            if key in (earlier for earlier, _ in pairs[:number]):
                raise Refused(f"{path} has the key {key!r} twice; remove one of them and run again")
        return dict(pairs)

    def constant(name: str) -> Any:
        raise Refused(f"{path} is not valid JSON: {name} is no JSON number; mend it and run again")

    try:
        return json.loads(text.removeprefix("\ufeff"), object_pairs_hook=once, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise Refused(f"{path} is not valid JSON: {error}; mend it and run again") from error


def top(text: str) -> Object:
    """The outermost object of a text that `parse` has taken for one."""
    return _object(text, _skip(text, len(text) - len(text.removeprefix("\ufeff"))))


def inner(text: str, member: Member) -> Object:
    """The object that is a member's value."""
    return _object(text, member.value_at)


def _skip(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


def _object(text: str, at: int) -> Object:
    members: list[Member] = []
    next_at = _skip(text, at + 1)
    while text[next_at] != "}":
        key_at = _skip(text, next_at + 1) if text[next_at] == "," else next_at
        key, end = _DECODER.raw_decode(text, key_at)
        value_at = _skip(text, _skip(text, end) + 1)
        value, end = _DECODER.raw_decode(text, value_at)
        members.append(Member(key, value, key_at, value_at, end))
        next_at = _skip(text, end)
    return Object(at, members, next_at)


def _indent(text: str, at: int) -> str | None:
    """The white space before `at` on its line, None if something else stands there."""
    start = text.rfind("\n", 0, at) + 1
    return text[start:at] if text[start:at].strip(" \t") == "" and start > 0 else None


def add(text: str, where: Object, key: str, value: Any) -> str:
    """The text with a new last member, laid out as the file's other ones are."""
    newline = "\r\n" if "\r\n" in text else "\n"
    first = top(text).members
    unit = (_indent(text, first[0].key_at) if first else None) or "    "
    if where.members:
        last = where.members[-1]
        indent = _indent(text, last.key_at)
        if indent is None:
            return text[: last.end] + f", {json.dumps(key)}: {json.dumps(value)}" + text[last.end :]
        return text[: last.end] + f",{newline}{indent}" + _member(key, value, indent, unit, newline) + text[last.end :]
    line = text[text.rfind("\n", 0, where.at) + 1 : where.at]
    outer = line[: len(line) - len(line.lstrip(" \t"))]
    body = newline + outer + unit + _member(key, value, outer + unit, unit, newline) + newline + outer
    return text[: where.at + 1] + body + text[where.close :]


def _member(key: str, value: Any, indent: str, unit: str, newline: str) -> str:
    lines = f"{json.dumps(key)}: {json.dumps(value, indent=unit)}".split("\n")
    return (newline + indent).join(lines)


def remove(text: str, where: Object, key: str) -> str:
    """The text without a member, and without the comma that goes with it."""
    number = next(number for number, member in enumerate(where.members) if member.key == key)
    member = where.members[number]
    if number > 0:
        return text[: where.members[number - 1].end] + text[member.end :]
    if len(where.members) > 1:
        return text[: member.key_at] + text[where.members[1].key_at :]
    return text[: where.at + 1] + text[where.close :]
