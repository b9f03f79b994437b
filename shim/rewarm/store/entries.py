"""What a manifest says of files and packs, and what must be true of them together."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from . import fields
from .chunks import CHUNKS, PAGE
from .fields import Bad, Reader
from .packs import MAX_RAW, size_limits

LARGE = 1 << 20
"""A file of this many bytes or more is a pack of its own; smaller ones share a pack."""
MAX_SHARED = 1 << 30
"""All small files of a snapshot together. Real ones have a few MB."""

_DIGEST = re.compile(r"[0-9a-f]{64}\Z")
_FILE_NAME = re.compile(r"[A-Za-z0-9._/-]{1,512}\Z")


class FileEntry(NamedTuple):
    """One file: `size` bytes at `offset` (bytes) of pack `pack`; `digest` and `pack` are BLAKE3-256 hex."""

    name: str
    size: int
    digest: str
    pack: str
    offset: int

    @property
    def whole_pack(self) -> bool:
        """Whether the file is all of its pack, so that the pack can stand in for it."""
        return self.pack == self.digest


class ChunkPack(NamedTuple):
    """A pack of chunks (packs.py) by its name: `size` bytes in all, `raw_size` bytes in its raw layout."""

    digest: str
    size: int
    raw_size: int


def is_digest(text: str) -> bool:
    """Whether `text` is a digest as the store writes them: 64 lower-case hex digits, so no `/` and no `..`."""
    return _DIGEST.match(text) is not None


def check_file_name(name: str) -> str:
    """What is wrong with a file name inside a snapshot, or ""."""
    if not _FILE_NAME.match(name):
        return "has characters other than A-Z a-z 0-9 . _ / - or is too long"
    parts = name.split("/")
    if "" in parts or "." in parts or ".." in parts:
        return "is not a plain relative path"
    if any(len(part) > 255 for part in parts):
        return "has a component of more than 255 characters"
    return ""


def read_file_entry(reader: Reader) -> FileEntry:
    """One of `files`. Raises Bad."""
    entry = FileEntry(
        name=reader.text("name", 512),
        size=reader.integer("size"),
        digest=_digest(reader, "digest"),
        pack=_digest(reader, "pack"),
        offset=reader.integer("offset"),
    )
    reader.done()
    if entry.offset + entry.size > fields.MAX_I64:
        raise Bad(f"field {reader.path('offset')} is too large")
    if entry.whole_pack and entry.offset:
        raise Bad(f"field {reader.path('offset')} must be 0 for a file that is a pack of its own")
    if entry.size >= LARGE and not entry.whole_pack:
        raise Bad(f"field {reader.path('pack')} must equal digest for a file of {LARGE} bytes or more")
    return entry


def read_chunk_pack(reader: Reader) -> ChunkPack:
    """One of `packs`. Raises Bad."""
    pack = ChunkPack(
        digest=_digest(reader, "digest"), size=reader.integer("size"), raw_size=reader.integer("raw_size", MAX_RAW)
    )
    reader.done()
    if not pack.raw_size or pack.raw_size % PAGE:
        raise Bad(f"field {reader.path('raw_size')} is not a multiple of {PAGE} above 0")
    least, most = size_limits(pack.raw_size)
    if not least <= pack.size <= most:
        raise Bad(f"field {reader.path('size')} must be in {least}..{most} for {pack.raw_size} raw bytes")
    return pack


def _digest(reader: Reader, key: str) -> str:
    digest = reader.text(key, 64)
    if not is_digest(digest):
        raise Bad(f"field {reader.path(key)} is not a BLAKE3 digest of 64 hex digits: {digest!r}")
    return digest


def check_files(entries: Sequence[FileEntry]) -> None:
    """Names that can all be made in one directory, at places that can all be true. Raises Bad."""
    names = set()
    for index, entry in enumerate(entries):
        problem = check_file_name(entry.name)
        if problem:
            raise Bad(f"field files[{index}].name {problem}: {entry.name[:80]!r}")
        if entry.name in names:
            raise Bad(f"field files[{index}].name is there twice: {entry.name[:80]!r}")
        names.add(entry.name)
    for name in names:
        parents = name.split("/")[:-1]
        for depth in range(1, len(parents) + 1):
            if "/".join(parents[:depth]) in names:
                raise Bad(f"field files has {name[:80]!r} and one of its parents as a file")
    _check_shared_packs(entries)


def _check_shared_packs(entries: Sequence[FileEntry]) -> None:
    """Files must lie in a shared pack one after the other, from its beginning.

    Overlapping ones would let a small pack fill a disk when the files are taken out of it.
    """
    ends: dict[str, int] = {}
    whole: dict[str, int] = {}
    for entry in entries:
        if entry.whole_pack and whole.setdefault(entry.pack, entry.size) != entry.size:
            raise Bad(f"field files: {entry.name[:80]!r} gives its pack another size than a file before it")
    # Empty files take no place, and do not turn the only other file's pack into a shared one.
    shared = [entry for entry in entries if entry.size and not entry.whole_pack]
    for entry in sorted(shared, key=lambda entry: entry.offset):
        if entry.offset != ends.get(entry.pack, 0) or entry.pack in whole:
            raise Bad(f"field files: the place of {entry.name[:80]!r} in its pack is not right after another file's")
        ends[entry.pack] = entry.offset + entry.size
    if sum(ends.values()) > MAX_SHARED:
        raise Bad(f"field files: more than {MAX_SHARED} bytes in small files")


def check_packs(packs: Sequence[ChunkPack], entries: Sequence[FileEntry]) -> None:
    """Each pack once and none that holds files, and a chunk table exactly where there are packs. Raises Bad."""
    seen = {entry.pack for entry in entries}
    for index, pack in enumerate(packs):
        if pack.digest in seen:
            raise Bad(f"field packs[{index}].digest is there twice, or is a pack of files: {pack.digest}")
        seen.add(pack.digest)
    if bool(packs) != any(entry.name == CHUNKS for entry in entries):
        raise Bad(f"field packs has {len(packs)} entries, and files has {'no' if packs else 'a'} {CHUNKS!r}")
