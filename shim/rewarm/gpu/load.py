"""Device memory on its way back: from the store over pinned memory to the GPU, and verified before it is handed on.

It is made and filled by this process, and handed on as descriptors which the restored processes map: so reading begins
at once, beside CRIU and the driver, and no byte goes through a place where the container could reach it. Nor are they
handed on earlier: what the snapshot says of its chunks may be a lie to read those of others.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Protocol

from rewarm import aside
from rewarm.aside import Task
from rewarm.errors import GpuError, RestoreError
from rewarm.trace import Trace
from rewarm_native.cuda import CudaError
from rewarm_native.device import Device

from . import descriptors, host
from .arrivals import Arrivals
from .layout import Layout
from .pieces import WINDOW, ZEROS, Piece, Span
from .send import Run, Sender

RUN = 2
"""Windows of a buffer: read at once where they lie one after the other, so that Python is asked less often."""
SLOTS = 2
"""Buffers of each thread: one is filled while the others are on their way to the GPU."""
_WARM_THREADS = 10
"""At most, where there is little to do but reading from memory: so many keep PCIe busy (docs/decisions/0015), and CRIU
wants processors too."""
_BATCH = 256
"""Pieces that are made in one call, or get their descriptors."""
_MOST_THREADS = 32
"""Of any kind, however many processors there are: each has pinned memory."""

Straight = Callable[[int, Sequence[Run]], tuple[int, bool, memoryview]]
"""Who takes runs of a file itself, as long as the page cache has them: how many, whether the file system can say what
it has, and the next buffer."""


class Stream(Protocol):
    """One thread's share of the chunks."""

    def next_run(self, buffer: memoryview) -> tuple[Sequence[int], memoryview] | None:
        """The numbers and the bytes of the next chunks, one after the other in `buffer` (some times WINDOW bytes); None
        at the end."""


class Reader(Protocol):
    """All chunks of device memory; `parallel` is how many streams pay, `cold` whether they have to wait for storage,
    `plain` whether they have little to do but reading."""

    parallel: int
    cold: bool

    @property
    def plain(self) -> bool: ...

    def stream(self, *, verify: bool, straight: Straight | None) -> Stream:
        """Without `verify` its bytes may be anything. With `straight` it gives only what that has not taken."""

    def again(self, numbers: Sequence[int]) -> Stream:
        """These chunks once more, verified."""


