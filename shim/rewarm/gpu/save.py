"""Device memory on its way into a snapshot: from the GPU over pinned memory to the store, in parallel, while its
processes stand still. Never more of it in this node's memory than the buffers hold.
"""

from __future__ import annotations

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
from rewarm_native.cuda import CudaError
from rewarm_native.device import Lane

from . import host
from .pieces import WINDOW, ZEROS, Piece, Span

SLOTS = 2
"""Buffers of each thread: one comes from the GPU while the other is stored."""
_PART = 16
"""Windows that a thread takes at a time: neighbours, which a restore then reads in a row."""


class Save:
    """Made before the pause: opening the GPUs takes time. Then `start`, `join`; `close` at any time."""

    def __init__(self, libcuda: str, uuids: Sequence[str], add: Callable[[memoryview], int], threads: int) -> None:
        """`uuids`: the GPUs by their index; `add` stores a chunk and gives its number. Raises GpuError."""
        host.prepare(uuids)
        self._uuids = uuids
        self._add = add
        self._threads = threads
        self._host = host.Host(libcuda, uuids)
        self._buffers = self._host.pin(threads * SLOTS)
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._failure: Exception | None = None
        self._work: deque[tuple[int, int]] = deque()
        self._mapped: list[tuple[int, int]] = []
        self._pieces: list[Piece] = []
        self._tasks: list[Task] = []

    def start(self, places: Sequence[tuple[int, int, Span, int]]) -> None:
        """Begin to read memory: process (its number in the snapshot), index of the GPU, piece, descriptor. Raises
        GpuError, RestoreError."""
        try:
            for pid, gpu, span, fd in places:
                device = self._host.devices[gpu]
                device.enter()
                handle = device.take(fd)
                try:
                    self._mapped.append((gpu, device.map([(handle, span.size)])))
                finally:
                    device.release(handle)
                self._pieces.append(Piece(pid, gpu, *span, array("I", [ZEROS]) * (span.size // WINDOW)))
        except CudaError as error:
            raise host.failed("read memory of", ", ".join(self._uuids), error) from None
        for number, piece in enumerate(self._pieces):
            self._work.extend((number, at) for at in range(0, len(piece.chunks), _PART))
        for at in range(min(self._threads, len(self._work))):
            task = Task(partial(self._run, at), "save")
            task.start()
            self._tasks.append(task)

    def join(self, limit: float) -> list[Piece]:
        """Wait until all is stored, at most `limit` seconds. Raises the first failure, GpuError if it takes longer."""
        end = time.monotonic() + limit
        if not all(task.wait(max(0.0, end - time.monotonic())) for task in self._tasks):
            cause = f"it has taken more than {limit:g} s"
            raise GpuError("store device memory of", "the container", cause, "see `capture_timeout` in the settings")
        if self._failure is not None:
            raise self._failure
        return self._pieces

    def close(self) -> None:
        """Let go of the memory and the GPUs. Threads that are stuck in the driver or the store keep them."""
        self._stop.set()
        if not aside.wait(self._tasks):
            return
        # A mapping outlives its context, and would keep memory that the program frees.
        for (gpu, base), piece in zip(self._mapped, self._pieces, strict=False):
            with suppress(CudaError):
                self._host.devices[gpu].unmap(base, [piece.size])
        self._mapped = []
        self._host.close()

    def _run(self, number: int) -> None:
        try:
            buffers = self._buffers[number * SLOTS : (number + 1) * SLOTS]
            lanes: dict[int, Lane] = {}
            while not self._stop.is_set():
                try:
                    at, first = self._work.popleft()
                except IndexError:
                    return
                gpu = self._pieces[at].gpu
                self._host.devices[gpu].enter()
                if gpu not in lanes:
                    lanes[gpu] = self._host.devices[gpu].lane()
                    for _ in range(SLOTS):
                        lanes[gpu].event()
                self._read(at, first, lanes[gpu], buffers)
        except CudaError as error:
            self._fail(host.failed("copy from", ", ".join(self._uuids), error))
        except Exception as error:
            self._fail(error)

    def _read(self, number: int, first: int, lane: Lane, buffers: Sequence[memoryview]) -> None:
        piece, (_, base) = self._pieces[number], self._mapped[number]
        last = min(first + _PART, len(piece.chunks))
        lane.download(buffers[first % SLOTS], base + first * WINDOW, first % SLOTS)
        for at in range(first, last):
            lane.wait(at % SLOTS)
            if at + 1 < last:
                following = (at + 1) % SLOTS
                lane.download(buffers[following], base + (at + 1) * WINDOW, following)
            if self._stop.is_set():
                return
            if memory.nonzero_pages(buffers[at % SLOTS]):
                piece.chunks[at] = self._add(buffers[at % SLOTS])

    def _fail(self, error: Exception) -> None:
        with self._lock:
            self._failure = self._failure or error  # raised by `join`
        self._stop.set()
