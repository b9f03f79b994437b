"""Writing the chunks of one snapshot into packs, from many threads at once.

Hashing, compressing and writing happen in the threads that bring the chunks; only places and numbers are given out
under a lock. A pack that is full gets its index and goes to disk in the background. Nothing is visible before the
snapshot's writer has moved the packs to their places.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from blake3 import blake3

from rewarm.errors import StoreError

from .chunks import CHUNK, PAGE, RAW, ZSTD, Chunk, encode, pages
from .compression import Sample, compressor, decompress, worth
from .entries import ChunkPack
from .file_writer import NewPack
from .files import store_error
from .known import Found, KnownChunks
from .packs import MAX_RAW, Record, data_size, footer_bytes, index_bytes, layout, name_of, raw_size

SMALLEST = 8 << 20
"""Raw bytes of a pack of a small capture; `expect`."""
SPREAD = 32
"""Packs that a capture is spread over at least, so that 16 threads have work to the end of a restore."""
SAMPLES = 2
"""Chunks of a large pack that are compressed to decide about the others; of a small one it is the first."""
_SYNCERS = 2

Bytes = bytes | memoryview


class Written(NamedTuple):
    """What became of the chunks: their table, the packs that it names, and those of them that are new."""

    table: bytes
    packs: tuple[ChunkPack, ...]
    new: tuple[NewPack, ...]


class _Pack:
    """A pack that is being filled. What changes, but `fd`, is under the writer's lock."""

    def __init__(self, path: Path, fd: int, samples: int) -> None:
        self.path = path
        self.fd = fd
        self.samples = samples
        self.records: list[Record] = []
        self.end = 0
        self.promised = 0
        """Raw bytes of the chunks that are or will be in it."""
        self.pending = 0
        """Chunks that are promised and not yet written."""
        self.sealed = False
        self.compress: bool | None = None
        self.sampling = 0
        self.sample = Sample(0, 0, 0.0)
        self.sampled = 0
        self.done: Future[tuple[NewPack, ChunkPack]] | None = None


class _Slot:
    """One distinct chunk of the snapshot: in a pack of its own, or found in another's."""

    __slots__ = ("found", "pack", "row")

    def __init__(self) -> None:
        self.pack: _Pack | None = None
        self.row = 0
        self.found: Found | None = None


