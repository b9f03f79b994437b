"""The chunks that other snapshots of the store have already, for a capture to share.

What is found here is believed only when it has been read: a pack's own index says where a chunk lies, and the chunk's
bytes must have its digest. A damaged one is thus written again. The packs that a capture shares are named in its
workspace's file `refs`, under the shared lock of the store; whoever deletes packs, under the exclusive one, keeps them.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import NamedTuple

from blake3 import blake3

from rewarm.errors import RewarmError, StoreError

from .chunks import CHUNKS, ZSTD, decode
from .compression import decompress
from .directory import DirectoryStore, SnapshotRef
from .entries import ChunkPack
from .files import store_error, write_all
from .locks import wait_lock
from .pack_file import PackFile
from .packs import Place, Record, layout, raw_size, read_index
from .sweep import REFS

MAX_KNOWN = 8_000_000
"""Chunks looked for, those of the first snapshots in the list: 16 TiB of them, in about 1.5 GB of memory."""


class Found(NamedTuple):
    """A chunk of another snapshot that was read and is right."""

    pack: ChunkPack
    record: Record
    place: Place


class _Shared(NamedTuple):
    """A pack that this capture keeps from being deleted, and what is in it."""

    pack: ChunkPack
    chunks: dict[bytes, tuple[Record, Place]]


class KnownChunks:
    """The chunks of all other snapshots by digest. Threads may use it at once.

    The snapshots are read at the first `find`; those that cannot be read are passed over.
    """

    def __init__(self, store: DirectoryStore, workspace: Path) -> None:
        self._store = store
        self._refs = workspace / REFS
        self._lock = threading.Lock()
        self._packs: list[str] = []
        self._where: dict[bytes, int] | None = None
        self._shared: dict[int, _Shared | None] = {}

    def find(self, digest: bytes, size: int) -> Found | None:
        """The chunk of `size` bytes with this digest, if the store has it undamaged. Raises StoreError."""
        with self._lock:
            if self._where is None:
                self._where = self._read_tables()
            number = self._where.get(digest)
            if number is None:
                return None
            if number not in self._shared:
                self._shared[number] = self._share(self._packs[number])
            shared = self._shared[number]
        if shared is None or digest not in shared.chunks:
            return None
        record, place = shared.chunks[digest]
        if record.size != size or not self._is_whole(shared.pack.digest, record, place):
            return None
        return Found(shared.pack, record, place)

    def _read_tables(self) -> dict[bytes, int]:
        where: dict[bytes, int] = {}
        numbers: dict[str, int] = {}
        for ref in self._snapshots():
            try:
                manifest = self._store.load(ref)
                if not manifest.packs:
                    continue
                chunks = decode(self._store.read_file(manifest, CHUNKS), manifest.packs, str(ref))
            except RewarmError:
                continue  # damaged, of a newer version or removed since: its chunks are written again
            own = [numbers.setdefault(pack.digest, len(numbers)) for pack in manifest.packs]
            for chunk in chunks:
                where.setdefault(chunk.digest, own[chunk.pack])
            if len(where) > MAX_KNOWN:
                break
        self._packs = list(numbers)
        return where

    def _snapshots(self) -> list[SnapshotRef]:
        try:
            return self._store.list()
        except StoreError:
            return []  # a directory of snapshots that cannot be read is no reason to refuse another capture

    def _share(self, digest: str) -> _Shared | None:
        """Keep the pack from being deleted and read its index; None if it is gone or damaged."""
        with wait_lock(self._store.root / "v1" / "locks" / "store", shared=True):
            self._append(digest)
            try:
                pack = self._store.open_chunk_pack(digest)
            except RewarmError:
                return None
        try:
            records = read_index(pack.read, pack.size, digest)
            found = ChunkPack(digest, pack.size, raw_size(records))
        except RewarmError:
            return None
        finally:
            pack.close()
        places = zip(records, layout(records), strict=True)
        return _Shared(found, {record.digest: (record, place) for record, place in places})

    def _append(self, digest: str) -> None:
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open(self._refs, flags, 0o600)
            try:
                write_all(fd, f"{digest}\n".encode())
            finally:
                os.close(fd)
        except OSError as error:
            raise store_error("write", self._refs, error) from None

    def _is_whole(self, digest: str, record: Record, place: Place) -> bool:
        try:
            pack: PackFile = self._store.open_chunk_pack(digest)
            try:
                data = pack.read(place.offset, record.stored)
            finally:
                pack.close()
            if record.encoding == ZSTD:
                data = decompress(data, record.size)
        except (StoreError, ValueError):
            return False
        return len(data) == record.size and blake3(data).digest() == record.digest
