"""Putting a snapshot's files where CRIU and the hooks read them.

Every file is copied and verified at once: what CRIU and the hooks read is no longer the store's to change. Memory does
not come this way (memory/fill.py); what is left is a few MB, and more for a large change of the root filesystem or for
memory that a process and its children share.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from blake3 import blake3

from rewarm.errors import SnapshotDamaged, StoreError

from . import files
from .manifest import FileEntry, Manifest

if TYPE_CHECKING:
    from .directory import DirectoryStore

_ROOM = 0.5
"""Share of the free room that a snapshot's files may take: the directory is in memory as a rule, and not ours alone."""
_NEXT_STEP = "capture it again"


def materialise(
    store: DirectoryStore,
    manifest: Manifest,
    directory: Path,
    *,
    without: Collection[str] = (),
    stop: files.Stop | None = None,
) -> None:
    """Put every file of `manifest` but those of names `without` at `directory`/<its name>.

    `directory` must exist and be empty and private.

    All files are copied, and the digest of each is right; so is the size of each pack.

    It ends early once `stop` (a threading.Event) is set, with StoreError.

    Raises SnapshotDamaged that names file and pack, StoreError if store or directory cannot be read or written.
    """
    packs: defaultdict[str, list[FileEntry]] = defaultdict(list)
    sizes: defaultdict[str, int] = defaultdict(int)
    for entry in manifest.files:
        sizes[entry.pack] = max(sizes[entry.pack], entry.offset + entry.size)
        if entry.name not in without:
            packs[entry.pack].append(entry)
    base = Path(os.path.realpath(directory))
    _check_room(base, sum(entry.size for entries in packs.values() for entry in entries))
    made: set[Path] = {base}
    for pack, entries in packs.items():
        # One pack at a time: a manifest with thousands of packs must not use up the descriptors.
        fd = store.open_pack(pack)
        try:
            size = os.fstat(fd).st_size
            for entry in entries:
                _check_pack_size(entry, size, sizes[pack])
                path = base / entry.name
                _make_parent(base, path.parent, made)
                _copy(store, fd, entry, path, stop)
        finally:
            files.close(fd)


def _check_room(base: Path, needed: int) -> None:
    """A snapshot must not take the room that the node's other services have in the same file system."""
    try:
        status = os.statvfs(base)
    except OSError as error:
        raise _write_error(base, error) from None
    room = int(status.f_bavail * status.f_frsize * _ROOM)
    if needed > room:
        cause = f"the snapshot's files have {needed >> 20} MiB, half of what is free are {room >> 20} MiB"
        raise StoreError("materialise", str(base), cause, "free space there, or set `state_dir` to another directory")


def _make_parent(base: Path, parent: Path, made: set[Path]) -> None:
    missing = []
    while parent not in made:
        missing.append(parent)
        parent = parent.parent
    for path in reversed(missing):
        try:
            path.mkdir(mode=0o700)
        except OSError as error:
            raise _write_error(path, error) from None
        made.add(path)


def _copy(store: DirectoryStore, pack_fd: int, entry: FileEntry, path: Path, stop: files.Stop | None) -> None:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _write_error(path, error) from None
    hasher = blake3()

    def take(piece: memoryview) -> None:
        hasher.update(piece)
        try:
            files.write_all(fd, piece)
        except OSError as error:
            raise _write_error(path, error) from None

    try:
        if not files.read_range(pack_fd, entry.offset, entry.size, take, stop):
            raise StoreError("materialise", str(path), "it was given up")
    except files.Short as short:
        raise _short(entry, int(short.args[0])) from None
    except OSError as error:
        raise files.store_error("read pack", store.pack_path(entry.pack), error) from None
    finally:
        os.close(fd)
    _check_digest(entry, hasher.hexdigest())


def _write_error(path: Path, error: OSError) -> StoreError:
    return StoreError("materialise", str(path), error.strerror or str(error), "check the file system of `state_dir`")


def _check_pack_size(entry: FileEntry, size: int, expected: int) -> None:
    if size < expected:
        raise _short(entry, size, expected)
    if size > expected:
        raise _damaged(entry, f"pack {entry.pack} has {size} bytes instead of {expected}")


def _short(entry: FileEntry, size: int, expected: int | None = None) -> SnapshotDamaged:
    wanted = entry.offset + entry.size if expected is None else expected
    return _damaged(entry, f"pack {entry.pack} is short: {size} of {wanted} bytes")


def _check_digest(entry: FileEntry, digest: str) -> None:
    if digest != entry.digest:
        raise _damaged(entry, f"its bytes in pack {entry.pack} were changed: digest {digest[:12]}…")


def _damaged(entry: FileEntry, cause: str) -> SnapshotDamaged:
    return SnapshotDamaged("read snapshot file", entry.name, cause, _NEXT_STEP)
