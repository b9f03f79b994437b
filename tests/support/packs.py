"""Chunk packs for tests of the reader: written here from the format's description, read by the code under test."""

from __future__ import annotations

import mmap
import os
import random
import struct
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import zstandard
from blake3 import blake3

from rewarm.errors import SnapshotDamaged
from rewarm.store.cache import PackCache
from rewarm.store.chunks import CHUNK, RAW, ZSTD, Chunk
from rewarm.store.entries import ChunkPack
from rewarm.store.reader import ChunkReader

MAGIC = b"RWCHUNK1"


class FilePack:
    """An open pack with a descriptor, as a directory store gives it."""

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.size = os.fstat(self.fd).st_size

    def read_into(self, view: memoryview, offset: int) -> int:
        return os.preadv(self.fd, [view], offset)

    def close(self) -> None:
        os.close(self.fd)
        self.fd = -1


class PackStore:
    """Packs in a directory: `root/v1/packs/<aa>/<digest>`, and a count of how often each was opened."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.opened: list[str] = []

    def pack_path(self, digest: str) -> Path:
        return self.root / "v1" / "packs" / digest[:2] / digest

    def open_chunk_pack(self, digest: str) -> FilePack:
        self.opened.append(digest)
        try:
            return FilePack(self.pack_path(digest))
        except FileNotFoundError:
            raise SnapshotDamaged("open pack", digest, "is missing", "capture it again") from None

    def add(self, number: int, contents: Sequence[bytes], compress: bool = False) -> tuple[ChunkPack, list[Chunk]]:
        """Write a pack of these chunks; they get `number` as their pack."""
        chunks, entries, data = [], [], bytearray()
        raw_offset = 0
        for raw in contents:
            stored, encoding = raw, RAW
            if compress:
                packed = zstandard.ZstdCompressor().compress(raw)
                if len(packed) < len(raw):
                    stored, encoding = packed, ZSTD
            digest = blake3(raw).digest()
            chunks.append(Chunk(digest, number, encoding, len(data), len(stored), len(raw), raw_offset))
            entries.append(struct.pack("<32sIIII", digest, encoding, len(stored), len(raw), 0))
            data += stored
            data += bytes(-len(data) % 4096)
            raw_offset += len(raw)
        index = MAGIC + struct.pack("<II", len(entries), 0) + b"".join(entries)
        name = blake3(index, derive_key_context="rewarm chunk pack v1").hexdigest()
        whole = data + index + struct.pack("<Q", len(data)) + MAGIC
        path = self.pack_path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(whole)
        return ChunkPack(name, len(whole), raw_offset), chunks


class Snapshot(NamedTuple):
    """Packs in a store, the table of their chunks, and what each chunk holds."""

    store: PackStore
    packs: list[ChunkPack]
    chunks: list[Chunk]
    data: list[bytes]

    @classmethod
    def make(cls, root: Path, packs: int, compress: bool = False, seed: int = 1) -> Snapshot:
        """Packs of eight chunks each, from one page to 2 MiB."""
        store, source = PackStore(root), random.Random(seed)
        tables: list[ChunkPack] = []
        chunks: list[Chunk] = []
        data: list[bytes] = []
        for number in range(packs):
            sizes = [CHUNK, 4096, 8192, CHUNK // 2, CHUNK, 4096 * source.randrange(1, 512), 12288, CHUNK]
            contents = [source.randbytes(size // 2) + bytes(size - size // 2) for size in sizes]
            contents[3] = source.randbytes(sizes[3])
            pack, its = store.add(number, contents, compress)
            tables.append(pack)
            chunks += its
            data += contents
        return cls(store, tables, chunks, data)

    def drop(self) -> None:
        """Out of the page cache with the packs."""
        for pack in self.packs:
            drop(self.store.pack_path(pack.digest))


def drop(path: Path) -> None:
    """Out of the page cache with a file."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def read_all(snapshot: Snapshot, threads: int, cache: PackCache | None = None) -> ChunkReader:
    """Read everything and check it. Returns the closed reader; raises the first stream's error."""
    stop = threading.Event()
    got: list[int] = []
    errors: list[BaseException] = []
    reader = ChunkReader(snapshot.store, snapshot.packs, snapshot.chunks, cache=cache, stop=stop, threads=threads)

    def work() -> None:
        buffer = memoryview(mmap.mmap(-1, CHUNK))
        stream = reader.stream()
        try:
            while (item := stream.next(buffer)) is not None:
                number, view = item
                assert view == snapshot.data[number], number
                got.append(number)
        except BaseException as error:
            errors.append(error)
            stop.set()

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    reader.close()
    if errors:
        raise errors[0]
    assert sorted(got) == list(range(len(snapshot.chunks)))
    return reader
