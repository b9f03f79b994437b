"""The memory of one snapshot on its way back, as far as neither CRIU nor the driver brings it: tables from the store,
chunks from store or cache, the fill of processes, the load of GPUs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from rewarm import aside, node, processes, slots
from rewarm.aside import Task
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


class DeviceMemory:
    """What goes to GPUs. Its part of the chunk table is decoded by a thread of its own, while CRIU works: it is long,
    and nothing needs it before."""

    def __init__(self, opening: Opening, make: Callable[[], Load], stop: threading.Event) -> None:
        """`opening`: of the GPUs, begun; `stop` is set if `make` fails, as by every failure."""
        self._opening = opening
        self._make = make
        self._stop = stop
        self._load: Load | None = None
        self._failure: Exception | None = None
        self._task = Task(self._begin, "tables")
        self._begun = False

    def start(self) -> None:
        """Begin, unless it was begun. Raises RestoreError if no thread can be made."""
        if not self._begun:
            self._task.start()
            self._begun = True

    def load(self) -> Load:
        """Wait until it has begun. Raises SnapshotDamaged, StoreError, RestoreError, GpuError."""
        self._task.wait()
        self.raise_failure()
        if self._load is None:
            raise RestoreError("load device memory of", ", ".join(self._opening.uuids), "the restore has ended")
        return self._load

    def raise_failure(self) -> None:
        """Raise what has failed so far, if anything has."""
        if self._failure is not None:
            raise self._failure
        if self._load is not None:
            self._load.raise_failure()

    def abandon(self) -> None:
        """End its threads, as far as they can be. Who hangs finds `stop` set when he goes on."""
        if self._begun:
            aside.wait([self._task])
        if self._load is not None:
            self._load.abandon()
        else:
            self._opening.close()

    def _begin(self) -> None:
        try:
            load = self._make()
            if self._stop.is_set():
                return
            self._load = load  # its threads may fail at once, and who then ends asks here why
            load.start()
        except Exception as error:
            self._failure = error  # raised by `load`
            self._stop.set()


class CarvedMemory:
    """Made by `load`. `start`, `allow_huge_pages`, `hurry`, `check`, `release`, `join` in this order, or `abandon` at
    any time."""

    def __init__(
        self,
        ref: SnapshotRef,
        manifest: Manifest,
        where: list[Place],
        reader: ChunkReader,
        fill: Fill,
        device: DeviceMemory | None,
    ) -> None:
        self._ref = ref
        self._manifest = manifest
        self._places = where
        self._reader = reader
        self._fill = fill
        self._device = device
        self._alive: dict[int, int | None] = {}
        self._checked = False

    def start(self) -> None:
        """Start to read. Raises RestoreError if no thread can be made."""
        self._fill.start()
        if self._device is not None and self._reader.cold:
            self._device.start()  # what waits for storage does not hold up anybody

    def allow_huge_pages(self, directory: Path, limit: int | None) -> None:
        """Choose huge pages in CRIU's images in `directory`, which CRIU has not yet read; `limit` is the container's
        memory limit in bytes. Raises SnapshotDamaged."""
        memory = self._manifest.memory
        mappings = [(one.pid, one.start, one.end, one.extra) for one in memory.huge]
        try:
            plan.allow_huge_pages(mappings, self._places, directory, memory.filled + memory.left, limit)
        except (plan.Unfounded, images.ImageError) as error:
            raise SnapshotDamaged("read memory of snapshot", str(self._ref), str(error), _NEXT_STEP) from None

    def hurry(self) -> None:
        """Read with more threads, and begin with device memory, now that CRIU works. Raises RestoreError."""
        self._fill.hurry()
        if self._device is not None:
            self._device.start()

    def check(self, directory: Path) -> None:
        """Check all places against CRIU's images in `directory`: what is not the container's own memory there is not
        written to. Raises SnapshotDamaged."""
        try:
            plan.check(self._places, directory)
        except (plan.Unfounded, images.ImageError) as error:
            raise SnapshotDamaged("read memory of snapshot", str(self._ref), str(error), _NEXT_STEP) from None
        self._checked = True

    def release(self, init: int) -> None:
        """Begin to write into the stopped processes below `init`, a host pid. Raises RestoreError."""
        if not self._checked:
            raise RestoreError("fill memory of", str(self._ref), "its places have not been checked", "report it")
        found = processes.tree(init)
        self._alive = {pid: processes.start_time(pid) for pid in found}
        self._fill.release({processes.namespace_pid(pid): pid for pid in found})

    def device(self) -> Load | None:
        """Device memory, begun, which who maps it into the processes joins. Raises SnapshotDamaged, StoreError,
        RestoreError, GpuError."""
        return None if self._device is None else self._device.load()

    def join(self) -> None:
        """Wait until all memory is there and verified.

        Raises what failed first: SnapshotDamaged, StoreError, RestoreError; also if a process has ended meanwhile.
        """
        try:
            self._fill.join()
        except RestoreError:
            # A failure of either ends both, and the other one then only misses what did not come.
            if self._device is not None:
                self._device.raise_failure()
            raise
        self._reader.close()
        if self._device is not None:
            self._device.load()
        for pid, start in self._alive.items():
            if start is not None and processes.start_time(pid) != start:
                raise RestoreError(
                    "fill memory", f"process {pid}", "it has ended, as the kernel ends one without memory"
                )

    def raise_failure(self) -> None:
        """Raise what has failed so far, if anything has."""
        self._fill.raise_failure()
        if self._device is not None:
            self._device.raise_failure()

    def abandon(self) -> None:
        """End the threads, as far as they can be."""
        self._fill.abandon()
        if self._device is not None:
            self._device.abandon()

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
    """Read the snapshot's tables, and decode that of process memory; None if nothing of its memory was carved or taken.
    `gpus`: the UUID of the GPU that stands for each of the snapshot's. Raises SnapshotDamaged, StoreError."""
    if manifest.file(chunks.CHUNKS) is None and manifest.file(PLACES) is None and not manifest.memory.filled:
        return None
    with ExitStack() as undo:
        opening: Opening | None = None
        if manifest.cuda.served_bytes:
            from rewarm.gpu.host import Opening  # only what has device memory loads anything of it

            opening = Opening(settings.libcuda, gpus, settings.state_dir, trace)
            undo.callback(opening.close)
            opening.start()
        whole = store.read_file(manifest, chunks.CHUNKS)
        if not whole and not manifest.cuda.served_bytes:
            raise SnapshotDamaged("read memory/chunks of", str(ref), "it has no chunks", _NEXT_STEP)
        data = store.read_file(manifest, PLACES) if manifest.file(PLACES) is not None else b""
        # The first chunks are those of device memory.
        first = max(0, chunks.count(whole) - places.count(data))
        table = chunks.decode(whole, manifest.packs, str(ref), first)
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
        device = None
        if first and opening is None:
            cause = f"it has {first} chunks that are nowhere"
            raise SnapshotDamaged("read memory/chunks of", str(ref), cause, _NEXT_STEP)
        if opening is not None:
            begun = opening

            def make() -> Load:
                # All of it once more: also against each other.
                table = chunks.decode(whole, manifest.packs, str(ref))[:first] if first else []
                part = max(PART, min(_DEVICE_PART, sum(chunk.size for chunk in table) // (_ROUNDS * threads)))
                reader = ChunkReader(
                    store, manifest.packs, table, cache=cache, stop=stop, threads=threads, warm_part=part
                )
                return _load(store, ref, manifest, reader, begun, trace, stop)

            device = DeviceMemory(begun, make, stop)
        undo.pop_all()
        return CarvedMemory(ref, manifest, where, reader, fill, device)


def _load(
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
