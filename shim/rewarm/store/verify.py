"""Reading a whole store and saying what is wrong with it."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from rewarm.errors import RewarmError, SnapshotNotFound

from . import files
from .chunks import CHUNKS
from .manifest import FileEntry
from .verify_chunks import ChunkPacks

if TYPE_CHECKING:
    from .directory import DirectoryStore, SnapshotRef

Progress = Callable[[int], None]


class Finding(NamedTuple):
    """One thing that is wrong: `object` is a snapshot, or "<snapshot> <file>"; packs of chunks are found under the
    file `memory/chunks`."""

    object: str
    problem: str


def verify(store: DirectoryStore, refs: Sequence[SnapshotRef], progress: Progress | None = None) -> Iterator[Finding]:
    """Yield a finding for every snapshot that cannot be read and every file whose bytes are not what was captured.

    A pack that several snapshots share is read once. Snapshots removed meanwhile are passed over, unless it is
    the only one asked for. Raises StoreError if the store itself cannot be read.
    """
    packs = _Packs(store, progress)
    chunk_packs = ChunkPacks(store, progress)
    for ref in refs:
        try:
            manifest = store.load(ref)
        except SnapshotNotFound:
            if len(refs) == 1:
                raise
            continue
        except RewarmError as error:
            yield Finding(str(ref), error.cause)
            continue
        findings = list(_snapshot(packs, ref, manifest.files))
        if manifest.packs:
            table = f"{ref} {CHUNKS}"
            is_bad = any(finding.object == table for finding in findings)
            problems = chunk_packs.problems(manifest, str(ref), table_is_bad=is_bad)
            findings += [Finding(table, problem) for problem in problems]
        if findings and not _still_there(store, ref):
            continue
        yield from findings


def _still_there(store: DirectoryStore, ref: SnapshotRef) -> bool:
    try:
        store.read_manifest(ref)
    except SnapshotNotFound:
        return False
    return True


def _snapshot(packs: _Packs, ref: SnapshotRef, entries: Sequence[FileEntry]) -> Iterator[Finding]:
    members_of: defaultdict[str, list[FileEntry]] = defaultdict(list)
    for entry in entries:
        members_of[entry.pack].append(entry)
    for pack, members in members_of.items():
        state = packs.check(pack)
        problem = state.problem
        expected = max(entry.offset + entry.size for entry in members)
        if not problem and state.size != expected:
            problem = f"pack {pack} has {state.size} bytes, the manifest says {expected}"
        for entry in members:
            wrong = problem or packs.check_part(entry)
            if wrong:
                yield Finding(f"{ref} {entry.name}", wrong)


class _State(NamedTuple):
    size: int
    problem: str


class _Packs:
    """The packs read so far, each once."""

    def __init__(self, store: DirectoryStore, progress: Progress | None) -> None:
        self._store = store
        self._progress = progress
        self._known: dict[str, _State] = {}

    def check(self, pack: str) -> _State:
        """Its size and what is wrong with it, or ""."""
        if pack not in self._known:
            self._known[pack] = self._read(pack)
        return self._known[pack]

    def check_part(self, entry: FileEntry) -> str:
        """What is wrong with a file inside a good pack, or ""."""
        if entry.whole_pack:
            return ""
        try:
            fd = self._store.open_pack(entry.pack)
            try:
                found = files.hash_range(fd, entry.offset, entry.size)
            finally:
                os.close(fd)
        except RewarmError as error:
            return f"pack {entry.pack}: {error.cause}"
        except (OSError, files.Short) as error:
            return f"pack {entry.pack} cannot be read any more: {error!r}"
        return "" if found == entry.digest else f"its bytes in pack {entry.pack} do not have its digest"

    def _read(self, pack: str) -> _State:
        try:
            fd = self._store.open_pack(pack)
        except RewarmError as error:
            return _State(0, f"pack {pack}: {error.cause}")
        try:
            size = os.fstat(fd).st_size
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
            hasher = files.threaded_hasher()

            def take(piece: memoryview) -> None:
                hasher.update(piece)
                if self._progress is not None:
                    self._progress(len(piece))

            files.read_range(fd, 0, size, take)
        except files.Short:
            return _State(0, f"pack {pack} became shorter while it was read")
        except OSError as error:
            return _State(0, f"pack {pack}: {files.store_error('read', pack, error).cause}")
        finally:
            os.close(fd)
        found = hasher.hexdigest()
        return _State(size, "" if found == pack else f"pack {pack} was changed: its bytes have digest {found[:12]}…")
