"""Writing one snapshot so that a reader sees all of it or nothing, and nothing of a failed one stays.

Files gather in a workspace under v1/tmp. `publish` makes them durable, moves them to their places as packs and
then moves the manifest, whose appearance is the snapshot's. A writer that dies leaves a workspace whose lock is
free: the next writer removes it and the packs that no manifest names.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from rewarm.errors import RewarmError, SnapshotDamaged, StoreError

from . import files
from .chunk_writer import ChunkWriter
from .chunks import CHUNKS
from .compression import MODES
from .directory import DirectoryStore, SnapshotRef
from .file_writer import FileWriter, NewPack, check_unchanged, write_file
from .known import KnownChunks
from .locks import Lock, holder, try_lock, wait_lock
from .manifest import Manifest, check_file_name, parse
from .names import check_name, check_namespace
from .rate import read_rate
from .sweep import sweep_locks, sweep_packs
from .workspace import Workspace, make_directories, open_workspace, prepare, sync_directory


class SnapshotWriter:
    """Writes the snapshot `namespace`/`name`. Use in a `with`; leaving it without `publish` leaves no trace.

    `progress` is called with the number of bytes taken in since its last call. `compression` (auto, zstd or off) is
    what becomes of chunks; `threads` (0: as many as this process has processors) is how many a restore will have to
    undo it. Files are added by one thread at a time, chunks by any number.
    """

    def __init__(
        self,
        root: Path,
        namespace: str,
        name: str,
        progress: Callable[[int], None] | None = None,
        *,
        compression: str = "auto",
        threads: int = 0,
    ) -> None:
        if compression not in MODES:
            raise StoreError("compress", f"with {compression[:80]!r}", "is unknown", f"use one of {', '.join(MODES)}")
        self._namespace = check_namespace(namespace)
        self._name = check_name(name)
        self._store = DirectoryStore(str(root))
        self._root = root
        self._progress = progress
        self._name_lock: Lock | None = None
        self._workspace: Workspace | None = None
        self._names: set[str] = {CHUNKS}  # the writer's own
        self._compression = compression
        self._threads = threads or len(os.sched_getaffinity(0))
        self._files: FileWriter | None = None
        self._chunks: ChunkWriter | None = None
        self._reporting = threading.Lock()
        self._placed = False
        self._shown = False
        self._published = False
        self.new_bytes = 0
        """Bytes that the snapshot added to the store; known once it is published."""

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
            workspace = self._workspace = open_workspace(self._store)
            self._files = FileWriter(workspace.path, self._report)
            known = KnownChunks(self._store, workspace.path)
            self._chunks = ChunkWriter(
                workspace.path, known, self._compression, self._threads, lambda: read_rate(workspace.path)
            )
        except BaseException:
            self._name_lock.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if self._chunks is not None:
                self._chunks.close()
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
        self._check_new(name)
        self._file_writer().add(name, path)
        self._names.add(name)

    def add_bytes(self, name: str, data: bytes) -> None:
        """Take `data` into the snapshot as the file `name`. Raises StoreError like `add_file`."""
        self._check_new(name)
        self._file_writer().add_bytes(name, data)
        self._names.add(name)

    def expect(self, total_bytes: int) -> None:
        """Say how many bytes of chunks will come, before the first: packs of a small capture are smaller."""
        self._chunk_writer().expect(total_bytes)

    def add_chunk(self, data: bytes | memoryview) -> int:
        """Take up to CHUNK bytes, a multiple of 4096, and return the chunk's number in this snapshot.

        Many threads may call it at once; hashing, compressing and writing happen in the caller's thread with the GIL
        released. `data` is not used after the return. A chunk equal to one of this snapshot or of another in the
        store is not written again, yet has a number of its own. Zeros are not looked for.

        Raises StoreError; then the snapshot cannot be published.
        """
        number = self._chunk_writer().add(data)
        self._report(memoryview(data).nbytes)
        return number

    def _check_new(self, name: str) -> None:
        self._open()
        problem = check_file_name(name)
        if problem or name in self._names:
            raise StoreError("add file", repr(name[:80]), problem or "is in the snapshot already")

    def publish(self, manifest: Manifest) -> tuple[SnapshotRef, Manifest]:
        """Make the snapshot visible: `manifest`, without files, gets those added, and its id. Only once.

        When this returns the snapshot is on disk. Raises StoreError; then no part of the snapshot is in the store.
        """
        workspace = self._open()
        if (manifest.namespace, manifest.name) != (self._namespace, self._name):
            cause = f"is for {manifest.namespace}/{manifest.name}"
            raise StoreError("publish", f"{self._namespace}/{self._name}", f"the manifest {cause}")
        chunks = self._chunk_writer().finish()
        if chunks.table:
            self._file_writer().add_bytes(CHUNKS, chunks.table)
        entries = tuple(sorted(self._file_writer().finish(), key=lambda entry: entry.name))
        complete = manifest._replace(files=entries, packs=chunks.packs)
        packs = [*self._file_writer().packs.values(), *chunks.new]
        data = self._checked_bytes(complete)
        ref = SnapshotRef(self._namespace, self._name, complete.id)
        temporary = workspace.path / "manifest"
        write_file(temporary, data)
        try:
            with wait_lock(self._root / "v1" / "locks" / "store", shared=True):
                self._place(ref, complete, packs, temporary)
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

    def _file_writer(self) -> FileWriter:
        self._open()
        assert self._files is not None
        return self._files

    def _chunk_writer(self) -> ChunkWriter:
        self._open()
        assert self._chunks is not None
        return self._chunks

    def _sign(self, path: Path) -> None:
        assert self._name_lock is not None
        try:
            self._name_lock.sign()
        except OSError as error:
            raise files.store_error("lock", path, error) from None

    def _report(self, count: int) -> None:
        if self._progress is not None:
            with self._reporting:
                self._progress(count)

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

    def _place(self, ref: SnapshotRef, manifest: Manifest, packs: Sequence[NewPack], temporary: Path) -> None:
        """Move packs, then the manifest, to where readers look. Under the shared lock of the store."""
        for pack in packs:
            check_unchanged(pack)
        self._placed = True
        directories = set()
        added = 0
        for pack in packs:
            directory = make_directories(self._root, "v1", "packs", pack.digest[:2])
            if not os.path.lexists(directory / pack.digest):
                added += pack.size
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
        for digest in {pack.digest for pack in packs} | {pack.digest for pack in manifest.packs}:
            os.close(self._store.open_pack(digest))
        self.new_bytes = added + (len(manifest.to_bytes()) if self._shown else 0)

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
            with sweep_locks(self._root):
                sweep_packs(self._store)
                for directory in (parent, parent.parent):
                    if directory.is_dir() and not any(directory.iterdir()):
                        directory.rmdir()
        except (OSError, RewarmError):
            # The error that made publish fail is the one to report. Packs that stay are named by no manifest, are
            # never read, and go with the next sweep.
            return
