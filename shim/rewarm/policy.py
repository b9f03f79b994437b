"""What the node's settings say of the pods of a namespace: whose snapshots they may restore, and which annotations
count."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from rewarm import annotation
from rewarm.naming import is_name

ALL = "all"
"""In `ignore`: no annotation counts, so every container is the low-level runtime's."""
ANY = "*"
"""The namespace of all that are not named."""


class Policy(NamedTuple):
    """Keys are those of annotations, without the prefix."""

    share: tuple[str, ...] = ()
    """Namespaces whose snapshots may be restored as well, after those of the pod's own."""
    ignore: tuple[str, ...] = ()
    """Keys that are passed over, or ALL."""
    pinned: Mapping[str, str] = MappingProxyType({})
    """What a key is, whatever the pod says."""
    default: Mapping[str, str] = MappingProxyType({})
    """What a key is where the pod does not say it."""

    def apply(self, given: Mapping[str, str]) -> dict[str, str]:
        """The annotations that count of those that a pod gives; none if it has not opted in by `snapshot`."""
        kept = {key: value for key, value in given.items() if ALL not in self.ignore and key not in self.ignore}
        return {**self.default, **kept, **self.pinned} if "snapshot" in kept else {}

    def without_effect(self, given: Mapping[str, str]) -> list[str]:
        """Keys of those that a pod gives and that do not count."""
        if ALL in self.ignore:
            return sorted(given)
        return sorted(key for key, value in given.items() if key in self.ignore or self.pinned.get(key, value) != value)


def of(policies: Mapping[str, Policy], namespace: str) -> Policy:
    return policies.get(namespace) or policies.get(ANY) or Policy()


def read(value: object) -> Mapping[str, Policy]:
    """The setting `namespaces`. Raises ValueError that says what is wrong with it."""
    if not isinstance(value, dict):
        raise ValueError("not a mapping")
    return {_namespace(name): _policy(str(name), one) for name, one in value.items()}


def _namespace(name: object) -> str:
    if not isinstance(name, str) or not (name == ANY or is_name(name)):
        raise ValueError(f"{str(name)[:40]!r} is not a namespace")
    return name


def _policy(namespace: str, value: object) -> Policy:
    if not isinstance(value, dict):
        raise ValueError(f"{namespace} is not a mapping")
    checks: dict[str, Callable[[object], object]] = {
        "share": _share,
        "ignore": _ignored,
        "pinned": lambda found: _values(found, ("container",)),
        # A pod opts in by itself: without an annotation no program of rewarm's is asked.
        "default": lambda found: _values(found, ("container", "snapshot")),
    }
    assert checks.keys() == set(Policy._fields)
    found: dict[str, Any] = {}
    for key, one in value.items():
        if key not in checks:
            raise ValueError(f"{namespace} has the unknown key {str(key)[:40]!r}, known are {', '.join(checks)}")
        try:
            found[key] = checks[key](one)
        except ValueError as error:
            raise ValueError(f"{namespace}.{key}: {error}") from None
    return Policy(**found)


def _share(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(one, str) and is_name(one) for one in value):
        raise ValueError("not a list of namespaces")
    return tuple(value)


def _ignored(value: object) -> tuple[str, ...]:
    if value == ALL:
        return (ALL,)
    if not isinstance(value, list) or not all(one in annotation.KEYS for one in value):
        raise ValueError(f"not {ALL}, nor a list of {', '.join(annotation.KEYS)}")
    return tuple(value)


def _values(value: object, refused: tuple[str, ...]) -> dict[str, str]:
    if not isinstance(value, dict):
        raise ValueError("not a mapping")
    found = {}
    for key, one in value.items():
        if key in refused:
            raise ValueError(f"{key} is a pod's own to say")
        # YAML 1.1 makes false of an off that is not quoted.
        text = "off" if one is False else one
        wrong = annotation.problem(str(key), text) if isinstance(text, str) else ("not a text", "")
        if wrong is not None:
            raise ValueError(f"{str(key)[:40]}: {'; '.join(filter(None, wrong))}")
        found[str(key)] = str(text)
    return found
