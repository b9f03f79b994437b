"""Reading the chunk packs of a store and comparing them with what snapshots say of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from blake3 import blake3

from rewarm.errors import RewarmError

from .chunks import CHUNKS, ZSTD, Chunk, decode, pages
from .compression import decompress
from .entries import ChunkPack
from .packs import Place, Record, data_size, layout, raw_size, read_index

if TYPE_CHECKING:
    from .directory import DirectoryStore
    from .manifest import Manifest
    from .pack_file import PackFile

Progress = Callable[[int], None]


class _State(NamedTuple):
    """One pack: what its index says of each offset, the damaged chunks' offsets, and why it cannot be read, or ""."""

    size: int
    raw_size: int
    known: dict[int, tuple[Record, Place]]
    damaged: dict[int, str]
    problem: str


class ChunkPacks:
    """The packs read so far, each once."""

    def __init__(self, store: DirectoryStore, progress: Progress | None) -> None:
        self._store = store
        self._report = progress or (lambda count: None)
        self._known: dict[str, _State] = {}

    def problems(self, manifest: Manifest, where: str, *, table_is_bad: bool) -> Iterator[str]:
        """What is wrong with the chunks of a snapshot and the packs that it names; all of them are read.

        With `table_is_bad` it has been said already that the table cannot be read.
        """
        try:
            table = decode(self._store.read_file(manifest, CHUNKS), manifest.packs, where)
        except RewarmError as error:
            table = []
            if not table_is_bad:
                yield error.cause
        of_pack: defaultdict[int, list[tuple[int, Chunk]]] = defaultdict(list)
        for number, chunk in enumerate(table):
            of_pack[chunk.pack].append((number, chunk))
        for number, pack in enumerate(manifest.packs):
            yield from self._pack_problems(pack, of_pack[number])

    def _pack_problems(self, pack: ChunkPack, chunks: list[tuple[int, Chunk]]) -> Iterator[str]:
        if pack.digest not in self._known:
            self._known[pack.digest] = self._read(pack.digest)
        state = self._known[pack.digest]
        if state.problem:
            yield f"pack {pack.digest}: {state.problem}"
            return
        for name, found, said in (("", state.size, pack.size), ("raw ", state.raw_size, pack.raw_size)):
            if found != said:
                yield f"pack {pack.digest} has {found} {name}bytes, the manifest says {said}"
        if state.damaged:
            hit = [number for number, chunk in chunks if chunk.offset in state.damaged]
            shown = "; ".join(list(state.damaged.values())[:4]) + ("; …" if len(state.damaged) > 4 else "")
            mine = f"chunks {_numbers(hit)} of the snapshot" if hit else "none of the snapshot's chunks"
            yield f"pack {pack.digest} was changed: {shown}; it hits {mine}"
        wrong = [number for number, chunk in chunks if not _agrees(chunk, state)]
        if wrong:
            yield f"chunks {_numbers(wrong)} are not where the index of pack {pack.digest} says"

    def _read(self, digest: str) -> _State:
        try:
            pack = self._store.open_chunk_pack(digest)
        except RewarmError as error:
            return _State(0, 0, {}, {}, error.cause)
        damaged: dict[int, str] = {}
        try:
            records = read_index(pack.read, pack.size, digest)
            places = layout(records)
            for number, (record, place) in enumerate(zip(records, places, strict=True)):
                wrong = _chunk_problem(pack, record, place)
                if wrong:
                    damaged[place.offset] = f"its chunk {number} {wrong}"
                self._report(pages(record.stored))
            self._report(pack.size - data_size(records))
        except RewarmError as error:
            return _State(pack.size, 0, {}, {}, error.cause)
        finally:
            pack.close()
        known = {place.offset: (record, place) for record, place in zip(records, places, strict=True)}
        return _State(pack.size, raw_size(records), known, damaged, "")


def _chunk_problem(pack: PackFile, record: Record, place: Place) -> str:
    """What is wrong with the bytes of one chunk and the zeros behind it, or ""."""
    data = pack.read(place.offset, pages(record.stored))
    if len(data) != pages(record.stored):
        return "is cut off"
    if data[record.stored :].strip(b"\0"):
        return "has other bytes than zeros behind it"
    data = data[: record.stored]
    if record.encoding == ZSTD:
        try:
            data = decompress(data, record.size)
        except ValueError as error:
            return f"cannot be decompressed: {error}"
    return "" if blake3(data).digest() == record.digest else "does not have its digest"


def _agrees(chunk: Chunk, state: _State) -> bool:
    found = state.known.get(chunk.offset)
    if found is None:
        return False
    record, place = found
    return (chunk.digest, chunk.encoding, chunk.stored, chunk.size) == record and chunk.raw_offset == place.raw_offset


def _numbers(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
