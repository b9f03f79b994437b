"""Snapshots with chunks of memory, for tests of the store."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path

from rewarm.store.chunks import CHUNKS, Chunk, decode
from rewarm.store.compression import decompress
from rewarm.store.directory import DirectoryStore, SnapshotRef
from rewarm.store.manifest import Manifest
from support.snapshots import manifest

KIB = 1024


def noise(size: int, seed: int) -> bytes:
    """`size` bytes that nothing compresses, the same for the same seed."""
    return random.Random(seed).randbytes(size)


def text(size: int, seed: int) -> bytes:
    """`size` bytes that compress well, the same for the same seed."""
    return (f"{seed} is the seed of this line\n".encode() * (size // 20))[:size]


def some(count: int, size: int = 64 * KIB, seed: int = 1) -> list[bytes]:
    """Chunks that differ."""
    return [noise(size, seed * 1000 + number) for number in range(count)]


def write_chunks(
    store: DirectoryStore,
    chunks: Iterable[bytes],
    name: str = "model",
    compression: str = "off",
    namespace: str = "default",
) -> tuple[SnapshotRef, Manifest]:
    """Publish a snapshot of these chunks, and a small file."""
    with store.writer(namespace, name, compression=compression) as writer:
        for chunk in chunks:
            writer.add_chunk(chunk)
        writer.add_bytes("checkpoint/core-1.img", b"core of " + name.encode())
        return writer.publish(manifest(name, namespace))


def table(store: DirectoryStore, found: Manifest) -> list[Chunk]:
    """The snapshot's chunk table."""
    return decode(store.read_file(found, CHUNKS), found.packs, found.name)


def read_chunks(store: DirectoryStore, found: Manifest) -> list[bytes]:
    """The raw bytes of all chunks."""
    result = []
    for chunk in table(store, found):
        pack = store.open_chunk_pack(found.packs[chunk.pack].digest)
        data = pack.read(chunk.offset, chunk.stored)
        pack.close()
        result.append(decompress(data, chunk.size) if chunk.encoding else data)
    return result


def pack_paths(store: DirectoryStore, found: Manifest) -> list[Path]:
    """Where the snapshot's chunk packs lie."""
    return [store.pack_path(pack.digest) for pack in found.packs]


def flip(path: Path, offset: int) -> None:
    """Change one byte in place."""
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))
