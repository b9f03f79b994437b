"""Reading the chunks of a snapshot with many threads: each once, verified, as fast as storage and memory allow."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from rewarm.errors import RewarmError, SnapshotDamaged

from .cache import Busy, Fetch, PackCache
from .chunks import RAW, Chunk
from .files import Stop
from .parts import CACHE, COLD_PART, FETCH, PART, STORE, Part, divide
from .probe import Way
from .source import Source
from .stream import Straight, Stream

__all__ = ["ChunkReader", "Counters", "Stream"]

if TYPE_CHECKING:
    from .backend import Pack
    from .manifest import ChunkPack

COLD_STREAMS = 8
"""Streams at least for data that is not in memory: each has one read in flight, and storage needs several."""
STALLED = 2.0
"""Seconds to wait for a pack that another fetches into the cache and that does not grow: its fetcher hangs."""
_FEW = 8
"""Where one chunk of so many is compressed, or fewer, decompressing is not what takes the time."""
RECAPTURE = "capture it again"


class PackSource(Protocol):
    """What a store is to a reader."""

    def open_chunk_pack(self, digest: str) -> Pack:
        """A pack by its name. Raises SnapshotDamaged if it is missing, StoreError."""


class Counters:
    """What was read from where. Thread-safe."""

    def __init__(self, way: Way) -> None:
        self._lock = threading.Lock()
        self._way = way
        self.store_bytes = 0
        self.cache_bytes = 0
        self.cache_fault = ""
        """Why the cache was not used or given up; "" if it was not."""

    @property
    def direct(self) -> bool:
        """Whether the store's cold data was read with O_DIRECT in the end."""
        return self._way.direct

    def add(self, count: int, cached: bool) -> None:
        """`count` bytes were read."""
        with self._lock:
            if cached:
                self.cache_bytes += count
            else:
                self.store_bytes += count


