"""Device memory on its way into a snapshot: from the GPU over pinned memory to the store, in parallel, while its
processes stand still. Never more of it in this node's memory than the buffers hold.

Where the GPU has room for a copy, and may have one, the processes need not wait for the store: they stand still until
that is made.
"""

from __future__ import annotations

import random
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

from rewarm import aside
from rewarm.aside import Task
from rewarm.errors import GpuError
from rewarm_native import memory
from rewarm_native.cuda import OUT_OF_MEMORY, CudaError
from rewarm_native.device import Device, Lane

from . import host, library
from .digests import MOST, Digests, zeros
from .pieces import WINDOW, ZEROS, Piece, Span

SLOTS = 2
"""Buffers of each thread: one comes from the GPU while the other is stored."""
_COPY = 1 << 30
"""Bytes of a copy's memory that are created at once."""
_PART = 16
"""Windows that a thread takes at a time: neighbours, which a restore then reads in a row."""
_SAMPLE = 8
"""Windows that are looked at on this side, of those that the GPU says are zeros: nobody else would see that it is
wrong."""

Window = tuple[int, int, int]
"""The number of a piece, the window in it, the address."""


class Save:
    """Made before the pause: opening the GPUs takes time. Then `start`, `join`; `close` at any time."""

    def __init__(
        self,
        libcuda: str,
        uuids: Sequence[str],
        state_dir: str,
        add: Callable[[memoryview], int],
        threads: int,
        share: int = 0,
    ) -> None:
        """`libcuda` and `state_dir` are the settings; `uuids`: the GPUs by their index; `add` stores a chunk and gives
        its number; `share`: the percentage of a GPU's free memory that a copy may take. Raises GpuError."""
        host.prepare(uuids)
        self._uuids = uuids
        self._add = add
        self._threads = threads
        self._share = share
        compiler = library.load_compiler(libcuda)
        ring = host.Ring(threads * SLOTS)
        self._host = host.Host(libcuda, uuids)
        try:
            self._buffers = self._host.pin(ring)
        except GpuError:
            self._host.close()
            raise
        self._digests: list[Digests] = []
        if compiler:
            with suppress(CudaError):  # without it, zeros are looked for on this side
                self._digests = [Digests(device, state_dir) for device in self._host.devices]
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._failure: BaseException | None = None
        self._work: deque[Sequence[Window]] = deque()
        self._mapped: list[tuple[Device, int, list[int]]] = []
        """Memory of the processes, in the order of the pieces."""
        self._copies: list[tuple[Device, int, list[int]]] = []
        self._pieces: list[Piece] = []
        self._tasks: list[Task] = []
        self._starting: Task | None = None
        self._lanes: dict[int, list[tuple[Device, Lane]]] = {}
        """By the number of the thread."""
        self._adding: set[int] = set()
        """Threads that are in the store, and not in the driver."""
        self._queued = -1
        self._done = 0
        """Windows that are stored, or zeros."""
        self.detached = False
        """Whether the processes' memory is not needed any more."""

    def start(self, places: Sequence[tuple[int, int, Span, int]], others: Sequence[int], limit: float) -> None:
        """Begin to read memory: process (its number in the snapshot), index of the GPU, piece, descriptor. `others`:
        bytes on each GPU that the processes need beside it. Raises GpuError, also if it takes more than `limit`
        seconds, and RestoreError."""
        self._starting = Task(partial(self._begin, places, others), "start")
        self._starting.start()
        if not self._starting.wait(limit):
            self._stop.set()
            raise self._late(limit, "look for Xid lines in `dmesg`")
        if self._failure is not None:
            raise self._failure
        for at in range(min(self._threads, len(self._work))):
            task = Task(partial(self._run, at), "save")
            task.start()
            self._tasks.append(task)

    def join(self, limit: float) -> list[Piece]:
        """Wait until all is stored, at most `limit` seconds; while nobody stands still for it, at most so many in which
        nothing was. Raises the first failure, GpuError if it takes longer."""
        end, seen = time.monotonic() + limit, self._done
        for task in self._tasks:
            while not task.wait(max(0.0, min(1.0, end - time.monotonic()))):
                if self.detached and self._done != seen:
                    end, seen = time.monotonic() + limit, self._done
                if self._failure is not None:
                    raise self._failure
                if time.monotonic() > end:
                    raise self._late(limit)
        if self._failure is not None:
            raise self._failure
        if self._done != self._queued:
            cause = f"{self._queued - self._done} of {self._queued} windows were not stored"
            raise GpuError("store device memory of", "the container", cause, "capture it again")
        return self._pieces

    def close(self) -> None:
        """Let go of the memory and the GPUs. Threads that are stuck in the driver keep them."""
        with self._lock:
            self._stop.set()
        if self._starting is not None and not aside.wait([self._starting]):
            return
        if not aside.wait(self._tasks):
            stuck = [at for at, task in enumerate(self._tasks) if not task.wait(0)]
            if not self._adding.issuperset(stuck):
                return
            # They are in the store, and call the driver no more; only what they have begun has to end.
            with suppress(CudaError):
                for device, lane in (one for at in stuck for one in self._lanes.get(at, [])):
                    device.enter()
                    lane.finish()
        # A mapping outlives its context, and would keep memory that the program frees.
        for mapped in (self._mapped, self._copies):
            with suppress(CudaError):
                _unmap(mapped)
        self._host.close()

    def _late(self, limit: float, next_step: str = "see `capture_timeout` in the settings") -> GpuError:
        return GpuError("store device memory of", "the container", f"it has taken more than {limit:g} s", next_step)

    def _begin(self, places: Sequence[tuple[int, int, Span, int]], others: Sequence[int]) -> None:
        try:
            for pid, gpu, span, fd in places:
                self._check()
                device = self._host.devices[gpu]
                device.enter()
                handle = device.take(fd)
                try:
                    self._mapped.append((device, device.map([(handle, span.size)]), [span.size]))
                finally:
                    device.release(handle)
                self._pieces.append(Piece(pid, gpu, *span, array("I", [ZEROS]) * (span.size // WINDOW)))
            windows = self._not_zeros()
            self._check()
            if self._share:
                windows = self._copied(windows, others)
            self._queued = len(windows)
            self._work.extend(_parts(windows))
        except CudaError as error:
            self._fail(host.failed("read memory of", ", ".join(self._uuids), error))
        except BaseException as error:  # a panic of a library's as well
            self._fail(error)

    def _check(self) -> None:
        if self._stop.is_set():
            raise GpuError("read memory of", ", ".join(self._uuids), "the capture has ended")

    def _not_zeros(self) -> list[Window]:
        """All windows but those that the GPU says are zeros."""
        every = [
            (number, at, base + at * WINDOW)
            for number, (piece, (_, base, _)) in enumerate(zip(self._pieces, self._mapped, strict=True))
            for at in range(len(piece.chunks))
        ]
        if not self._digests:
            return every
        found: list[Window] = []
        empty: list[Window] = []
        for some in _parts(every, most=MOST):
            self._check()
            digests = self._digests[self._pieces[some[0][0]].gpu].of([address for _, _, address in some])
            for one, digest in zip(some, digests, strict=True):
                (empty if digest == zeros() else found).append(one)
        if any(self._is_not_zeros(one) for one in random.sample(empty, min(_SAMPLE, len(empty)))):
            return every
        return found

    def _is_not_zeros(self, window: Window) -> bool:
        number, _, address = window
        device = self._host.devices[self._pieces[number].gpu]
        device.enter()
        lane = device.lane()
        lane.event()
        lane.download(self._buffers[0], address, 0)
        lane.finish()
        return memory.nonzero_pages(self._buffers[0]) != 0

    def _copied(self, windows: list[Window], others: Sequence[int]) -> list[Window]:
        """The same windows in memory of this process's own, if there is room for them."""
        sizes = [0] * len(self._host.devices)
        for number, _, _ in windows:
            sizes[self._pieces[number].gpu] += WINDOW
        for device, size, other in zip(self._host.devices, sizes, others, strict=True):
            if size and size > max(0, device.free() - other) * self._share // 100:
                return windows
        try:
            bases = [self._room(device, size) for device, size in zip(self._host.devices, sizes, strict=True)]
        except CudaError as error:
            if error.code != OUT_OF_MEMORY:
                raise
            _unmap(self._copies)  # others were faster
            return windows
        lanes: list[Lane] = []
        for device in self._host.devices:
            device.enter()
            lanes.append(device.lane())
        found: list[Window] = []
        for run in _parts(windows, most=len(windows), neighbours=True):
            gpu = self._pieces[run[0][0]].gpu
            self._host.devices[gpu].enter()
            lanes[gpu].copy(bases[gpu], run[0][2], len(run) * WINDOW)
            for number, at, _ in run:
                found.append((number, at, bases[gpu]))
                bases[gpu] += WINDOW
        for device, lane in zip(self._host.devices, lanes, strict=True):
            device.enter()
            lane.finish()
        _unmap(self._mapped)
        self.detached = True
        return found

    def _room(self, device: Device, size: int) -> int:
        """The address of so many bytes of this process's own; 0 for none."""
        if not size:
            return 0
        device.enter()
        sizes = [min(_COPY, size - at) for at in range(0, size, _COPY)]
        handles = device.create(sizes)
        try:
            base = device.map(list(zip(handles, sizes, strict=True)))
        finally:
            for handle in handles:
                device.release(handle)  # a mapping keeps it
        self._copies.append((device, base, sizes))
        return base

    def _run(self, thread: int) -> None:
        try:
            buffers = self._buffers[thread * SLOTS : (thread + 1) * SLOTS]
            lanes: dict[int, Lane] = {}
            while not self._stop.is_set():
                try:
                    windows = self._work.popleft()
                except IndexError:
                    return
                gpu = self._pieces[windows[0][0]].gpu
                device = self._host.devices[gpu]
                device.enter()
                if gpu not in lanes:
                    lanes[gpu] = device.lane()
                    for _ in range(SLOTS):
                        lanes[gpu].event()
                    self._lanes.setdefault(thread, []).append((device, lanes[gpu]))
                self._read(windows, lanes[gpu], buffers, thread)
        except CudaError as error:
            self._fail(host.failed("copy from", ", ".join(self._uuids), error))
        except BaseException as error:  # a panic of a library's as well
            self._fail(error)

    def _read(self, windows: Sequence[Window], lane: Lane, buffers: Sequence[memoryview], thread: int) -> None:
        lane.download(buffers[0], windows[0][2], 0)
        for turn, (number, at, _) in enumerate(windows):
            slot, following = turn % SLOTS, (turn + 1) % SLOTS
            lane.wait(slot)
            if self._stop.is_set():
                return
            if turn + 1 < len(windows):
                lane.download(buffers[following], windows[turn + 1][2], following)
            if memory.nonzero_pages(buffers[slot]):
                self._adding.add(thread)
                chunk = self._add(buffers[slot])
                with self._lock:
                    if self._stop.is_set():
                        return  # who closes may have seen it in the store
                    self._adding.discard(thread)
                self._pieces[number].chunks[at] = chunk
            with self._lock:
                self._done += 1

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            self._failure = self._failure or error  # raised by `join`
        self._stop.set()


def _parts(windows: Sequence[Window], *, most: int = _PART, neighbours: bool = False) -> list[Sequence[Window]]:
    """Windows of one piece at a time: up to `most`, with `neighbours` only such as follow each other without a gap."""
    found: list[Sequence[Window]] = []
    start = 0
    for end in range(1, len(windows) + 1):
        over = end == len(windows) or windows[end][0] != windows[start][0] or end - start == most
        if over or (neighbours and windows[end][1] != windows[end - 1][1] + 1):
            found.append(windows[start:end])
            start = end
    return found


def _unmap(mapped: list[tuple[Device, int, list[int]]]) -> None:
    """All of these, which are forgotten. Raises the first CudaError."""
    first: CudaError | None = None
    while mapped:
        device, base, sizes = mapped.pop()
        try:
            device.enter()
            device.unmap(base, sizes)
        except CudaError as error:
            first = first or error
    if first is not None:
        raise first
