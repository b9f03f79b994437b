"""Writing one snapshot so that a reader sees all of it or nothing, and nothing of a failed one stays.

Files gather in a workspace under v1/tmp. `publish` makes them durable, moves them to their places as packs and
then moves the manifest, whose appearance is the snapshot's. A writer that dies leaves a workspace whose lock is
free: the next writer removes it and the packs that no manifest names.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from blake3 import blake3

from rewarm.errors import RewarmError, SnapshotDamaged, StoreError

from . import files
from .directory import DirectoryStore, SnapshotRef
from .locks import Lock, holder, try_lock, wait_lock
from .manifest import LARGE, MAX_SHARED, FileEntry, Manifest, check_file_name, parse
from .names import check_name, check_namespace
from .sweep import sweep_packs
from .workspace import Workspace, make_directories, open_workspace, prepare, sync_directory

# What link(2) says where the file may not or cannot have another name: then it is copied.
_NO_LINK = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOENT)


class _Pack(NamedTuple):
    path: Path
    digest: str
    size: int
    mtime_ns: int


class SnapshotWriter:
    """Writes the snapshot `namespace`/`name`. Use in a `with`; leaving it without `publish` leaves no trace.

    `progress` is called with the number of bytes taken in since its last call.
    """

    def __init__(self, root: Path, namespace: str, name: str, progress: Callable[[int], None] | None = None) -> None:
        self._namespace = check_namespace(namespace)
        self._name = check_name(name)
        self._store = DirectoryStore(str(root))
        self._root = root
        self._progress = progress
        self._name_lock: Lock | None = None
        self._workspace: Workspace | None = None
        self._packs: dict[str, _Pack] = {}
        self._small: list[FileEntry] = []
        self._large: list[FileEntry] = []
        self._names: set[str] = set()
        self._shared = blake3()
        self._shared_size = 0
        self._placed = False
        self._shown = False
        self._published = False

    def __enter__(self) -> SnapshotWriter:
        """Raises StoreError if the name is being captured already, or the store cannot be written."""
        prepare(self._root)
        lock_path = make_directories(self._root, "v1", "locks", "names", self._namespace) / self._name
        self._name_lock = try_lock(lock_path)
        if self._name_lock is None:
            cause = f"another capture of {self._name} is running ({holder(lock_path)})"
            raise StoreError("capture", f"{self._namespace}/{self._name}", cause, "wait for it, or use another name")
        try:
            self._sign(lock_path)
            self._workspace = open_workspace(self._store)
        except BaseException:
            self._name_lock.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if self._workspace is not None:
                self._workspace.close()
        except StoreError:
            # Another error on its way matters more, and a snapshot that is published is published. What is left is
            # the next writer's to remove.
            if kind is None and not self._published:
                raise
        finally:
            self._workspace = None
            if self._name_lock is not None:
                self._name_lock.release()

    def add_file(self, name: str, path: str | Path) -> None:
        """Take the regular file at `path` into the snapshot as `name`.

        A file of 1 MiB or more is hard-linked if it lies on the store's file system, so it must not be written
        any more (publish notices if it was); it becomes read-only. The caller still removes `path`. Else it
        is copied.

        Raises StoreError if the file is no regular file or cannot be read, changes meanwhile, the name is bad or there
        already, or the store is full.
        """
        workspace = self._open()
        problem = check_file_name(name)
        if problem or name in self._names:
            raise StoreError("add file", repr(name[:80]), problem or "is in the snapshot already")
        try:
            fd = files.open_plain(path)
        except files.NotRegular:
            raise StoreError("add file", str(path), "is not a regular file") from None
        except OSError as error:
            raise StoreError("add file", str(path), error.strerror or str(error)) from None
        try:
            before = os.fstat(fd)
            if before.st_size < LARGE:
                entry = self._add_small(workspace, name, path, fd, before.st_size)
                self._small.append(entry)
            else:
                self._large.append(self._add_large(workspace, name, path, fd, before.st_size))
            after = os.fstat(fd)
        finally:
            os.close(fd)
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise _changed(path)
        self._names.add(name)

    def publish(self, manifest: Manifest) -> tuple[SnapshotRef, Manifest]:
        """Make the snapshot visible: `manifest`, without files, gets those added, and its id. Only once.

        When this returns the snapshot is on disk. Raises StoreError; then no part of the snapshot is in the store.
        """
        workspace = self._open()
        if (manifest.namespace, manifest.name) != (self._namespace, self._name):
            cause = f"is for {manifest.namespace}/{manifest.name}"
            raise StoreError("publish", f"{self._namespace}/{self._name}", f"the manifest {cause}")
        complete = replace(manifest, files=tuple(sorted(self._finish(workspace), key=lambda entry: entry.name)))
        data = self._checked_bytes(complete)
        ref = SnapshotRef(self._namespace, self._name, complete.id)
        temporary = workspace.path / "manifest"
        self._write(temporary, data)
        try:
            with wait_lock(self._root / "v1" / "locks" / "store", shared=True):
                self._place(ref, temporary)
        except BaseException:
            if self._placed:
                self._take_back(ref)
            raise
        self._published = True
        self.__exit__(None, None, None)
        return ref, complete

    def _open(self) -> Workspace:
        if self._workspace is None:
            cause = "the writer is not open: it was never entered, or has published"
            raise StoreError("write snapshot", f"{self._namespace}/{self._name}", cause)
        return self._workspace

    def _sign(self, path: Path) -> None:
        assert self._name_lock is not None
        try:
            self._name_lock.sign()
        except OSError as error:
            raise files.store_error("lock", path, error) from None

    def _report(self, count: int) -> None:
        if self._progress is not None:
            self._progress(count)

    def _add_small(self, workspace: Workspace, name: str, path: str | Path, fd: int, size: int) -> FileEntry:
        try:
            data = files.read_up_to(fd, size + 1)
        except OSError as error:
            raise StoreError("read", str(path), error.strerror or str(error)) from None
        if len(data) != size:
            raise _changed(path)
        if self._shared_size + size > MAX_SHARED:
            raise StoreError("add file", name, f"the snapshot's small files have more than {MAX_SHARED} bytes")
        digest = blake3(data).hexdigest()
        self._append(workspace.path / "shared", data)
        # The pack's digest is known, and put in, when all small files are there.
        entry = FileEntry(name=name, size=size, digest=digest, pack="", offset=self._shared_size)
        self._shared.update(data)
        self._shared_size += size
        self._report(size)
        return entry

    def _append(self, path: Path, data: bytes) -> None:
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o400)
            try:
                files.write_all(fd, data)
            finally:
                os.close(fd)
        except OSError as error:
            raise files.store_error("write", path, error) from None

    def _add_large(self, workspace: Workspace, name: str, path: str | Path, fd: int, size: int) -> FileEntry:
        target = workspace.path / f"large{len(self._large)}"
        hasher = files.threaded_hasher()
        linked = self._link(fd, target)
        out = -1 if linked else self._create(target)

        def take(piece: memoryview) -> None:
            hasher.update(piece)
            if out >= 0:
                try:
                    files.write_all(out, piece)
                except OSError as error:
                    raise files.store_error("write", target, error) from None
            self._report(len(piece))

        try:
            files.read_range(fd, 0, size, take)
            if linked:
                os.fchmod(fd, 0o400)
            kept = fd if linked else out
            os.fsync(kept)
            status = os.fstat(kept)
        except files.Short:
            raise _changed(path) from None
        except OSError as error:
            raise files.store_error("write", target, error) from None
        finally:
            if out >= 0:
                os.close(out)
        digest = hasher.hexdigest()
        self._packs[digest] = _Pack(target, digest, size, status.st_mtime_ns)
        return FileEntry(name=name, size=size, digest=digest, pack=digest, offset=0)

    def _create(self, target: Path) -> int:
        try:
            return os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o400)
        except OSError as error:
            raise files.store_error("create", target, error) from None

    def _link(self, fd: int, target: Path) -> bool:
        """Give the open file another name; False where that cannot be done."""
        directory = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # By descriptor, so that what is hashed is what is linked. Python follows the magic link
            # (AT_SYMLINK_FOLLOW) only if a directory descriptor is given.
            os.link(f"/proc/self/fd/{fd}", target.name, dst_dir_fd=directory, follow_symlinks=True)
        except OSError as error:
            if error.errno in _NO_LINK:
                return False
            raise files.store_error("link", target, error) from None
        finally:
            os.close(directory)
        return True

    def _finish(self, workspace: Workspace) -> list[FileEntry]:
        """All entries, with the shared pack's digest; the shared pack goes to disk."""
        if not self._small:
            return list(self._large)
        path = workspace.path / "shared"
        digest = self._shared.hexdigest()
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                os.fsync(fd)
                status = os.fstat(fd)
            finally:
                os.close(fd)
        except OSError as error:
            raise files.store_error("write", path, error) from None
        self._packs[digest] = _Pack(path, digest, self._shared_size, status.st_mtime_ns)
        # An empty file with the shared pack's own digest (all small files are empty) must say offset 0, and does.
        return self._large + [replace(entry, pack=digest) for entry in self._small]

    def _checked_bytes(self, manifest: Manifest) -> bytes:
        """The manifest's bytes, once the reader's own parser takes them: what is published can be read."""
        where = f"{self._namespace}/{self._name}"
        try:
            data = manifest.to_bytes()
            parse(data, where)
        except SnapshotDamaged as error:
            raise StoreError("write manifest", where, error.cause) from None
        except (TypeError, ValueError) as error:
            raise StoreError("write manifest", where, f"cannot be written as JSON: {error}") from None
        return data

    def _write(self, path: Path, data: bytes) -> None:
        fd = self._create(path)
        try:
            files.write_all(fd, data)
            os.fsync(fd)
        except OSError as error:
            raise files.store_error("write", path, error) from None
        finally:
            os.close(fd)

    def _place(self, ref: SnapshotRef, temporary: Path) -> None:
        """Move packs, then the manifest, to where readers look. Under the shared lock of the store."""
        for pack in self._packs.values():
            self._check_unchanged(pack)
        self._placed = True
        directories = set()
        for pack in self._packs.values():
            directory = make_directories(self._root, "v1", "packs", pack.digest[:2])
            # Also over a pack that is there: this one is known to be right, that one may be damaged.
            self._rename(pack.path, directory / pack.digest)
            directories.add(directory)
        for directory in directories:
            sync_directory(directory)
        parent = make_directories(self._root, "v1", "snapshots", ref.namespace, ref.name)
        # The very same snapshot may be there already; a failure from here on must not take that one back.
        self._shown = not os.path.lexists(parent / f"{ref.id}.json")
        self._rename(temporary, parent / f"{ref.id}.json")
        sync_directory(parent)
        # On a shared file system without working locks another node may have swept them meanwhile.
        for pack in self._packs.values():
            os.close(self._store.open_pack(pack.digest))

    def _check_unchanged(self, pack: _Pack) -> None:
        try:
            status = pack.path.lstat()
        except OSError as error:
            raise files.store_error("read", pack.path, error) from None
        if (status.st_size, status.st_mtime_ns) != (pack.size, pack.mtime_ns):
            raise _changed(pack.path)

    def _rename(self, source: Path, target: Path) -> None:
        try:
            source.replace(target)
        except OSError as error:
            raise files.store_error("write", target, error) from None

    def _take_back(self, ref: SnapshotRef) -> None:
        """Remove what a failed publish had put in place already."""
        parent = self._root / "v1" / "snapshots" / ref.namespace / ref.name
        try:
            if self._shown:
                (parent / f"{ref.id}.json").unlink(missing_ok=True)
            with wait_lock(self._root / "v1" / "locks" / "store"):
                sweep_packs(self._store)
                for directory in (parent, parent.parent):
                    if directory.is_dir() and not any(directory.iterdir()):
                        directory.rmdir()
        except (OSError, RewarmError):
            # The error that made publish fail is the one to report. Packs that stay are named by no manifest, are
            # never read, and go with the next sweep.
            return


def _changed(path: str | Path) -> StoreError:
    return StoreError("add file", str(path), "changed while it was captured", "capture again")
