"""The memory of one snapshot on its way back, as far as neither CRIU nor the driver brings it: tables from the store,
chunks from store or cache, the fill of processes, the load of GPUs."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from rewarm import node, processes, slots
from rewarm.criu import images
from rewarm.errors import RestoreError, SnapshotDamaged
from rewarm.memory import places, plan
from rewarm.memory.fill import Fill
from rewarm.memory.places import PLACES, Place
from rewarm.oci import cgroups
from rewarm.settings import Settings
from rewarm.store import chunks
from rewarm.store.cache import cache_for
from rewarm.store.directory import DirectoryStore, SnapshotRef
from rewarm.store.manifest import Manifest
from rewarm.store.parts import PART
from rewarm.store.reader import ChunkReader
from rewarm.trace import Trace

if TYPE_CHECKING:
    from rewarm.gpu.host import Opening
    from rewarm.gpu.load import Load

_NEXT_STEP = "capture it again"
_DEVICE_PART, _ROUNDS = 32 << 20, 8
"""Bytes of device memory that a thread takes at a time, at most, and how many times it does at least: the rest of a
restore goes on while threads copy, and waits while one looks for more (Python's lock)."""


class CarvedMemory:
    """Made by `load`. `start`, `check`, `hurry`, `release`, `join` in this order, or `abandon` at any time."""

    def __init__(
        self,
        ref: SnapshotRef,
        manifest: Manifest,
        where: list[Place],
        reader: ChunkReader,
        fill: Fill,
        device: Load | None,
    ) -> None:
        self._ref = ref
        self._manifest = manifest
        self._places = where
        self._reader = reader
        self._fill = fill
        self.device = device
        """Device memory, which who maps it into the processes joins."""
        self._alive: dict[int, int | None] = {}

    def start(self) -> None:
        """Start to read. Raises RestoreError if no thread can be made."""
        if self.device is not None:
            self.device.start()
        self._fill.start()

    def hurry(self) -> None:
        """Read with all threads, now that nothing is left to prepare. Raises RestoreError."""
        self._fill.hurry()

    def check(self, directory: Path, limit: int | None) -> None:
        """Check all against CRIU's images in `directory`, and choose huge pages there; `limit` is the container's
        memory limit in bytes. Raises SnapshotDamaged."""
        memory = self._manifest.memory
        try:
            plan.check(self._places, directory)
            mappings = [(one.pid, one.start, one.end, one.extra) for one in memory.huge]
            plan.allow_huge_pages(mappings, self._places, directory, memory.filled + memory.left, limit)
        except (plan.Unfounded, images.ImageError) as error:
            raise SnapshotDamaged("read memory of snapshot", str(self._ref), str(error), _NEXT_STEP) from None

    def release(self, init: int) -> None:
        """Begin to write into the stopped processes below `init`, a host pid. Raises RestoreError."""
        found = processes.tree(init)
        self._alive = {pid: processes.start_time(pid) for pid in found}
        self._fill.release({processes.namespace_pid(pid): pid for pid in found})

    def join(self) -> None:
        """Wait until all memory is there and verified.

        Raises what failed first: SnapshotDamaged, StoreError, RestoreError; also if a process has ended meanwhile.
        """
        try:
            self._fill.join()
        except RestoreError:
            # A failure of either ends both, and the other one then only misses what did not come.
            if self.device is not None:
                self.device.raise_failure()
            raise
        self._reader.close()
        for pid, start in self._alive.items():
            if start is not None and processes.start_time(pid) != start:
                raise RestoreError(
                    "fill memory", f"process {pid}", "it has ended, as the kernel ends one without memory"
                )

    def raise_failure(self) -> None:
        """Raise what has failed so far, if anything has."""
        self._fill.raise_failure()
        if self.device is not None:
            self.device.raise_failure()

    def abandon(self) -> None:
        """End the threads, as far as they can be."""
        self._fill.abandon()
        if self.device is not None:
            self.device.abandon()

    def report(self, trace: Trace) -> None:
        """Note in the trace what was read from where."""
        counters = self._reader.counters
        trace.note("filled_bytes", self._manifest.memory.filled)
        trace.note("threads", self._reader.parallel)
        trace.note("store_bytes", counters.store_bytes)
        trace.note("cache_bytes", counters.cache_bytes)
        trace.note("direct_io", counters.direct)
        trace.note("cache_fault", counters.cache_fault)


def load(
    store: DirectoryStore,
    ref: SnapshotRef,
    manifest: Manifest,
    settings: Settings,
    trace: Trace,
    stop: threading.Event,
    gpus: Sequence[str] = (),
) -> CarvedMemory | None:
    """Read the snapshot's tables; None if nothing of its memory was carved or taken. `gpus`: the UUID of the GPU that
    stands for each of the snapshot's. Raises SnapshotDamaged, StoreError."""
    if manifest.file(chunks.CHUNKS) is None and manifest.file(PLACES) is None and not manifest.memory.filled:
        return None
    with ExitStack() as undo:
        opening: Opening | None = None
        if manifest.cuda.served_bytes:
            from rewarm.gpu.host import Opening  # only what has device memory loads anything of it

            opening = Opening(settings.libcuda, gpus, settings.state_dir, trace)
            undo.callback(opening.close)
            opening.start()
        table = chunks.decode(store.read_file(manifest, chunks.CHUNKS), manifest.packs, str(ref))
        if not table and not manifest.cuda.served_bytes:
            raise SnapshotDamaged("read memory/chunks of", str(ref), "it has no chunks", _NEXT_STEP)
        data = store.read_file(manifest, PLACES) if manifest.file(PLACES) is not None else b""
        # The first chunks are those of device memory.
        first = max(0, len(table) - places.count(data))
        device, table = table[:first], table[first:]
        try:
            where = places.decode(data, [chunk.size for chunk in table])
        except places.Bad as bad:
            raise SnapshotDamaged("read memory/places of", str(ref), str(bad), _NEXT_STEP) from None
        filled = sum(chunk.size for chunk in table)
        if filled != manifest.memory.filled:
            cause = f"its chunks have {filled} bytes, its manifest says {manifest.memory.filled}"
            raise SnapshotDamaged("read memory of snapshot", str(ref), cause, _NEXT_STEP)
        threads = node.threads(settings)
        cache = cache_for(settings, store)
        reader = ChunkReader(store, manifest.packs, table, cache=cache, stop=stop, threads=threads)
        fill = Fill(reader, where, stop, trace, ahead=_ahead(settings, filled))
        load = None
        if device and opening is None:
            cause = f"it has {len(device)} chunks that are nowhere"
            raise SnapshotDamaged("read memory/chunks of", str(ref), cause, _NEXT_STEP)
        if opening is not None:
            part = max(PART, min(_DEVICE_PART, sum(chunk.size for chunk in device) // (_ROUNDS * threads)))
            of_device = ChunkReader(
                store, manifest.packs, device, cache=cache, stop=stop, threads=threads, warm_part=part
            )
            load = _device(store, ref, manifest, of_device, opening, trace, stop)
        undo.pop_all()
        return CarvedMemory(ref, manifest, where, reader, fill, load)


def _device(
    store: DirectoryStore,
    ref: SnapshotRef,
    manifest: Manifest,
    reader: ChunkReader,
    opening: Opening,
    trace: Trace,
    stop: threading.Event,
) -> Load:
    from rewarm.gpu import pieces
    from rewarm.gpu.load import Load

    cuda = manifest.cuda
    try:
        if manifest.file(pieces.PIECES) is None:
            raise pieces.Bad("there is no such file")
        data = store.read_file(manifest, pieces.PIECES)
        found = pieces.decode(data, [chunk.size for chunk in reader.chunks], len(opening.uuids), cuda.processes)
        if sum(piece.size for piece in found) != cuda.served_bytes:
            raise pieces.Bad(f"its pieces are not of {cuda.served_bytes} bytes, which the manifest says")
        for gpu, used in enumerate(cuda.used_bytes):
            if sum(piece.size for piece in found if piece.gpu == gpu) > used:
                raise pieces.Bad(f"its pieces on GPU {gpu} are of more than {used} bytes, which was all")
    except pieces.Bad as bad:
        raise SnapshotDamaged(f"read {pieces.PIECES} of", str(ref), str(bad), _NEXT_STEP) from None
    digests = [chunk.digest for chunk in reader.chunks]
    return Load(reader, digests, found, opening, stop, trace)


def _ahead(settings: Settings, filled: int) -> int:
    """Bytes that may be read ahead where `filled` bytes come back: no more than half of what the limits over rewarm's
    own cgroup leave beside those, which are charged to the same ones if the engine puts it into the pod's."""
    if not slots.take(settings.state_dir):
        return 0
    rooms = (room for room, _ in cgroups.memory_rooms(cgroups.own()))
    return min([settings.read_ahead, *(max(0, room - filled) // 2 for room in rooms)])
