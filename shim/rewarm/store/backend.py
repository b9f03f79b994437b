"""What rewarm asks of a store: little enough that an object store can give it.

Manifests are small objects under names, packs are large immutable ones under their digest, and a range of a pack can
be read. Nothing else is needed to restore a snapshot of chunks. DirectoryStore is the one store so far.
"""

from __future__ import annotations

import builtins
from typing import TYPE_CHECKING, Protocol

from .directory import Candidates, DirectoryStore, SnapshotRef

if TYPE_CHECKING:
    from .manifest import Manifest


class Pack(Protocol):
    """An open pack. A directory's has an attribute `fd` besides; a reader that wants one asks with getattr."""

    size: int
    """Bytes of the whole pack when it was opened."""

    def read_into(self, view: memoryview, offset: int) -> int:
        """Fill `view` with the bytes from `offset`; returns how many there were, fewer only at the end.

        Many threads may call it at once. Raises StoreError.
        """

    def close(self) -> None:
        """Give it back; again does nothing."""


class Store(Protocol):
    """A store that can be read. Writing goes by a writer of the store's own."""

    def list(self, namespace: str | None = None) -> builtins.list[SnapshotRef]:
        """All snapshots of a namespace, or of every namespace. Raises StoreError."""

    def load(self, ref: SnapshotRef) -> Manifest:
        """A manifest whose digest is right. Raises SnapshotNotFound, SnapshotDamaged, StoreError."""

    def candidates(self, namespace: str, name: str) -> Candidates:
        """The snapshots of a name, newest first, unreadable ones last with their error. Raises StoreError."""

    def read_file(self, manifest: Manifest, name: str) -> bytes:
        """A whole file of a snapshot, verified. Raises SnapshotDamaged, StoreError."""

    def open_chunk_pack(self, digest: str) -> Pack:
        """A pack of chunks. Raises SnapshotDamaged if it is not there, StoreError."""


def open_store(url: str) -> DirectoryStore:
    """The store at an absolute path or a file:// URL. Touches no disk. Raises StoreError for any other URL."""
    return DirectoryStore(url)
