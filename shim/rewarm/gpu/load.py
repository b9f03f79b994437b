"""Device memory on its way back: from the store, verified, over pinned memory to the GPU, before there is a process.

It is made and filled by this process, and handed on as descriptors which the restored processes map: so reading begins
at once, beside CRIU and the driver, and no byte goes through a place where the container could reach it.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Protocol

from rewarm import aside
from rewarm.aside import Task
from rewarm.errors import GpuError
from rewarm.trace import Trace
from rewarm_native.cuda import CudaError
from rewarm_native.device import Device, Lane

from . import host
from .pieces import WINDOW, ZEROS, Piece, Span

SLOTS = 4
"""Buffers of each thread: what is read into one while others are on their way to the GPU."""


class Stream(Protocol):
    """One thread's share of the chunks."""

    def next(self, buffer: memoryview) -> tuple[int, memoryview] | None:
        """The number and the verified bytes of the next chunk, in `buffer` (WINDOW bytes); None at the end."""


class Reader(Protocol):
    """All chunks of device memory; `parallel` is how many streams pay."""

    parallel: int

    def stream(self) -> Stream: ...


class Load:
    """`start`, then `join`, or `abandon` at any time. `stop` is set by the first failure, and ends all threads."""

    def __init__(
        self,
        reader: Reader,
        pieces: Sequence[Piece],
        uuids: Sequence[str],
        libcuda: str,
        stop: threading.Event,
        trace: Trace,
    ) -> None:
        """`uuids`: the GPU for each index of the pieces; `reader` gives their chunks."""
        self._reader = reader
        self._pieces = pieces
        self._libcuda = libcuda
        self._stop = stop
        self._trace = trace
        used = sorted({piece.gpu for piece in pieces})
        self._uuids = [uuids[gpu] for gpu in used]
        self._device_of = {gpu: at for at, gpu in enumerate(used)}
        self._handles: list[int] = []
        self._bases: list[int] = []
        self._at: dict[int, tuple[int, int]] = {}
        """By the chunk's number: index of the device, address."""
        self._loaded = bytearray(sum(chunk != ZEROS for piece in pieces for chunk in piece.chunks))
        self._lock = threading.Lock()
        self._failure: Exception | None = None
        self._tasks: list[Task] = []
        self._open = Task(self._begin, "device")
        self._host: host.Host | None = None

    def start(self) -> None:
        """Raises RestoreError if no thread can be made."""
        host.prepare(self._uuids)
        self._open.start()

    def join(self) -> dict[int, list[tuple[Span, int]]]:
        """Wait until all is on the GPUs: by the process's number, its pieces and a descriptor of each, which are the
        caller's to close. Raises the first failure, or GpuError if anything is missing."""
        self._open.wait()
        for task in self._tasks:
            task.wait()
        self.raise_failure()
        if missing := self._loaded.count(0):
            raise GpuError("load device memory", f"{missing} of {len(self._loaded)} chunks", "they were not loaded")
        assert self._host is not None
        found: dict[int, list[tuple[Span, int]]] = {}
        try:
            for piece, handle in zip(self._pieces, self._handles, strict=True):
                device = self._host.devices[self._device_of[piece.gpu]]
                found.setdefault(piece.pid, []).append((piece.span, device.give(handle)))
        except CudaError as error:
            for _, fd in (one for places in found.values() for one in places):
                os.close(fd)
            raise host.failed("export memory of", self._uuids[0], error) from None
        return found

    def sizes(self) -> dict[int, int]:
        """Bytes by the index of the GPU."""
        found: dict[int, int] = {}
        for piece in self._pieces:
            found[piece.gpu] = found.get(piece.gpu, 0) + piece.size
        return found

    def raise_failure(self) -> None:
        """Raise the first failure so far, if there is one."""
        if self._failure is not None:
            raise self._failure

    def abandon(self) -> None:
        """Have the threads end, if they can; the memory goes with this process."""
        self._stop.set()
        if not aside.wait([self._open]) or not aside.wait(self._tasks) or self._host is None:
            return
        # A mapping outlives its context, and a cold start may need the memory.
        for piece, base, handle in zip(self._pieces, self._bases, self._handles, strict=False):
            with suppress(CudaError):
                device = self._host.devices[self._device_of[piece.gpu]]
                device.unmap(base, piece.size)
                device.release(handle)
        self._host.close()

    def _fail(self, error: Exception) -> None:
        with self._lock:
            self._failure = self._failure or error  # raised by `join`
        self._stop.set()

    def _begin(self) -> None:
        try:
            count = max(1, min(self._reader.parallel, len(self._loaded)))
            with self._trace.phase("device.open"):
                self._host = host.Host(self._libcuda, self._uuids, count * SLOTS)
            with self._trace.phase("device.make"):
                self._make(self._host)
            for at in range(count):
                task = Task(partial(self._run, at), "load")
                task.start()
                self._tasks.append(task)
        except CudaError as error:
            self._fail(host.failed("allocate memory on", ", ".join(self._uuids), error))
        except Exception as error:
            self._fail(error)

    def _make(self, mine: host.Host) -> None:
        """The memory of all pieces, zeros where they are to be."""
        lanes: dict[int, Lane] = {}
        for piece in self._pieces:
            if self._stop.is_set():
                return
            index = self._device_of[piece.gpu]
            device = mine.devices[index]
            device.enter()
            handle = device.create(piece.size)
            base = device.map(handle, piece.size)
            self._handles.append(handle)
            self._bases.append(base)
            if index not in lanes:
                lanes[index] = device.lane()
            for at, chunk in enumerate(piece.chunks):
                if chunk != ZEROS:
                    self._at[chunk] = index, base + at * WINDOW
            for start, end in _runs(piece):
                lanes[index].zero(base + start * WINDOW, (end - start) * WINDOW)
        for lane in lanes.values():
            lane.finish()

    def _run(self, number: int) -> None:
        began, size = time.monotonic_ns(), 0
        try:
            assert self._host is not None
            buffers = self._host.buffers[number * SLOTS : (number + 1) * SLOTS]
            current = -1
            lanes: dict[int, Lane] = {}
            stream = self._reader.stream()
            slot = 0
            while not self._stop.is_set():
                item = stream.next(buffers[slot])
                if item is None:
                    break
                chunk, data = item
                index, address = self._at[chunk]
                if index != current:
                    if current >= 0:
                        lanes[current].finish()  # its buffers are the next one's
                    self._host.devices[index].enter()
                    current = index
                if index not in lanes:
                    lanes[index] = _lane(self._host.devices[index])
                lanes[index].upload(address, data, slot, (slot + 1) % SLOTS)
                slot = (slot + 1) % SLOTS
                self._loaded[chunk] = 1
                size += len(data)
            for lane in lanes.values():
                lane.finish()
            self._trace.add("device.load", began, time.monotonic_ns(), bytes=size)
        except CudaError as error:
            self._fail(host.failed("copy to", ", ".join(self._uuids), error))
        except Exception as error:
            self._fail(error)


def _lane(device: Device) -> Lane:
    lane = device.lane()
    for _ in range(SLOTS):
        lane.event()
    return lane


def _runs(piece: Piece) -> list[tuple[int, int]]:
    """The windows (first, one after the last) that are zeros."""
    found: list[tuple[int, int]] = []
    for at, chunk in enumerate(piece.chunks):
        if chunk == ZEROS:
            if found and found[-1][1] == at:
                found[-1] = found[-1][0], at + 1
            else:
                found.append((at, at + 1))
    return found


def close(places: dict[int, list[tuple[Span, int]]]) -> None:
    """Close the descriptors that `join` gave."""
    for found in places.values():
        for _, fd in found:
            with suppress(OSError):
                os.close(fd)
