"""The directories of a store, and the workspace of one writer under v1/tmp."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

from rewarm.errors import StoreError

from .files import open_root, store_error
from .locks import Lock, try_lock, wait_lock
from .sweep import burial, discard, empty, sweep_packs

if TYPE_CHECKING:
    from .directory import DirectoryStore


def prepare(root: Path) -> None:
    """Make the store's directories, and the store's own if its parent exists. Raises StoreError."""
    if not os.path.lexists(root):
        if not root.parent.is_dir():
            step = "mount it or create it, or correct `store` in the settings"
            raise StoreError("create store", str(root), f"its parent {root.parent} does not exist", step)
        make_directories(root.parent, root.name)
    os.close(open_root(root))
    for parts in (("v1", "snapshots"), ("v1", "packs"), ("v1", "tmp"), ("v1", "locks", "names")):
        make_directories(root, *parts)


def make_directories(root: Path, *parts: str) -> Path:
    """`root`/parts…, made where missing with mode 0700 and on disk when this returns. Raises StoreError."""
    path = root
    for part in parts:
        parent, path = path, path / part
        try:
            path.mkdir(mode=0o700)
        except FileExistsError:
            if path.is_symlink() or not path.is_dir():
                step = "move it away and capture again"
                raise StoreError("write store", str(path), "is not a directory", step) from None
        except OSError as error:
            raise store_error("create", path, error) from None
        else:
            sync_directory(parent)
    return path


def sync_directory(path: Path) -> None:
    """Put a directory's entries on disk. Raises StoreError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise store_error("sync", path, error) from None


class Workspace:
    """A directory under v1/tmp that is its writer's as long as the lock on its file `lock` is held."""

    def __init__(self, path: Path, lock: Lock, coming_and_going: Path) -> None:
        self.path = path
        self._lock = lock
        self._coming_and_going = coming_and_going

    def close(self) -> None:
        """Delete it. Raises StoreError; what is left then is the next writer's to delete."""
        try:
            empty(self.path)
            # Without its lock file it would look like a dead writer's.
            with wait_lock(self._coming_and_going):
                discard(self.path)
        finally:
            self._lock.release()


def open_workspace(store: DirectoryStore) -> Workspace:
    """A new workspace; before that, what dead writers left is removed: their workspaces, and the packs that they
    put in place without a manifest. Raises StoreError."""
    locks = store.root / "v1" / "locks"
    tmp = store.root / "v1" / "tmp"
    with wait_lock(locks / "tmp"):
        _bury(store, tmp)
        path = tmp / secrets.token_hex(8)
        try:
            path.mkdir(mode=0o700)
        except OSError as error:
            raise store_error("create", path, error) from None
        try:
            lock = try_lock(path / "lock")
        except StoreError:
            discard(path)
            raise
    if lock is None:
        raise StoreError("lock", str(path / "lock"), "another process holds the lock of a new directory")
    return Workspace(path, lock, locks / "tmp")


def _bury(store: DirectoryStore, tmp: Path) -> None:
    try:
        with burial(tmp) as dead:
            if dead:
                with wait_lock(store.root / "v1" / "locks" / "store"):
                    sweep_packs(store)
    except StoreError:
        # Some other manifest cannot be read, or a dead file cannot be removed. That is no reason to refuse this
        # capture; the workspaces that are left make the next one try again, and `rewarm gc` reports it.
        return
