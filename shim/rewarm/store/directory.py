"""A store in a directory: what is in it and how to read it.

Reading takes no lock and works on a read-only mount: manifests and packs are immutable, a manifest appears by
rename after its packs are on disk, and a removal takes the manifest away first.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rewarm.errors import RewarmError, SnapshotDamaged, SnapshotNotFound, StoreError
from rewarm.naming import is_name
from rewarm.settings import store_directory

from . import files, manifest
from .manifest import Manifest, digest_of
from .names import check_name, check_namespace
from .pack_file import PackFile

if TYPE_CHECKING:
    from .gc import GcStats
    from .verify import Finding
    from .writer import SnapshotWriter

SHORTEST_PREFIX = 6
MAX_FILE = 128 << 20
"""Bytes of the largest file that is read into memory: the longest chunk table."""
_RECAPTURE = "capture it again"


class SnapshotRef(NamedTuple):
    """Which snapshot: `id` is the digest of its manifest."""

    namespace: str
    name: str
    id: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}@{self.id[:12]}"


Refs = list[SnapshotRef]
Names = list[str]
Entries = list[tuple[str, bool]]
Candidates = list[tuple[SnapshotRef, Manifest | RewarmError]]


class DirectoryStore:
    """A store at a path or a file:// URL. Making one touches no disk; each method raises StoreError if the store
    is missing, not a directory, unreadable or a broken link."""

    def __init__(self, url: str) -> None:
        try:
            self.root = Path(store_directory(url))
        except ValueError as error:
            step = "set `store` to the absolute path of a directory or a file:// URL"
            raise StoreError("open store", repr(url), str(error), step) from None

    def list(self, namespace: str | None = None) -> Refs:
        """All snapshots of a namespace, or of every namespace, sorted; whether they are whole is not looked at."""
        spaces = self._directories("v1", "snapshots") if namespace is None else [check_namespace(namespace)]
        refs: Refs = []
        for space in spaces:
            for name in self._directories("v1", "snapshots", space):
                refs += self._ids(space, name)
        return sorted(refs)

    def load(self, ref: SnapshotRef) -> Manifest:
        """The manifest, if its bytes have the digest that its id says and it belongs at its place.

        Raises SnapshotNotFound, SnapshotDamaged, StoreError.
        """
        data = self.read_manifest(ref)
        found = manifest.load(data, ref.id, str(ref))
        if (found.namespace, found.name) != (ref.namespace, ref.name):
            cause = f"says that it is {found.namespace}/{found.name}"
            raise SnapshotDamaged("read manifest", str(ref), cause, "remove it with `rewarm rm`")
        return found

    def read_manifest(self, ref: SnapshotRef) -> bytes:
        """The manifest's bytes as they are, at most one more than the longest manifest has; same errors as `load`."""
        _check(ref)
        parts = ("v1", "snapshots", ref.namespace, ref.name, f"{ref.id}.json")
        try:
            fd = files.open_regular(self.root, parts)
            try:
                return files.read_up_to(fd, manifest.MAX_BYTES + 1)
            finally:
                os.close(fd)
        except files.NotRegular:
            raise SnapshotDamaged("read manifest", str(ref), "is not a regular file", "remove it by hand") from None
        except FileNotFoundError:
            raise SnapshotNotFound("read manifest", str(ref), "is not in the store", "see `rewarm ls`") from None
        except OSError as error:
            raise files.store_error("read manifest", self.root.joinpath(*parts), error) from None

    def candidates(self, namespace: str, name: str) -> Candidates:
        """The snapshots of one name, newest first; one that cannot be read comes last, with the error in its place.

        An unknown name gives an empty list.
        """
        good: list[tuple[SnapshotRef, Manifest]] = []
        bad: Candidates = []
        for ref in self._ids(check_namespace(namespace), check_name(name)):
            try:
                good.append((ref, self.load(ref)))
            except SnapshotNotFound:
                continue  # removed since the directory was read
            except RewarmError as error:
                bad.append((ref, error))
        good.sort(key=lambda item: item[1].created_key, reverse=True)
        return [*good, *bad]

    def resolve(self, text: str, namespace: str | None = "default") -> SnapshotRef:
        """A name (its newest readable snapshot), or the first 6 or more digits of an id; None is every namespace.

        Raises SnapshotNotFound, and StoreError that lists the matches if there are several.
        """
        refs = self.list(namespace)
        named = [ref for ref in refs if ref.name == text]
        spaces = sorted({ref.namespace for ref in named})
        if len(spaces) == 1:
            if len(named) == 1:
                return named[0]
            for ref, found in self.candidates(spaces[0], text):
                if isinstance(found, Manifest):
                    return ref
            raise _ambiguous(text, named, "all of them are damaged")
        if spaces:
            raise _ambiguous(text, named, "the name is in several namespaces")
        if len(text) >= SHORTEST_PREFIX:
            matches = [ref for ref in refs if ref.id.startswith(text)]
            if len(matches) == 1:
                return matches[0]
            if matches:
                raise _ambiguous(text, matches, "several ids begin so")
        where = "any namespace" if namespace is None else f"namespace {namespace}"
        raise SnapshotNotFound("find snapshot", repr(text[:80]), f"no name or id in {where}", "see `rewarm ls`")

    def pack_path(self, digest: str) -> Path:
        """Where a pack lies, whether or not it is there. Raises SnapshotDamaged if `digest` is none."""
        return self.root.joinpath(*_pack_parts(digest))

    def open_pack(self, digest: str) -> int:
        """A pack for reading; the caller closes it. Raises SnapshotDamaged if it is missing or no regular file."""
        parts = _pack_parts(digest)
        try:
            return files.open_regular(self.root, parts)
        except files.NotRegular:
            raise SnapshotDamaged("open pack", digest, "is not a regular file", _RECAPTURE) from None
        except FileNotFoundError:
            raise SnapshotDamaged("open pack", digest, f"is missing in {self.root}", _RECAPTURE) from None
        except OSError as error:
            raise files.store_error("open pack", self.root.joinpath(*parts), error) from None

    def open_chunk_pack(self, digest: str) -> PackFile:
        """A pack of chunks; the caller closes it. Raises SnapshotDamaged if it is missing or no regular file."""
        fd = self.open_pack(digest)
        try:
            return PackFile(fd, self.pack_path(digest))
        except OSError as error:
            os.close(fd)
            raise files.store_error("open pack", self.pack_path(digest), error) from None

    def read_file(self, manifest: Manifest, name: str) -> bytes:
        """A whole file of a snapshot, of at most 128 MiB, verified. Raises SnapshotDamaged, StoreError."""
        where = f"{name[:80]!r} of {manifest.namespace}/{manifest.name}"
        entry = manifest.file(name)
        if entry is None:
            raise SnapshotDamaged("read file", where, "is not in the snapshot", _RECAPTURE)
        if entry.size > MAX_FILE:
            raise SnapshotDamaged("read file", where, f"has {entry.size} bytes, more than {MAX_FILE}", _RECAPTURE)
        pack = self.open_chunk_pack(entry.pack)
        try:
            if pack.size < entry.offset + entry.size:
                cause = f"pack {entry.pack} is short: {pack.size} of {entry.offset + entry.size} bytes"
                raise SnapshotDamaged("read file", where, cause, _RECAPTURE)
            data = pack.read(entry.offset, entry.size)
        finally:
            pack.close()
        if len(data) != entry.size or digest_of(data) != entry.digest:
            raise SnapshotDamaged("read file", where, f"its bytes in pack {entry.pack} were changed", _RECAPTURE)
        return data

    def writer(
        self,
        namespace: str,
        name: str,
        progress: Callable[[int], None] | None = None,
        *,
        compression: str = "auto",
        threads: int = 0,
    ) -> SnapshotWriter:
        """A writer of one snapshot, to be used in a `with`. See writer.SnapshotWriter."""
        from .writer import SnapshotWriter  # a restore never writes

        return SnapshotWriter(self.root, namespace, name, progress, compression=compression, threads=threads)

    def remove(self, ref: SnapshotRef) -> int:
        """Remove a snapshot, whole or damaged, and every pack that no manifest names then. Returns the bytes freed.

        Waits for captures that are publishing. Raises SnapshotNotFound and StoreError.
        """
        from .remove import remove

        _check(ref)
        return remove(self, ref)

    def gc(self, progress: Callable[[int], None] | None = None, *, dry_run: bool = False) -> GcStats:
        """Remove what no snapshot needs: packs that no manifest names and what dead captures left.

        `dry_run` only counts. `progress` gets bytes freed. Waits for captures that are publishing. Raises StoreError.
        """
        from .gc import collect

        return collect(self, progress, dry_run=dry_run)

    def verify(
        self, ref: SnapshotRef | None = None, progress: Callable[[int], None] | None = None
    ) -> Iterator[Finding]:
        """Read every byte of one snapshot, or of all, and yield what is wrong. `progress` gets bytes read."""
        from .verify import verify

        return verify(self, [ref] if ref is not None else self.list(), progress)

    def _ids(self, namespace: str, name: str) -> Refs:
        refs = []
        for entry, _ in self._entries("v1", "snapshots", namespace, name):
            id = entry.removesuffix(".json")
            if id != entry and manifest.is_digest(id):
                refs.append(SnapshotRef(namespace, name, id))
        return refs

    def _directories(self, *parts: str) -> Names:
        return [name for name, is_directory in self._entries(*parts) if is_directory and is_name(name)]

    def _entries(self, *parts: str) -> Entries:
        """Names in a directory of the store, and whether each is a directory itself (a link is none).

        Nothing if it is not there, as in a store that was never written.
        """
        try:
            fd = files.open_directory(self.root, parts)
            try:
                with os.scandir(fd) as entries:
                    return [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
            finally:
                os.close(fd)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise files.store_error("list", self.root.joinpath(*parts), error) from None


def _check(ref: SnapshotRef) -> None:
    check_namespace(ref.namespace)
    check_name(ref.name)
    if not manifest.is_digest(ref.id):
        raise StoreError("use snapshot id", repr(ref.id[:80]), "is not 64 hex digits", "see `rewarm ls`")


def _pack_parts(digest: str) -> tuple[str, str, str, str]:
    if not manifest.is_digest(digest):
        raise SnapshotDamaged("open pack", repr(digest[:80]), "is not a digest of 64 hex digits", _RECAPTURE)
    return "v1", "packs", digest[:2], digest


def _ambiguous(text: str, refs: Refs, cause: str) -> StoreError:
    shown = ", ".join(str(ref) for ref in refs[:10]) + (", …" if len(refs) > 10 else "")
    return StoreError("find snapshot", repr(text[:80]), f"{cause}: {shown}", "give more of the id, or the namespace")