class Load:
    """`start`, then `join`, or `abandon` at any time. `stop` is set by the first failure, and ends all threads."""

    def __init__(
        self,
        reader: Reader,
        digests: Sequence[bytes],
        pieces: Sequence[Piece],
        opening: host.Opening,
        stop: threading.Event,
        trace: Trace,
    ) -> None:
        """`opening`: of the GPU for each index of the pieces, begun; it is the load's from now on. `reader` gives the
        chunks of the pieces, `digests` has those of each."""
        self._reader = reader
        self._digests = digests
        self._pieces = pieces
        self._opening = opening
        self._stop = stop
        self._trace = trace
        self._uuids = opening.uuids
        self._at: Layout
        """Made by `_begin`."""
        self._handles: dict[int, int] = {}
        """By the index of the piece, as all below."""
        self._mapped: list[tuple[Device, int, list[int]]] = []
        self._exported: dict[int, int] = {}
        """A descriptor for each piece."""
        self._sent = bytearray(sum(len(piece.chunks) - piece.chunks.count(ZEROS) for piece in pieces))
        self._verified = bytearray(len(self._sent))
        self._again = 0
        self._lock = threading.Lock()
        self._failure: Exception | None = None
        self._tasks: list[Task] = []
        self._buffers: list[memoryview] = []
        self._begun = Task(self._begin, "begin")
        self._host: host.Host | None = None
        self._arrivals: Arrivals | None = None

    def start(self) -> None:
        """Raises RestoreError if no thread can be made."""
        self._begun.start()

    def join(self) -> dict[int, list[tuple[Span, int]]]:
        """Wait until all is on the GPUs, and verified: by the process's number, its pieces and a descriptor of each,
        which are the caller's to close. Raises the first failure, or GpuError if anything is missing."""
        self._begun.wait()
        for task in self._tasks:
            task.wait()
        self.raise_failure()
        if missing := self._verified.count(0):
            raise GpuError("load device memory", f"{missing} of {len(self._verified)} chunks", "they were not loaded")
        with self._lock:  # who abandons the load closes them
            if self._stop.is_set():
                raise GpuError("load device memory of", ", ".join(self._uuids), "the restore has ended")
            exported, self._exported = self._exported, {}
        found: dict[int, list[tuple[Span, int]]] = {}
        for at, piece in enumerate(self._pieces):
            found.setdefault(piece.pid, []).append((piece.span, exported[at]))
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
        begun = aside.wait([self._begun])
        if self._host is None:
            self._opening.close()
        if begun:
            with self._lock:
                for fd in self._exported.values():
                    with suppress(OSError):
                        os.close(fd)
                self._exported = {}
        if not begun or not aside.wait(self._tasks) or self._host is None:
            return  # who hangs has streams and buffers of the contexts
        with self._lock:
            # A mapping outlives its context, and a cold start may need the memory.
            for device, address, sizes in self._mapped:
                with suppress(CudaError):
                    device.enter()
                    device.unmap(address, sizes)
            for handle in self._handles.values():
                with suppress(CudaError):
                    self._host.devices[0].release(handle)
            self._mapped, self._handles = [], {}
            self._host.close()

    def _fail(self, error: Exception, operation: str = "") -> None:
        """`operation` is what the driver was asked for."""
        if isinstance(error, CudaError):
            error = host.failed(operation, ", ".join(self._uuids), error)
        with self._lock:
            self._failure = self._failure or error  # raised by `join`
        self._stop.set()

    def _begin(self) -> None:
        try:
            count = max(1, min(self._reader.parallel, len(self._sent), _MOST_THREADS))
            if self._opening.has_compiler():
                self._arrivals = Arrivals(self._digests)
                count = count if self._reader.cold or not self._reader.plain else min(count, _WARM_THREADS)
            # Both while the driver opens the GPUs.
            ring = host.Ring(count * SLOTS + 1, RUN * WINDOW)
            self._at = Layout(self._pieces, len(self._uuids))
            self._host = self._opening.wait()
            if self._stop.is_set():
                return
            with self._trace.phase("device.pin"):
                self._buffers = self._host.pin(ring)
            with self._trace.phase("device.make"):
                self._make(self._host)
            if self._stop.is_set():
                return
            work = [Task(partial(self._run, at), "load") for at in range(count)]
            if self._arrivals is not None:
                work.append(Task(partial(self._verify, self._arrivals, count), "verify"))
            for task in work:
                task.start()
                self._tasks.append(task)
            # Beside them; `join` waits for it.
            self._zero(self._host)
            self._export(self._host)
        except Exception as error:
            self._fail(error, "allocate memory on")

    def _make(self, mine: host.Host) -> None:
        """The memory of all pieces."""
        for index, device in enumerate(mine.devices):
            device.enter()
            sizes: list[int] = []
            for some in self._batches(index):
                if self._stop.is_set():
                    return
                more = [self._pieces[at].size for at in some]
                self._handles |= zip(some, device.create(more), strict=True)
                sizes += more
            if sizes:
                handles = (self._handles[at] for some in self._batches(index) for at in some)
                self._at.bases[index] = base = device.map(list(zip(handles, sizes, strict=True)))
                self._mapped.append((device, base, sizes))

    def _batches(self, gpu: int) -> Iterator[list[int]]:
        """The indices of the pieces of a GPU, some at a time: whoever gives the restore up waits for those."""
        found = [at for at, piece in enumerate(self._pieces) if piece.gpu == gpu]
        for first in range(0, len(found), _BATCH):
            yield found[first : first + _BATCH]

    def _zero(self, mine: host.Host) -> None:
        """All windows that are to be zeros."""
        for device, uuid, base, runs in zip(mine.devices, self._uuids, self._at.bases, self._at.zeros, strict=True):
            try:
                device.enter()
                lane = device.lane()
                for offset, size in runs:
                    lane.zero(base + offset, size)
                lane.finish()
            except CudaError as error:
                raise host.failed("clear memory on", uuid, error) from None

    def _export(self, mine: host.Host) -> None:
        """Descriptors of all pieces, which nobody gets before `join`: 0.15 ms each."""
        descriptors.allow()
        for index, device in enumerate(mine.devices):
            for some in self._batches(index):
                if self._stop.is_set():
                    return
                try:
                    self._exported |= zip(some, device.give([self._handles[at] for at in some]), strict=True)
                except CudaError as error:
                    raise host.failed("export memory of", self._uuids[index], error) from None

    def _run(self, number: int) -> None:
        began = time.monotonic_ns()
        try:
            sender = self._sender(self._buffers[number * SLOTS : (number + 1) * SLOTS], self._arrive)

            def straight(fd: int, runs: Sequence[Run]) -> tuple[int, bool, memoryview]:
                done, able = sender.send_file(fd, runs)
                self._disclaim(chunk for _, chunks in runs[done:] for chunk in chunks)
                return done, able, sender.buffer

            unverified = self._arrivals is not None
            stream = self._reader.stream(
                verify=not unverified, straight=straight if unverified and sender.takes_files else None
            )
            while not self._stop.is_set():
                item = stream.next_run(sender.buffer)
                if item is None or self._stop.is_set():
                    break
                sender.send(*item)
            sender.finish()
            self._trace.add("device.load", began, time.monotonic_ns(), bytes=sender.size)
        except Exception as error:
            self._fail(error, "copy to")
        finally:
            if self._arrivals is not None:
                self._arrivals.end()

    def _sender(self, buffers: Sequence[memoryview], arrived: Callable[[Sequence[int]], None]) -> Sender:
        assert self._host is not None
        return Sender(self._host.devices, buffers, self._at, self._claim, arrived)

    def _claim(self, chunks: Sequence[int]) -> None:
        """What was sent may have been verified: nothing may change it any more."""
        with self._lock:
            for chunk in chunks:
                if self._sent[chunk]:
                    raise GpuError("load device memory", f"chunk {chunk}", "it came twice")
                self._sent[chunk] = 1

    def _disclaim(self, chunks: Iterable[int]) -> None:
        """These were not sent after all."""
        with self._lock:
            for chunk in chunks:
                self._sent[chunk] = 0

    def _arrive(self, chunks: Sequence[int]) -> None:
        if self._arrivals is not None:
            self._arrivals.put(chunks)
        else:  # verified before they were sent
            self._mark(chunks)

    def _mark(self, chunks: Iterable[int]) -> None:
        for chunk in chunks:
            self._verified[chunk] = 1

    def _verify(self, arrivals: Arrivals, senders: int) -> None:
        try:
            assert self._host is not None
            # While the first chunks are on their way. If it fails, each of them is verified on this side after all.
            with self._trace.phase("device.compile"), suppress(CudaError):
                arrivals.compile(self._host.devices, self._opening.state_dir)
            self._trace.note("verified_on_gpu", arrivals.compiled)
            bad: list[int] = []
            for batch in arrivals.batches(senders):
                if self._stop.is_set():
                    return
                right = arrivals.right(batch, self._at)
                self._mark(right)
                wrong = [chunk for chunk in batch if chunk not in right]
                if arrivals.compiled and wrong:
                    # At once: what is damaged in the store is damaged for good.
                    self._read_again(arrivals, wrong, self._buffers[-1])
                else:
                    bad += wrong
            if bad and not self._stop.is_set():
                self._read_all_again(arrivals, bad, senders)
        except Exception as error:
            self._fail(error, "verify memory of")

    def _read_all_again(self, arrivals: Arrivals, chunks: Sequence[int], threads: int) -> None:
        """There is no kernel: as many threads as had sent them, whose buffers are free."""
        ordered = sorted(chunks)
        shares = [ordered[len(ordered) * at // threads : len(ordered) * (at + 1) // threads] for at in range(threads)]
        tasks = [
            Task(partial(self._try_again, arrivals, share, at), "load") for at, share in enumerate(shares) if share
        ]
        begun: list[Task] = []
        try:
            for task in tasks:
                task.start()
                begun.append(task)
        except RestoreError as error:
            self._fail(error)
        finally:
            for task in begun:
                task.wait()

    def _try_again(self, arrivals: Arrivals, chunks: Sequence[int], number: int) -> None:
        try:
            self._read_again(arrivals, chunks, self._buffers[number * SLOTS])
        except Exception as error:
            self._fail(error, "copy to")

    def _read_again(self, arrivals: Arrivals, chunks: Sequence[int], buffer: memoryview) -> None:
        """Verified before they are sent: what was damaged in the node's cache is right in the store, and else this says
        what is damaged. `buffer` is nobody else's."""
        with self._lock:
            self._again += len(chunks)
            self._trace.note("read_again", self._again)
        self._disclaim(chunks)
        stream = self._reader.again(chunks)
        there: list[int] = []
        sender = self._sender([buffer], there.extend)
        while not self._stop.is_set() and (item := stream.next_run(buffer)) is not None:
            if self._stop.is_set():
                return
            sender.send(*item)
            sender.finish()
            if arrivals.compiled and (wrong := set(there) - arrivals.right(there, self._at)):
                cause = f"chunk {min(wrong)} is not there as it was sent"
                raise GpuError("load device memory of", ", ".join(self._uuids), cause, "look for Xid lines in `dmesg`")
            self._mark(there)
            there.clear()