class ChunkWriter:
    """Packs chunks into files of `directory`. `rate` measures the store's reading, once, where it matters."""

    def __init__(
        self, directory: Path, known: KnownChunks, compression: str, threads: int, rate: Callable[[], float]
    ) -> None:
        self._directory = directory
        self._known = known
        self._compression = compression
        self._threads = threads
        self._measure_rate = rate
        self._rate: float | None = None
        self._rate_lock = threading.Lock()
        self._changed = threading.Condition()
        self._target = MAX_RAW
        self._slots: list[_Slot] = []
        self._distinct: dict[bytes, _Slot] = {}
        self._packs: list[_Pack] = []
        self._current: _Pack | None = None
        self._busy = 0
        self._failed: BaseException | None = None
        self._closed = False
        self._local = threading.local()
        self._syncers: ThreadPoolExecutor | None = None

    def expect(self, total: int) -> None:
        """So many bytes will come: packs begun from now on are smaller if these are few."""
        wanted = -(-max(0, total) // SPREAD)
        with self._changed:
            self._target = min(MAX_RAW, max(SMALLEST, -(-wanted // CHUNK) * CHUNK))

    def add(self, data: Bytes) -> int:
        """See SnapshotWriter.add_chunk."""
        with memoryview(data).cast("B") as view:
            size = len(view)
            if not 0 < size <= CHUNK or size % PAGE:
                raise StoreError("add chunk", f"of {size} bytes", f"must have a multiple of {PAGE} bytes up to {CHUNK}")
            digest = blake3(view).digest()
            with self._changed:
                self._check_usable()
                number = len(self._slots)
                slot = self._distinct.get(digest)
                if slot is not None:
                    self._slots.append(slot)
                    return number
                slot = self._distinct[digest] = _Slot()
                self._slots.append(slot)
                self._busy += 1
            try:
                slot.found = self._known.find(digest, size)
                if slot.found is None:
                    self._store(slot, digest, view)
            except BaseException as error:
                # Equal chunks have been given numbers that lead here: nothing of this snapshot can be published.
                with self._changed:
                    self._failed = self._failed or error
                raise
            finally:
                with self._changed:
                    self._busy -= 1
                    self._changed.notify_all()
            return number

    def finish(self) -> Written:
        """Put everything on disk. Raises StoreError, also if an `add` failed or is still running."""
        with self._changed:
            self._check_usable()
            if self._busy:
                raise StoreError("write chunks", str(self._directory), f"{self._busy} of them are still being added")
            self._closed = True
            last, self._current = self._current, None
            if last is not None:
                last.sealed = True
        if last is not None:
            self._complete(last)
        new = {}
        for pack in self._packs:
            assert pack.done is not None
            new[pack] = pack.done.result()
        return self._table(new)

    def close(self) -> None:
        """End what runs in the background and close the files; they are the workspace's to delete."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            # A thread that still writes must not find another file under its descriptor's number.
            while self._busy:
                self._changed.wait()
        if self._syncers is not None:
            self._syncers.shutdown(wait=True, cancel_futures=True)
        for pack in self._packs:
            _close(pack)

    def _check_usable(self) -> None:
        if self._failed is not None:
            # Of many threads the caller may hear this one first: it has to say what the matter is.
            cause, step = repr(self._failed), ""
            if isinstance(self._failed, StoreError):
                cause, step = self._failed.cause, self._failed.next_step
            raise StoreError("add chunk", str(self._directory), f"one before it could not be written: {cause}", step)
        if self._closed:
            raise StoreError("add chunk", str(self._directory), "the writer has finished")

    def _store(self, slot: _Slot, digest: bytes, data: memoryview) -> None:
        pack, full = self._reserve(len(data))
        if full is not None:
            self._complete(full)
        encoding, stored = self._encode(pack, data)
        with self._changed:
            slot.pack, slot.row = pack, len(pack.records)
            offset = pack.end
            pack.records.append(Record(digest, encoding, len(stored), len(data)))
            pack.end += pages(len(stored))
        _write(pack, stored, offset)
        with self._changed:
            pack.pending -= 1
            complete = pack.sealed and not pack.pending
        if complete:
            self._complete(pack)

    def _reserve(self, size: int) -> tuple[_Pack, _Pack | None]:
        """The pack for the next chunk, and one that became full by that and waits for no chunk any more."""
        with self._changed:
            self._check_usable()
            full = None
            pack = self._current
            if pack is not None and pack.promised + size > self._target:
                pack.sealed = True
                full = None if pack.pending else pack
                pack = self._current = None
            if pack is None:
                pack = self._current = self._create()
            pack.promised += size
            pack.pending += 1
            return pack, full

    def _create(self) -> _Pack:
        path = self._directory / f"chunks{len(self._packs)}"
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o400)
        except OSError as error:
            raise store_error("create", path, error) from None
        pack = _Pack(path, fd, min(SAMPLES, max(1, self._target // (8 * CHUNK))))
        self._packs.append(pack)
        return pack

    def _encode(self, pack: _Pack, data: memoryview) -> tuple[int, Bytes]:
        """How the chunk is stored. The first chunks of a pack are measured, the others wait for the decision."""
        if self._compression == "off":
            return RAW, data
        if self._compression == "auto":
            with self._changed:
                sampling = pack.sampling < pack.samples
                pack.sampling += sampling
                while not sampling and pack.compress is None:
                    if self._failed or self._closed:
                        self._check_usable()
                    self._changed.wait()
                compress = pack.compress
            if sampling:
                return self._measure(pack, data)
            if not compress:
                return RAW, data
        return self._smaller(self._compress(data), data)

    def _measure(self, pack: _Pack, data: memoryview) -> tuple[int, Bytes]:
        frame = self._compress(data)
        stored = pages(len(frame))
        seconds = _seconds_to_undo(frame, len(data)) if stored < len(data) else 0.0
        sample = Sample(len(data), stored, seconds)
        rate = self._store_rate()
        with self._changed:
            pack.sample = pack.sample.plus(sample)
            pack.sampled += 1
            if pack.sampled == pack.samples:
                pack.compress = worth(pack.sample, rate, self._threads)
                self._changed.notify_all()
        return self._smaller(frame, data) if worth(sample, rate, self._threads) else (RAW, data)

    def _smaller(self, frame: bytes, data: memoryview) -> tuple[int, Bytes]:
        return (ZSTD, frame) if pages(len(frame)) < len(data) else (RAW, data)

    def _compress(self, data: memoryview) -> bytes:
        mine: Any = getattr(self._local, "compressor", None)
        if mine is None:
            mine = self._local.compressor = compressor()
        frame: bytes = mine.compress(data)
        return frame

    def _store_rate(self) -> float:
        with self._rate_lock:
            if self._rate is None:
                try:
                    self._rate = self._measure_rate()
                except StoreError:
                    self._rate = 0.0  # nothing is compressed; what is wrong shows when the chunks are written
            return self._rate

    def _complete(self, pack: _Pack) -> None:
        """Write the index of a pack that gets no chunks any more, and send it to disk."""
        index = index_bytes(pack.records)
        _write(pack, index + footer_bytes(pack.end), pack.end)
        with self._changed:
            if self._syncers is None:
                self._syncers = ThreadPoolExecutor(_SYNCERS, "rewarm-sync")
            pack.done = self._syncers.submit(_sync, pack, name_of(index))

    def _table(self, new: dict[_Pack, tuple[NewPack, ChunkPack]]) -> Written:
        places = {pack: layout(pack.records) for pack in new}
        packs: dict[str, ChunkPack] = {pack.digest: pack for _, pack in new.values()}
        for slot in self._slots:
            if slot.found is not None:
                packs.setdefault(slot.found.pack.digest, slot.found.pack)
        number = {digest: index for index, digest in enumerate(packs)}
        chunks = []
        for slot in self._slots:
            if slot.found is not None:
                digest, record, place = slot.found.pack.digest, slot.found.record, slot.found.place
            else:
                assert slot.pack is not None
                digest = new[slot.pack][0].digest
                record, place = slot.pack.records[slot.row], places[slot.pack][slot.row]
            chunk = Chunk(
                record.digest,
                number[digest],
                record.encoding,
                place.offset,
                record.stored,
                record.size,
                place.raw_offset,
            )
            chunks.append(chunk)
        return Written(encode(chunks), tuple(packs.values()), tuple(written for written, _ in new.values()))


def _seconds_to_undo(frame: bytes, size: int) -> float:
    """Seconds of this thread, not of the clock: the other threads have the processors too."""
    best = float("inf")
    for _ in range(2):  # the first time also pays for memory that is not there yet
        begin = time.thread_time()
        decompress(frame, size)
        best = min(best, time.thread_time() - begin)
    return best


def _write(pack: _Pack, data: Bytes, offset: int) -> None:
    try:
        with memoryview(data) as view:
            done = 0
            while done < len(view):
                done += os.pwrite(pack.fd, view[done:], offset + done)
    except OSError as error:
        raise store_error("write", pack.path, error) from None


def _sync(pack: _Pack, digest: str) -> tuple[NewPack, ChunkPack]:
    try:
        os.fsync(pack.fd)
        status = os.fstat(pack.fd)
    except OSError as error:
        raise store_error("write", pack.path, error) from None
    finally:
        _close(pack)
    size = data_size(pack.records) + len(index_bytes(pack.records)) + len(footer_bytes(0))
    if status.st_size != size:
        raise StoreError("write", str(pack.path), f"has {status.st_size} bytes instead of {size}")
    return NewPack(pack.path, digest, size, status.st_mtime_ns), ChunkPack(digest, size, raw_size(pack.records))


def _close(pack: _Pack) -> None:
    if pack.fd >= 0:
        os.close(pack.fd)
        pack.fd = -1
