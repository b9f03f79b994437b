"""Deleting what no snapshot needs: packs that no manifest names, and what dead writers left.

Both run under the exclusive lock of the store, so that no capture is between putting its packs in place and
its manifest.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from .files import NotRegular, open_directory, open_plain, read_up_to, store_error
from .locks import Lock, try_lock, wait_lock
from .manifest import MAX_BYTES, is_digest

if TYPE_CHECKING:
    from .directory import DirectoryStore

REFS = "refs"
"""The file of a workspace that names the packs of others that its capture shares."""
MAX_REFS = 1 << 30
_HEX = re.compile(rb"[0-9a-f]{64}")


@contextmanager
def sweep_locks(root: Path) -> Iterator[None]:
    """What a sweep needs, in the one order in which they may be taken: workspaces neither come nor go, and nothing is
    published. Raises StoreError."""
    locks = root / "v1" / "locks"
    with wait_lock(locks / "tmp"), wait_lock(locks / "store"):
        yield


def sweep_packs(store: DirectoryStore, named: set[bytes] | None = None) -> int:
    """Delete every pack that is not in `named` (default: what the manifests name) nor in a live capture's `refs`;
    returns the bytes freed.

    Needs `sweep_locks`. Raises StoreError, and then has deleted nothing, if some manifest or `refs` cannot be read.
    """
    keep = named_packs(store.root) if named is None else named
    unneeded = list(unneeded_packs(store.root, keep | shared_packs(store.root)))
    return sum(unlink_pack(path) or 0 for path in unneeded)


def unneeded_packs(root: Path, keep: set[bytes]) -> Iterator[Path]:
    """The packs whose digest is not in `keep`. Raises StoreError."""
    packs = ("v1", "packs")
    for prefix in _names(root, packs):
        for pack in _names(root, (*packs, prefix)):
            if is_digest(pack) and pack.startswith(prefix) and pack.encode() not in keep:
                yield root.joinpath(*packs, prefix, pack)


def shared_packs(root: Path) -> set[bytes]:
    """The packs that live captures share with other snapshots: see known.py. Needs `sweep_locks`.

    A dead one's do not count: a workspace whose lock can be taken. Raises StoreError.
    """
    shared: set[bytes] = set()
    tmp = root / "v1" / "tmp"
    if not tmp.is_dir():
        return shared  # a store that was never written, or copied without what is temporary
    for workspace in _children(tmp):
        path = workspace / REFS
        if workspace.is_symlink() or not os.path.lexists(path) or not os.path.lexists(workspace / "lock"):
            continue
        lock = try_lock(workspace / "lock")
        if lock is None:
            shared.update(_digests(path, MAX_REFS))
        else:
            lock.release()
    return shared


def named_packs(root: Path, without: Path | None = None) -> set[bytes]:
    """Every digest in every file below v1/snapshots, except the manifest `without`. Raises StoreError.

    Whatever lies there counts, and is searched instead of parsed: a damaged manifest, one of a newer version or one
    that somebody renamed keeps its packs. Links are not followed, as readers do not follow them either.
    """
    named: set[bytes] = set()
    top = root / "v1" / "snapshots"
    for directory, _, names in os.walk(top, onerror=_walk_error):
        for name in names:
            path = Path(directory, name)
            if path != without:
                named.update(_digests(path))
    return named


def _digests(path: Path, limit: int = MAX_BYTES) -> list[bytes]:
    try:
        fd = open_plain(path)
    except (NotRegular, FileNotFoundError):
        return []  # no reader takes it for a manifest, or it was removed by a hand that takes no locks
    except OSError as error:
        raise store_error("read", path, error) from None
    try:
        return _HEX.findall(read_up_to(fd, limit))
    except OSError as error:
        raise store_error("read", path, error) from None
    finally:
        os.close(fd)


def _walk_error(error: OSError) -> None:
    if error.errno != errno.ENOENT:
        raise store_error("list", error.filename or "v1/snapshots", error) from None


def _names(root: Path, parts: tuple[str, ...]) -> list[str]:
    try:
        fd = open_directory(root, parts)
    except (FileNotFoundError, NotADirectoryError):
        return []  # no pack was written yet, or the entry is no directory of ours
    except OSError as error:
        raise store_error("list", root.joinpath(*parts), error) from None
    try:
        return os.listdir(fd)
    finally:
        os.close(fd)


def unlink_pack(path: Path) -> int | None:
    """Delete one; returns its bytes, or None if it was gone or is a directory. Raises StoreError."""
    try:
        size = path.lstat().st_size
        path.unlink()
    except (FileNotFoundError, IsADirectoryError):
        return None  # gone already, or a directory that no writer of ours made
    except OSError as error:
        raise store_error("remove pack", path, error) from None
    return size


def dead_workspaces(tmp: Path) -> Iterator[tuple[Path, Lock | None]]:
    """The entries of v1/tmp whose writer is dead, each with its lock taken. Raises StoreError.

    Needs the lock v1/locks/tmp, under which workspaces are made and removed: one without a lock file is then not
    one that is just coming or going.
    """
    for entry in _children(tmp):
        if entry.is_symlink() or not entry.is_dir() or not os.path.lexists(entry / "lock"):
            yield entry, None
            continue
        lock = try_lock(entry / "lock")
        if lock is not None:
            yield entry, lock


@contextmanager
def burial(tmp: Path) -> Iterator[list[Path]]:
    """Empty the dead workspaces, which are yielded, and at the end of the `with` delete them. Raises StoreError.

    First the bytes, which a full disk needs; then, in the `with`, the packs that they had put in place; the
    workspaces themselves, which tell the next writer to do this again if this one is killed, last. Needs the lock
    v1/locks/tmp.
    """
    dead: list[tuple[Path, Lock | None]] = []
    try:
        for entry in dead_workspaces(tmp):
            dead.append(entry)
            empty(entry[0])
        yield [path for path, _ in dead]
        for path, _ in dead:
            discard(path)
    finally:
        for _, lock in dead:
            if lock is not None:
                lock.release()


def empty(workspace: Path) -> None:
    """Delete what a workspace holds but its lock file: that stays until the last moment. Raises StoreError."""
    if workspace.is_symlink() or not workspace.is_dir():
        discard(workspace)
        return
    for entry in _children(workspace):
        if entry.name != "lock":
            discard(entry)


def _children(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir())
    except OSError as error:
        raise store_error("list", directory, error) from None


def discard(path: Path) -> None:
    """Delete a file or a tree under v1/tmp. Raises StoreError."""
    try:
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)
        else:
            shutil.rmtree(path)
    except OSError as error:
        raise store_error("remove", path, error) from None
