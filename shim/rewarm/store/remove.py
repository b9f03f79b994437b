"""Removing a snapshot: its manifest first, so that no reader finds a snapshot with packs missing for long."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from rewarm.errors import SnapshotNotFound, StoreError

from .files import open_root, store_error
from .sweep import named_packs, sweep_locks, sweep_packs
from .workspace import make_directories, sync_directory

if TYPE_CHECKING:
    from .directory import DirectoryStore, SnapshotRef


def remove(store: DirectoryStore, ref: SnapshotRef) -> int:
    """See DirectoryStore.remove."""
    os.close(open_root(store.root))
    snapshots = store.root / "v1" / "snapshots"
    directory = snapshots / ref.namespace / ref.name
    path = directory / f"{ref.id}.json"
    if not os.path.lexists(path):
        raise SnapshotNotFound("remove", str(ref), "is not in the store", "see `rewarm ls`")
    make_directories(store.root, "v1", "locks")
    with sweep_locks(store.root):
        # Before anything is removed, since an unreadable manifest makes it fail.
        named = named_packs(store.root, without=path)
        try:
            path.unlink()
        except FileNotFoundError:
            raise SnapshotNotFound("remove", str(ref), "was removed meanwhile") from None
        except OSError as error:
            raise store_error("remove", path, error) from None
        sync_directory(directory)
        _remove_empty(directory)
        _remove_empty(directory.parent)
        return sweep_packs(store, named)


def _remove_empty(directory: os.PathLike[str]) -> None:
    try:
        os.rmdir(directory)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
            raise StoreError("remove", str(directory), error.strerror or str(error)) from None
