"""Putting a snapshot's files where CRIU and the hooks read them.

Files are copied and verified at once: what CRIU reads is then no longer the store's to change. Only a very large one (a
large change of the root filesystem, or memory that a process and its children share) becomes a symbolic link to its
pack and is verified while CRIU already runs: the restored tree stays stopped until every verification has passed.
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

LINKED = 64 << 20
"""A file of this many bytes or more is linked instead of copied: the directory is in memory as a rule."""
_NEXT_STEP = "capture it again"


class PendingVerification:
    """A large file that lies in place unverified: nothing that it went into may run before `verify` returned."""

    def __init__(self, store: DirectoryStore, entry: FileEntry, path: Path) -> None:
        self.entry = entry
        self.path = path
        """The link in the materialised directory."""
        self.verified = False
        self._store = store

    def verify(self, stop: files.Stop) -> None:
        """Read the whole pack and compare size and digest; sets `verified`.

        Returns early, `verified` still False, once `stop` (a threading.Event) is set. May run in any thread;
        BLAKE3 and the reads release the GIL. Raises SnapshotDamaged, or StoreError if the store cannot be read.
        """
        fd = self._store.open_pack(self.entry.pack)
        try:
            _check_pack_size(self.entry, os.fstat(fd).st_size, self.entry.size)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
            digest = files.hash_range(fd, 0, self.entry.size, stop)
            if digest is None:
                return
            # Once more: a pack that grew meanwhile is not what was verified.
            _check_pack_size(self.entry, os.fstat(fd).st_size, self.entry.size)
        except files.Short as short:
            raise _short(self.entry, int(short.args[0])) from None
        except OSError as error:
            raise files.store_error("read pack", self._store.pack_path(self.entry.pack), error) from None
        finally:
            files.close(fd)
        _check_digest(self.entry, digest)
        self.verified = True


def materialise(
    store: DirectoryStore,
    manifest: Manifest,
    directory: Path,
    *,
    large: int | None = None,
    without: Collection[str] = (),
    stop: files.Stop | None = None,
) -> list[PendingVerification]:
    """Put every file of `manifest` but those of names `without` at `directory`/<its name>.

    `directory` must exist and be empty and private.

    Files of `large` bytes (LINKED) or more that have a pack of their own become links to it, and are returned for
    verification; every other file is copied, and its digest is right. That all packs are there and have
    their size is checked for both.

    The links are relative. CRIU opens its images relative to a descriptor of their directory when the restored
    task already has the container's root: an absolute link would be looked up inside the container.

    It ends early once `stop` (a threading.Event) is set, with StoreError.

    Raises SnapshotDamaged that names file and pack, StoreError if store or directory cannot be read or written.
    """
    large = LINKED if large is None else large
    packs: defaultdict[str, list[FileEntry]] = defaultdict(list)
    sizes: defaultdict[str, int] = defaultdict(int)
    for entry in manifest.files:
        sizes[entry.pack] = max(sizes[entry.pack], entry.offset + entry.size)
        if entry.name not in without:
            packs[entry.pack].append(entry)
    base = Path(os.path.realpath(directory))
    made: set[Path] = {base}
    pending = []
    for pack, entries in packs.items():
        # One pack at a time: a manifest with thousands of packs must not use up the descriptors.
        fd = store.open_pack(pack)
        try:
            size = os.fstat(fd).st_size
            for entry in entries:
                _check_pack_size(entry, size, sizes[pack])
                path = base / entry.name
                _make_parent(base, path.parent, made)
                if entry.whole_pack and entry.size >= large:
                    _link(store, entry, path)
                    pending.append(PendingVerification(store, entry, path))
                else:
                    _copy(store, fd, entry, path, stop)
        finally:
            files.close(fd)
    return pending


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


def _link(store: DirectoryStore, entry: FileEntry, path: Path) -> None:
    # Both ends resolved: `..` in a link's target is taken from where the link really lies.
    target = os.path.relpath(os.path.realpath(store.pack_path(entry.pack)), path.parent)
    try:
        path.symlink_to(target)
    except OSError as error:
        raise _write_error(path, error) from None


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
    return StoreError("materialise", str(path), error.strerror or str(error), "check the file system of `work_dir`")


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
