"""Strict reading of JSON objects: every field there, of its type, in its range, and no other field there."""

from __future__ import annotations

import json
from typing import Any, NoReturn

MAX_I64 = (1 << 63) - 1
MAX_U32 = (1 << 32) - 1
MAX_U64 = (1 << 64) - 1
MAX_PID = 1 << 22
"""PID_MAX_LIMIT of a 64-bit kernel."""
MAX_INDEX = (1 << 16) - 1
"""No kernel has more CPUs or NUMA nodes."""
MAX_TEXT = 1 << 17
"""MAX_ARG_STRLEN: the kernel takes no longer argument or environment string."""


class Bad(Exception):
    """What is wrong, naming the field; the caller knows the document and says which one it was."""


def decode(data: bytes) -> dict[str, Any]:
    """JSON bytes to an object, refusing what Python would let pass: NaN, duplicate keys, deep nesting."""
    try:
        value = json.loads(data.decode(), object_pairs_hook=_unique, parse_constant=_refuse)
    except RecursionError:
        raise Bad("is nested too deeply") from None
    except ValueError as error:  # also UnicodeDecodeError, and integers of more than 4300 digits
        raise Bad(f"is not JSON: {str(error)[:200]}") from None
    if not isinstance(value, dict):
        raise Bad("is not a JSON object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        raise Bad(f"field {next(key for key in keys if keys.count(key) > 1)[:80]} is there twice")
    return result


def _refuse(constant: str) -> NoReturn:
    raise Bad(f"holds {constant}, which is not JSON")


class Reader:
    """One JSON object and its place in the document; each field is taken once, `done` refuses what is left."""

    def __init__(self, value: dict[str, Any], place: str) -> None:
        self._left = dict(value)
        self._place = place

    def path(self, key: str) -> str:
        """The field's place in the document, as errors name it."""
        return f"{self._place}.{key}" if self._place else key

    def done(self) -> None:
        """Raise Bad if the object has a field that nobody asked for."""
        for key in self._left:
            raise Bad(f"field {self.path(key)[:120]!r} is unknown")

    def text(self, key: str, longest: int = MAX_TEXT) -> str:
        """A string of at most `longest` characters that is valid UTF-8 without NUL."""
        return _text(self._take(key), self.path(key), longest)

    def text_or(self, key: str, default: str, longest: int = MAX_TEXT) -> str:
        """The same for a field that older documents have not."""
        return self.text(key, longest) if key in self._left else default

    def integer(self, key: str, highest: int = MAX_I64) -> int:
        """An integer in 0..highest; a bool is none."""
        return _integer(self._take(key), self.path(key), highest)

    def integer_or(self, key: str, default: int, highest: int = MAX_I64) -> int:
        """The same for a field that older documents have not."""
        return self.integer(key, highest) if key in self._left else default

    def boolean(self, key: str) -> bool:
        """true or false, nothing that is only like it."""
        value = self._take(key)
        if not isinstance(value, bool):
            raise Bad(f"field {self.path(key)} must be true or false, not {_kind(value)}")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of strings."""
        path = self.path(key)
        return tuple(_text(item, f"{path}[{index}]", MAX_TEXT) for index, item in enumerate(self._list(key)))

    def texts_or_none(self, key: str) -> tuple[str, ...]:
        """The same for a field that older documents have not."""
        return self.texts(key) if key in self._left else ()

    def integers(self, key: str, highest: int = MAX_I64) -> tuple[int, ...]:
        """A list of integers in 0..highest."""
        path = self.path(key)
        return tuple(_integer(item, f"{path}[{index}]", highest) for index, item in enumerate(self._list(key)))

    def object(self, key: str) -> Reader:
        """An object, as a reader of its own."""
        return Reader(_object(self._take(key), self.path(key)), self.path(key))

    def objects(self, key: str) -> list[Reader]:
        """A list of objects, each as a reader of its own."""
        path = self.path(key)
        places = ((item, f"{path}[{index}]") for index, item in enumerate(self._list(key)))
        return [Reader(_object(item, place), place) for item, place in places]

    def objects_or_none(self, key: str) -> list[Reader]:
        """The same for a field that older documents have not."""
        return self.objects(key) if key in self._left else []

    def mapping(self, key: str) -> dict[str, str]:
        """An object whose keys are free and whose values are strings."""
        path = self.path(key)
        items = _object(self._take(key), path).items()
        return {_text(name, path, 256): _text(value, f"{path}.{name[:80]}", MAX_TEXT) for name, value in items}

    def _take(self, key: str) -> Any:
        if key not in self._left:
            raise Bad(f"field {self.path(key)} is missing")
        return self._left.pop(key)

    def _list(self, key: str) -> list[Any]:
        value = self._take(key)
        if not isinstance(value, list):
            raise Bad(f"field {self.path(key)} must be a list, not {_kind(value)}")
        return value


def _object(value: Any, path: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Bad(f"field {path} must be an object, not {_kind(value)}")
    return value


def _text(value: Any, path: str, longest: int) -> str:
    if not isinstance(value, str):
        raise Bad(f"field {path} must be a string, not {_kind(value)}")
    if len(value) > longest:
        raise Bad(f"field {path} is longer than {longest} characters")
    if "\0" in value or (not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value)):
        raise Bad(f"field {path} holds a NUL or half a surrogate pair")
    return value


def _integer(value: Any, path: str, highest: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise Bad(f"field {path} must be an integer, not {_kind(value)}")
    if not 0 <= value <= highest:
        raise Bad(f"field {path} must be in 0..{highest}")
    return value


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names = {bool: "a bool", int: "an integer", float: "a float", str: "a string", list: "a list", dict: "an object"}
    return names[type(value)]
