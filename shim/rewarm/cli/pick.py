"""From what an operator types to a snapshot: NAME, the beginning of an id, NAMESPACE/NAME, NAMESPACE/NAME@ID.

The last form is the one in which rewarm itself prints a snapshot, so that it can be pasted back.
"""

from __future__ import annotations

import click

from rewarm.errors import SnapshotNotFound, StoreError
from rewarm.store.directory import DirectoryStore, SnapshotRef
from rewarm.store.names import check_name, check_namespace


def newest(store: DirectoryStore, text: str, namespace: str | None) -> SnapshotRef:
    """The one snapshot meant; of a name that has several, the newest that is readable. Raises StoreError."""
    space, name, id = _split(text, namespace)
    if id is None:
        return store.resolve(name, space)
    return _only(text, _by_id(store, space, name, id))


def every(store: DirectoryStore, text: str, namespace: str | None) -> list[SnapshotRef]:
    """All snapshots of a name, readable or not, or the one with an id. Raises StoreError, also when there is none."""
    space, name, id = _split(text, namespace)
    if id is not None:
        return [_only(text, _by_id(store, space, name, id))]
    named = [ref for ref in store.list(space) if ref.name == name]
    if len({ref.namespace for ref in named}) == 1:
        return named
    return [store.resolve(name, space)]  # an id, or an error that says why not


def _split(text: str, namespace: str | None) -> tuple[str | None, str, str | None]:
    """(namespace, name or id, id); the last is None unless an @ is there."""
    space, slash, rest = text.rpartition("/")
    if slash:
        check_namespace(space)
        if namespace not in (None, space):
            raise click.UsageError(f"{text} is not in the namespace {namespace}.")
        namespace = space
    name, at, id = rest.partition("@")
    if at:
        check_name(name)
    return namespace, name, id if at else None


def _by_id(store: DirectoryStore, space: str | None, name: str, id: str) -> list[SnapshotRef]:
    return [ref for ref in store.list(space) if ref.name == name and ref.id.startswith(id)]


def _only(text: str, found: list[SnapshotRef]) -> SnapshotRef:
    if not found:
        raise SnapshotNotFound("find snapshot", repr(text[:80]), "there is none", "see `rewarm ls`")
    if len(found) > 1:
        raise StoreError("find snapshot", repr(text[:80]), f"there are {len(found)}", "give more of the id")
    return found[0]
