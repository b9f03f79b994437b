"""Removing what no snapshot needs, at any time: captures that run meanwhile keep what they use.

A capture removes the same before it begins, if it finds that another died. This does it without one, also when
nobody died, and says what it cannot do.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .files import open_root, store_error
from .sweep import burial, dead_workspaces, named_packs, shared_packs, sweep_locks, unlink_pack, unneeded_packs
from .workspace import make_directories, sync_directory

if TYPE_CHECKING:
    from .directory import DirectoryStore

_TURN, _LEISURE = 5.0, 0.1
"""Seconds in which packs are deleted at a time, and those after which captures have had their turn."""

Progress = Callable[[int], None]


class GcStats(NamedTuple):
    """What was removed: bytes of packs and of workspaces, packs, and workspaces of dead captures."""

    freed_bytes: int
    packs: int
    workspaces: int


def collect(store: DirectoryStore, progress: Progress | None = None, *, dry_run: bool = False) -> GcStats:
    """See DirectoryStore.gc. If some manifest cannot be read no pack is deleted."""
    os.close(open_root(store.root))
    if not os.path.lexists(store.root / "v1"):
        return GcStats(0, 0, 0)  # no store yet, or the wrong directory: nothing is made there
    report = progress or (lambda count: None)
    make_directories(store.root, "v1", "locks")
    tmp = store.root / "v1" / "tmp"
    bytes_left: list[int] = []
    with sweep_locks(store.root):
        if tmp.is_dir():
            bytes_left = _left_bytes(tmp)
        if bytes_left and not dry_run:
            with burial(tmp):
                report(sum(bytes_left))
                freed, packs, more = _sweep(store, report, dry_run)
            sync_directory(tmp)
        else:
            freed, packs, more = _sweep(store, report, dry_run)
    while more:
        time.sleep(_LEISURE)
        with sweep_locks(store.root):
            size, count, more = _sweep(store, report, dry_run)
        freed, packs = freed + size, packs + count
    return GcStats(freed + sum(bytes_left), packs, len(bytes_left))


def _sweep(store: DirectoryStore, report: Progress, dry_run: bool) -> tuple[int, int, bool]:
    """Bytes and number of the packs that nothing needs; deletes them, unless `dry_run`. At the end whether there are
    more: captures wait for the locks."""
    keep = named_packs(store.root) | shared_packs(store.root)
    freed = packs = 0
    end = time.monotonic() + _TURN
    for path in list(unneeded_packs(store.root, keep)):
        if not dry_run and packs and time.monotonic() > end:
            return freed, packs, True
        size = _size(path) if dry_run else unlink_pack(path)
        if size is not None:
            freed, packs = freed + size, packs + 1
            report(size)
    return freed, packs, False


def _left_bytes(tmp: Path) -> list[int]:
    """The bytes that each dead workspace has left. A pack's link to a file elsewhere frees nothing and counts."""
    sizes = []
    for path, lock in dead_workspaces(tmp):
        try:
            sizes.append(sum(_size(Path(top, name)) or 0 for top, _, names in os.walk(path) for name in names))
        finally:
            if lock is not None:
                lock.release()
    return sizes


def _size(path: Path) -> int | None:
    """Bytes of a file of any kind; None if it is gone or a directory."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise store_error("read", path, error) from None
    return None if stat.S_ISDIR(status.st_mode) else status.st_size