class ChunkReader:
    """All chunks of one snapshot, over any number of streams; to be closed when every thread has ended."""

    def __init__(
        self,
        store: PackSource,
        packs: Sequence[ChunkPack],
        chunks: Sequence[Chunk],
        *,
        cache: PackCache | None = None,
        stop: Stop,
        threads: int,
        warm_part: int = PART,
    ) -> None:
        """`warm_part`: bytes of data in memory that a stream takes at a time, at most."""
        self.store, self.packs, self.chunks, self.cache, self.stop = store, packs, chunks, cache, stop
        self._threads = threads
        self._lock = threading.Lock()
        self._sources: dict[tuple[int, bool], Source] = {}
        self._ways = (Way(), Way())
        self.counters = Counters(self._ways[0])
        parts = self._plan(threads, warm_part)
        warm = self._is_warm(parts)
        self.cold = not warm
        """Whether the data has to come from storage."""
        self.parallel = threads if warm else max(threads, COLD_STREAMS)
        """Streams to run: `threads` where the data is in memory already, more where each read has to wait."""
        if not warm:
            parts = self._plan(self.parallel, COLD_PART)
        self._left = [0] * len(packs)
        for part in parts:
            self._left[part.pack] += 1
        self._parts = deque(parts)
        self._waiting: deque[Part] = deque()
        self._patient = True

    def __enter__(self) -> ChunkReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close every file. No stream may be in `next` any more."""
        with self._lock:
            for source in self._sources.values():
                source.close()
            self._sources.clear()

    @property
    def plain(self) -> bool:
        """Whether reading is nearly all that there is to do, beside verifying: nothing is fetched, and of few chunks
        only is anything compressed. To be asked before the first stream is."""
        with self._lock:
            stored = [number for part in self._parts if part.where == STORE for number in part.numbers]
            compressed = sum(self.chunks[number].encoding != RAW for number in stored)
            return all(part.where != FETCH for part in self._parts) and compressed <= len(self.chunks) // _FEW

    def stream(self, *, verify: bool = True, straight: Straight | None = None) -> Stream:
        """One thread's share of the work. Without `verify` what it gives may be anything: the caller compares the bytes
        with their digests before they are used, and has `again` for those that are wrong. `straight`, as there: without
        `verify` only, or it is not called."""
        return Stream(self, verify=verify, straight=straight)

    def again(self, numbers: Sequence[int]) -> Stream:
        """A stream of its own for these chunks, which reads them once more and verifies them."""
        where = STORE if self.cache is None else CACHE  # of what the cache does not have, a stream asks the store
        parts = divide(self.chunks, numbers, self._threads, where)
        with self._lock:
            for part in parts:
                self._left[part.pack] += 1
        return Stream(self, parts=parts)

    def parts(self) -> Iterator[Part]:
        """The work that nobody has taken yet; at the end packs that others are fetching, once they are there."""
        while not self.stop.is_set():
            with self._lock:
                part = self._parts.popleft() if self._parts else None
                late = self._waiting.popleft() if part is None and self._waiting else None
            if late is not None:
                self._wait(late)
                part = late
            if part is None:
                return
            yield part

    def source(self, pack: int, cached: bool) -> Source | None:
        """The open pack, or its open copy in the cache, None if there is none. Raises SnapshotDamaged, StoreError."""
        with self._lock:
            source = self._sources.get((pack, cached))
            if source is None:
                source = self._open_copy(self.packs[pack]) if cached else self._open(self.packs[pack])
                if source is not None:
                    self._sources[pack, cached] = source
            return source

    def done(self, part: Part) -> None:
        """A part was read; after its last the pack is closed, since a snapshot may have thousands."""
        closing = []
        with self._lock:
            self._left[part.pack] -= 1
            if self._left[part.pack] == 0:
                closing = [self._sources.pop((part.pack, cached), None) for cached in (False, True)]
        for source in closing:
            if source is not None:
                source.close()

    def split(self, part: Part, numbers: Sequence[int]) -> None:
        """Have these chunks of a part read by any stream, from the cache if the pack is there by now."""
        entry = self.packs[part.pack]
        held = self.cache is not None and self.cache.holds(entry.digest, entry.raw_size)
        parts = divide(self.chunks, numbers, self._threads, CACHE if held else STORE)
        with self._lock:
            self._left[part.pack] += len(parts)
            self._parts.extendleft(reversed(parts))

    def postpone(self, part: Part) -> None:
        """Another is fetching this pack: come back to it when all else is done."""
        with self._lock:
            self._left[part.pack] += 1
            self._waiting.append(part)

    def drop_copy(self, pack: int) -> None:
        """The cache's copy of a pack is not what it should be."""
        if self.cache is not None:
            self.cache.drop(self.packs[pack].digest)

    def label(self, number: int) -> str:
        """A chunk's name in errors."""
        return f"chunk {number} in pack {self.packs[self.chunks[number].pack].digest}"

    def begin_fetch(self, part: Part) -> Fetch | None:
        """Take it upon this stream to fetch a pack into the cache. None if it is there, or cannot be kept, or if who
        fetches it hangs. Raises Busy."""
        if self.cache is None:
            return None
        entry = self.packs[part.pack]
        try:
            return self.cache.begin(entry.digest, entry.raw_size, self._keep)
        except Busy:
            if self._patient:
                raise
            return None
        finally:
            self.counters.cache_fault = self.cache.fault

    def _plan(self, threads: int, most: int) -> list[Part]:
        every = range(len(self.chunks))
        if self.cache is None:
            return divide(self.chunks, every, threads, STORE, most)
        self._keep = frozenset(pack.digest for pack in self.packs)
        numbers: tuple[list[int], list[int], list[int]] = ([], [], [])
        fits = [pack.raw_size <= self.cache.limit for pack in self.packs]
        where = [
            (CACHE if self.cache.holds(pack.digest, pack.raw_size) else FETCH) if fit else STORE
            for pack, fit in zip(self.packs, fits, strict=True)
        ]
        for number in every:
            numbers[where[self.chunks[number].pack]].append(number)
        # What has to come from the store first: the rest is quick, and best spread over the streams at the end.
        fetched = divide(self.chunks, numbers[FETCH], 1, FETCH)
        return [
            *fetched,
            *divide(self.chunks, numbers[STORE], threads, STORE, most),
            *divide(self.chunks, numbers[CACHE], threads, CACHE, most),
        ]

    def _wait(self, part: Part) -> None:
        """Until the pack is there, or nobody fetches it, or whoever does hangs."""
        cache, entry = self.cache, self.packs[part.pack]
        assert cache is not None
        seen, since = -1, time.monotonic()
        while self._patient and not self.stop.is_set() and not cache.holds(entry.digest, entry.raw_size):
            grown = cache.progress(entry.digest)
            if grown < 0:
                return
            if grown != seen:
                seen, since = grown, time.monotonic()
            elif time.monotonic() - since > STALLED:
                self._patient = False  # and do not wait as long for each of the others
            time.sleep(0.01)

    def _open(self, wanted: ChunkPack) -> Source:
        pack = self.store.open_chunk_pack(wanted.digest)
        if pack.size != wanted.size:
            size = pack.size
            pack.close()
            cause = f"has {size} bytes, and the manifest says {wanted.size}"
            raise SnapshotDamaged("open pack", wanted.digest, cause, RECAPTURE)
        return Source(pack, int(getattr(pack, "fd", -1)), self._ways[0])

    def _open_copy(self, wanted: ChunkPack) -> Source | None:
        fd = self.cache.open(wanted.digest, wanted.raw_size) if self.cache is not None else -1
        return Source(None, fd, self._ways[1]) if fd >= 0 else None

    def _is_warm(self, parts: Sequence[Part]) -> bool:
        """Whether a few places are in memory: the first, the last and one between."""
        try:
            for part in (parts[index] for index in (0, len(parts) // 2, -1) if parts):
                source = self.source(part.pack, part.where == CACHE)
                if source is None or not source.at_hand(part.start):
                    return False
        except (RewarmError, OSError):
            pass  # the stream that reads there says what is wrong
        return True
