"""One thread's share of a snapshot's chunks: read, decompressed and verified in the caller's buffer."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from blake3 import blake3

from rewarm.errors import RewarmError, SnapshotDamaged

from .cache import Busy
from .chunks import CHUNK, RAW, Chunk
from .files import Short, store_error
from .packs import layout, read_index
from .parts import CACHE, FETCH, Part

if TYPE_CHECKING:
    from .inflate import Inflater
    from .reader import ChunkReader
    from .source import Source

Steps = Generator[tuple[Sequence[int], memoryview], memoryview, memoryview]
"""Chunks come out, buffers go in: the answer to chunks is the buffer for the next ones, and so is the result."""

Run = tuple[int, Sequence[int]]
"""An offset in a file, and the numbers of the chunks of CHUNK bytes that lie there one after the other."""
Straight = Callable[[int, Sequence[Run]], tuple[int, bool, memoryview]]
"""Who reads itself what is in memory as it is: called with a descriptor and runs of it, none of which has more bytes
than the buffer, it takes the first ones, as long as the page cache has them. How many of them, whether the file system
can say what it has, and the buffer for what comes next."""

_WRONG = "its bytes are not what its digest says"
_NOTHING: Sequence[int] = ()
"""The numbers of no chunk."""


class _Bad(Exception):
    """A chunk that is not what it should be; the argument says why."""


class Stream:
    """One thread's share of the chunks."""

    def __init__(
        self,
        reader: ChunkReader,
        *,
        verify: bool = True,
        parts: Sequence[Part] | None = None,
        straight: Straight | None = None,
    ) -> None:
        self._reader = reader
        self._verify = verify
        # Nobody verifies what goes past this stream.
        self._straight = None if verify else straight
        self._parts = parts
        self._scratch: memoryview | None = None
        self._inflater: Inflater | None = None
        self._steps: Steps | None = None
        self._fetching = self._hurried = False

    def next(self, buffer: memoryview) -> tuple[int, memoryview] | None:
        """The next chunk that nobody else has taken: its number, and its bytes inside `buffer`, verified unless this
        stream was made without.

        `buffer` is CHUNK bytes, writable, at a page boundary. None at the end of the work, when `stop` is set, and
        after an error. Raises SnapshotDamaged and StoreError, which name the chunk and the pack.
        """
        item = self.next_run(buffer[:CHUNK])
        return None if item is None else (item[0][0], item[1])

    def next_run(self, buffer: memoryview) -> tuple[Sequence[int], memoryview] | None:
        """As `next`, with a buffer of several times CHUNK: chunks that lie one after the other where they are read, and
        that are in memory there, come at once, one after the other."""
        try:
            if self._steps is None:
                self._steps = self._run(buffer)
                return next(self._steps)
            return self._steps.send(buffer)
        except StopIteration:
            return None

    def finish(self) -> None:
        """Bring the pack that is being fetched into the cache as a whole: who is about to wait, and for how long it
        does not know, has others wait for it else. Its chunks come from there later. Raises as `next` does."""
        if self._steps is not None and self._fetching:
            self._hurried = True
            with suppress(StopIteration):
                self._steps.send(memoryview(mmap.mmap(-1, CHUNK)))

    def close(self) -> None:
        """Give up what was begun; only for a stream whose `next` did not come to None."""
        if self._steps is not None:
            self._steps.close()

    def _run(self, buffer: memoryview) -> Steps:
        for part in self._reader.parts() if self._parts is None else self._parts:
            buffer = yield from (self._fetch if part.where == FETCH else self._read)(part, buffer)
            self._reader.done(part)
        return buffer

    def _read(self, part: Part, buffer: memoryview) -> Steps:
        reader = self._reader
        stop = reader.stop
        numbers, at = part.numbers, 0
        run = numbers[:1]
        most = len(buffer) // CHUNK
        read = 0
        source, cached = None, part.where == CACHE
        try:
            if cached:
                source = reader.source(part.pack, True)
            if source is None:
                source, cached = self._store(part.pack), False
            cold = self._begin(source, part, cached)
            while at < len(numbers) and not stop.is_set():
                if self._straight is not None and not cold and source.descriptor >= 0:
                    runs = self._as_they_are(numbers, at, cached, most)
                    if runs:
                        done, able, buffer = self._straight(source.descriptor, runs)
                        count = sum(len(run) for _, run in runs[:done])
                        at, read = at + count, read + count * CHUNK
                        cold = source.asked(able, done == len(runs))
                        continue
                run = self._next_to_each_other(numbers, at, cached, 1 if cold else most)
                try:
                    size, stored, cold = self._load_run(source, run, cached, cold, buffer)
                except (OSError, Short, _Bad):
                    if not cached and len(run) == 1:
                        raise
                    if not cached:
                        most = 1  # which of them it is
                        continue
                    # The store has it still, and this copy cannot be trusted with the rest of the part either.
                    reader.drop_copy(part.pack)
                    reader.counters.add(read, cached)
                    source, cached, read, cold = self._store(part.pack), False, 0, False
                    continue
                read += stored
                at += len(run)
                buffer = yield run, buffer[:size]
        except (OSError, Short, _Bad) as error:
            raise self._error(error, run[0]) from None
        finally:
            reader.counters.add(read, cached)
        return buffer

    def _next_to_each_other(self, numbers: Sequence[int], at: int, cached: bool, most: int) -> Sequence[int]:
        """The chunks from the one at `at` on that one read brings, `most` at most; the first in any case."""
        chunks = self._reader.chunks
        end = at + 1
        while end - at < most and end < len(numbers):
            last, chunk = chunks[numbers[end - 1]], chunks[numbers[end]]
            if last.size != CHUNK or not (cached or last.encoding == chunk.encoding == RAW):
                break
            before, here = (last.raw_offset, chunk.raw_offset) if cached else (last.offset, chunk.offset)
            if here != before + CHUNK:
                break
            end += 1
        return numbers[at:end]

    def _as_they_are(self, numbers: Sequence[int], at: int, cached: bool, most: int) -> list[Run]:
        """The chunks from the one at `at` on, up to one that is compressed or shorter."""
        chunks = self._reader.chunks
        found: list[Run] = []
        while at < len(numbers):
            run = self._next_to_each_other(numbers, at, cached, most)
            first, last = chunks[run[0]], chunks[run[-1]]
            if last.size != CHUNK or not (cached or first.encoding == RAW):
                break
            found.append((first.raw_offset if cached else first.offset, run))
            at += len(run)
        return found

    def _load_run(
        self, source: Source, run: Sequence[int], cached: bool, cold: bool, buffer: memoryview
    ) -> tuple[int, int, bool]:
        """These chunks in `buffer`: their bytes, what was read for them, and whether the next one is cold. Raises as
        _load does."""
        chunks = self._reader.chunks
        chunk = chunks[run[0]]
        if len(run) == 1:
            encoding, offset = (RAW, chunk.raw_offset) if cached else (chunk.encoding, chunk.offset)
            cold = self._load(source, chunk, encoding, offset, cold, buffer, self._verify)
            return chunk.size, chunk.size if cached else chunk.stored, cold
        size = CHUNK * (len(run) - 1) + chunks[run[-1]].size
        cold = source.read(buffer, size, chunk.raw_offset if cached else chunk.offset, cold)
        if self._verify:
            for at, number in enumerate(run):
                view = buffer[at * CHUNK :][: chunks[number].size]
                if blake3(view).digest() != chunks[number].digest:
                    raise _Bad(_WRONG)
        return size, size, cold

    def _begin(self, source: Source, part: Part, cached: bool) -> bool:
        """Whether the storage has to be read; of a copy that cannot even say so, reading its first chunk tells."""
        try:
            return source.begin(part.start, part.end - part.start)
        except OSError:
            if not cached:
                raise
            return True

    def _fetch(self, part: Part, buffer: memoryview) -> Steps:
        """Read the whole pack, of which the snapshot may want only some chunks, and keep it in the cache."""
        reader = self._reader
        try:
            fetch = reader.begin_fetch(part)
        except Busy:
            reader.postpone(part)
            return buffer
        if fetch is None:
            reader.split(part, part.numbers)
            return buffer
        number = part.numbers[0]
        read = 0
        cold = False
        later: list[int] = []
        self._fetching = True
        try:
            source = self._store(part.pack)
            wanted = self._wanted(part, source)
            last = wanted[-1][0] if wanted else None
            for chunk, numbers in wanted:
                if reader.stop.is_set():
                    return buffer
                number = numbers[0] if numbers else -1
                cold = self._load(source, chunk, chunk.encoding, chunk.offset, cold, buffer)
                read += chunk.stored
                fetch.write(buffer[: chunk.size], chunk.raw_offset)
                if chunk is last:
                    # At once: with the chunks that are read ahead this thread waits, and others with it for the pack.
                    fetch.commit()
                for at, number in enumerate(numbers):
                    if self._hurried:
                        later += numbers[at:]
                        break
                    if number != numbers[0]:  # the same bytes again, but the buffer may be another
                        cold = self._load(source, chunk, chunk.encoding, chunk.offset, cold, buffer)
                        read += chunk.stored
                    buffer = yield (number,), buffer[: chunk.size]
            if not wanted:
                reader.split(part, part.numbers)
            elif later:
                reader.split(part, later)
        except (OSError, Short, _Bad) as error:
            if number >= 0:
                raise self._error(error, number) from None
            # The snapshot does not need this chunk: only the cache cannot have the pack.
            later += [number for after, numbers in wanted if after.offset > chunk.offset for number in numbers]
            reader.split(part, later)
        finally:
            fetch.abandon()
            self._fetching = False
            reader.counters.add(read, False)
        if self._hurried:
            self._hurried = False
            buffer = yield _NOTHING, buffer
        return buffer

    def _wanted(self, part: Part, source: Source) -> list[tuple[Chunk, list[int]]]:
        """Every chunk of the pack with the numbers it has in this snapshot; nothing if the pack's index is damaged or
        not what the snapshot's table says, in which case only single chunks can be trusted."""
        entry = self._reader.packs[part.pack]
        try:
            records = read_index(source.bytes, entry.size, entry.digest)
        except SnapshotDamaged:
            return []
        whole: dict[int, tuple[Chunk, list[int]]] = {}
        for (digest, encoding, stored, size), (offset, raw_offset) in zip(records, layout(records), strict=True):
            whole[offset] = Chunk(digest, part.pack, encoding, offset, stored, size, raw_offset), []
        for number in part.numbers:
            chunk = self._reader.chunks[number]
            found = whole.get(chunk.offset)
            if found is None or found[0] != chunk:
                return []
            found[1].append(number)
        return list(whole.values())

    def _store(self, pack: int) -> Source:
        source = self._reader.source(pack, False)
        assert source is not None
        return source

    def _load(
        self,
        source: Source,
        chunk: Chunk,
        encoding: int,
        offset: int,
        cold: bool,
        buffer: memoryview,
        verify: bool = True,
    ) -> bool:
        """The chunk's raw bytes in `buffer`, verified; `cold` for the next one. Raises OSError, Short, _Bad."""
        view = buffer[: chunk.size]
        if encoding == RAW:
            cold = source.read(buffer, chunk.size, offset, cold)
        else:
            scratch = self._room()
            cold = source.read(scratch, chunk.stored, offset, cold)
            wrong = self._inflate(scratch[: chunk.stored], view)
            if wrong:
                raise _Bad(wrong)
        if verify and blake3(view).digest() != chunk.digest:
            raise _Bad(_WRONG)
        return cold

    def _error(self, error: Exception, number: int) -> RewarmError:
        label = self._reader.label(number)
        if isinstance(error, OSError):
            return store_error("read memory", label, error)
        cause = f"the pack ends at byte {error.args[0]}" if isinstance(error, Short) else str(error)
        return SnapshotDamaged("read memory", label, cause, "capture it again")

    def _room(self) -> memoryview:
        if self._scratch is None:
            # A mapping begins at a page boundary, which O_DIRECT wants.
            self._scratch = memoryview(mmap.mmap(-1, CHUNK))
        return self._scratch

    def _inflate(self, data: memoryview, into: memoryview) -> str:
        if self._inflater is None:
            from .inflate import Inflater  # only a snapshot with compressed chunks pays for zstandard

            self._inflater = Inflater()
        return self._inflater.inflate(data, into)
