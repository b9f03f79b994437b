"""Device memory on its way back, on the fake driver: all of it verified, or none handed on."""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import resource
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from blake3 import blake3

from rewarm.errors import GpuError, SnapshotDamaged
from rewarm.gpu import arrivals, host, load, send
from rewarm.gpu.load import Load, Straight, Stream
from rewarm.gpu.pieces import WINDOW, ZEROS, Piece
from rewarm.gpu.send import Sender
from rewarm.trace import Trace
from rewarm_native.cuda import CudaError
from rewarm_native.device import Device, Lane
from support import fake_gpu, loads
from support.fake_gpu import FakeGpus
from support.loads import COUNT, DATA, GPU, PATTERN, pieces, right

FEW = 200
"""Descriptors at first; enough for a process with tests in it."""
Change = Callable[[int, memoryview], None]


class Chunks:
    """A reader of `data`, the chunks by their numbers, given out in `order`, some at a time."""

    cold = False
    plain = True

    def __init__(self, data: Sequence[bytes], order: Sequence[int], parallel: int = 3) -> None:
        self.data = data
        self.parallel = parallel
        self.left = list(order)
        self.lock = threading.Lock()
        self.change: Change = lambda number, view: None
        """Called for each chunk in its buffer, but not when it is read again."""
        self.verified: list[bool] = []
        self.asked_again: list[int] = []

    def stream(self, *, verify: bool, straight: Straight | None) -> Stream:
        self.verified.append(verify)
        return Some(self, self.left, self.change)

    def again(self, numbers: Sequence[int]) -> Stream:
        self.asked_again += numbers
        return Some(self, list(numbers), lambda number, view: None)


class Some:
    def __init__(self, reader: Chunks, left: list[int], change: Change) -> None:
        self.reader, self.left, self.change = reader, left, change

    def next_run(self, buffer: memoryview) -> tuple[Sequence[int], memoryview] | None:
        with self.reader.lock:
            count = min(len(buffer) // WINDOW, len(self.left), random.choice([1, 2]))
            numbers = [self.left.pop(0) for _ in range(count)]
        if not numbers:
            return None
        for at, number in enumerate(numbers):
            view = buffer[at * WINDOW : (at + 1) * WINDOW]
            view[:] = self.reader.data[number]
            self.change(number, view)
        return numbers, buffer[: count * WINDOW]


@pytest.fixture
def gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpus]:
    with loads.gpus(tmp_path, monkeypatch) as found:
        yield found


class Run:
    """A load with this reader."""

    def __init__(self, gpus: FakeGpus, reader: Chunks) -> None:
        self.stop = threading.Event()
        self.trace = Trace()
        self.reader = reader
        self.device = Device(str(gpus.libcuda), fake_gpu.uuid_bytes(GPU))
        opening = host.Opening(str(gpus.libcuda), [GPU], str(gpus.directory), self.trace)
        opening.start()
        digests = [blake3(data).digest() for data in DATA]
        self.load = Load(reader, digests, pieces(), opening, self.stop, self.trace)

    def join(self) -> bool:
        """Whether what came of it is what it should be."""
        found = self.load.join()
        (places,) = found.values()
        return right(pieces(), places)


@pytest.fixture
def begin(gpus: FakeGpus) -> Iterator[Callable[[Chunks], Run]]:
    runs: list[Run] = []

    def make(reader: Chunks) -> Run:
        run = Run(gpus, reader)
        runs.append(run)
        run.load.start()
        return run

    yield make
    for run in runs:
        run.load.abandon()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("parallel", [1, 3, 40])
def test_all_of_it_in_any_order(begin: Callable[[Chunks], Run], seed: int, parallel: int) -> None:
    order = random.Random(seed).sample(range(COUNT), COUNT)
    run = begin(Chunks(DATA, order, parallel))
    assert run.join()
    assert not run.reader.asked_again
    assert set(run.reader.verified) == {False}


@pytest.mark.parametrize("parallel", [1, 2])
def test_nothing_counts_before_it_is_there(
    begin: Callable[[Chunks], Run], monkeypatch: pytest.MonkeyPatch, parallel: int
) -> None:
    """The fake's copies happen when somebody waits for them, and the GPU looks at each as soon as it is said to be
    there."""
    monkeypatch.setattr(send, "_GROUP", 1)
    monkeypatch.setattr(arrivals, "MOST", 1)
    reader = Chunks(DATA, range(COUNT), parallel)
    reader.change = lambda number, view: time.sleep(0.05)  # so that there is time for a look
    run = begin(reader)
    assert run.join()
    assert not run.reader.asked_again, "a chunk was looked at before it was copied"


def flipped(numbers: Sequence[int]) -> Change:
    def change(number: int, view: memoryview) -> None:
        if number in numbers:
            view[12345] ^= 1

    return change


@pytest.mark.parametrize("numbers", [[0], [3, 4, COUNT - 1], range(COUNT)])
def test_what_is_wrong_is_read_again(begin: Callable[[Chunks], Run], numbers: Sequence[int]) -> None:
    reader = Chunks(DATA, range(COUNT))
    reader.change = flipped(numbers)
    run = begin(reader)
    assert run.join()
    assert sorted(reader.asked_again) == list(numbers)


def test_what_stays_wrong_ends_it_at_once(begin: Callable[[Chunks], Run], monkeypatch: pytest.MonkeyPatch) -> None:
    """Though reading the last of all never ends."""
    monkeypatch.setattr(send, "_GROUP", 1)
    monkeypatch.setattr(arrivals, "MOST", 1)
    over = threading.Event()

    class Damaged(Chunks):
        def again(self, numbers: Sequence[int]) -> Stream:
            raise SnapshotDamaged("read memory", f"chunk {numbers[0]}", "it is damaged", "capture it again")

    reader = Damaged(DATA, range(COUNT), parallel=1)

    def change(number: int, view: memoryview) -> None:
        if number == 0:
            view[0] ^= 1
        if number == COUNT - 1:
            over.wait(20)

    reader.change = change
    run = begin(reader)
    try:
        assert run.stop.wait(10), "it is not ended before all is read"
    finally:
        over.set()
    with pytest.raises(SnapshotDamaged, match="chunk 0"):
        run.join()


def test_bytes_that_are_never_right(begin: Callable[[Chunks], Run]) -> None:
    """Whoever says that they are verified: the GPU does not find them."""
    data = list(DATA)
    data[5] = bytes(reversed(data[5]))
    with pytest.raises(GpuError, match="chunk 5 is not there as it was sent"):
        begin(Chunks(data, range(COUNT))).join()


def test_a_chunk_that_comes_twice(begin: Callable[[Chunks], Run]) -> None:
    with pytest.raises(GpuError, match="came twice"):
        begin(Chunks(DATA, [*range(COUNT), 2])).join()


def test_a_chunk_that_does_not_come(begin: Callable[[Chunks], Run]) -> None:
    with pytest.raises(GpuError, match=f"1 of {COUNT} chunks: they were not loaded"):
        begin(Chunks(DATA, [number for number in range(COUNT) if number != 4])).join()


def test_a_reader_that_fails(begin: Callable[[Chunks], Run]) -> None:
    def change(number: int, view: memoryview) -> None:
        if number == 6:
            raise SnapshotDamaged("read memory", "chunk 6", "it is damaged", "capture it again")

    reader = Chunks(DATA, range(COUNT))
    reader.change = change
    with pytest.raises(SnapshotDamaged, match="chunk 6"):
        begin(reader).join()


@pytest.mark.parametrize("line", ["compiler none", "kernel idle"])
def test_without_a_kernel_all_are_read_again_by_all(gpus: FakeGpus, begin: Callable[[Chunks], Run], line: str) -> None:
    gpus.node(fake_gpu.gpus(1), more=[line])
    reader = Chunks(DATA, range(COUNT))
    reader.change = flipped([1])
    run = begin(reader)
    assert run.join()
    assert sorted(reader.asked_again) == list(range(COUNT))


def test_the_kernel_is_kept(gpus: FakeGpus, begin: Callable[[Chunks], Run]) -> None:
    """So the next load needs no compiler; one that fails is not kept."""
    assert begin(Chunks(DATA, range(COUNT))).join()
    (kept,) = (gpus.directory / "kernels").iterdir()
    gpus.node(fake_gpu.gpus(1), more=["compiler none"])
    run = begin(Chunks(DATA, range(COUNT)))
    assert run.join() and not run.reader.asked_again
    gpus.node(fake_gpu.gpus(1), more=["kernel wrong"])
    run = begin(Chunks(DATA, range(COUNT)))
    assert run.join() and len(run.reader.asked_again) == COUNT
    assert not kept.exists()


@pytest.mark.parametrize(
    ("what", "words"),
    [("pin", "pin memory for"), ("create", "allocate memory on"), ("map", "allocate memory on")],
)
def test_a_failure_before_there_is_anything(
    begin: Callable[[Chunks], Run], monkeypatch: pytest.MonkeyPatch, what: str, words: str
) -> None:
    def fails(*given: object) -> None:
        raise CudaError(1, "INVALID_VALUE", what, 0)

    monkeypatch.setattr(Device, what, fails)
    run = begin(Chunks(DATA, range(COUNT)))
    with pytest.raises(GpuError, match=words):
        run.join()
    assert not run.load._tasks
    run.load.abandon()


def test_zeros_that_fail_while_others_are_loaded(
    gpus: FakeGpus, begin: Callable[[Chunks], Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*given: object) -> None:
        time.sleep(0.2)
        raise CudaError(1, "INVALID_VALUE", "cuMemsetD8Async", 0)

    monkeypatch.setattr(Lane, "zero", fails)
    run = begin(Chunks(DATA, range(COUNT)))
    with pytest.raises(GpuError, match=r"clear memory on .*cuMemsetD8Async"):
        run.join()
    run.load.abandon()
    assert not list((gpus.directory / "devices").glob("*/*"))


def test_zeros_are_waited_for(begin: Callable[[Chunks], Run], monkeypatch: pytest.MonkeyPatch) -> None:
    original = Lane.zero

    def slowly(lane: Lane, address: int, size: int) -> None:
        time.sleep(0.2)
        original(lane, address, size)

    monkeypatch.setattr(Lane, "zero", slowly)
    assert begin(Chunks(DATA, range(COUNT))).join()


def test_pieces_of_several_calls(begin: Callable[[Chunks], Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "_BATCH", 2)
    assert begin(Chunks(DATA, range(COUNT))).join()


@pytest.mark.parametrize("nth", range(len(PATTERN)))
def test_a_piece_that_cannot_be_exported(
    gpus: FakeGpus, begin: Callable[[Chunks], Run], monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    """None of those before it stays open."""
    original = Device.give
    given: list[int] = []

    def fails(device: Device, handles: Sequence[int]) -> list[int]:
        if len(given) == nth:
            raise CudaError(999, "UNKNOWN", "cuMemExportToShareableHandle", 0)
        some = original(device, handles)
        given.extend(some)
        return some

    monkeypatch.setattr(load, "_BATCH", 1)
    monkeypatch.setattr(Device, "give", fails)
    run = begin(Chunks(DATA, range(COUNT)))
    with pytest.raises(GpuError, match="export memory of"):
        run.join()
    run.load.abandon()
    assert len(given) == nth
    for fd in given:
        with pytest.raises(OSError):
            os.fstat(fd)
    assert not list((gpus.directory / "devices").glob("*/*"))


def test_more_pieces_than_descriptors_at_first(begin: Callable[[Chunks], Run], monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything else is open by then."""
    give = Device.give

    def few(device: Device, handles: Sequence[int]) -> list[int]:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        assert soft == hard > FEW
        return give(device, handles)

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (FEW, hard))
    monkeypatch.setattr(Device, "give", few)
    assert begin(Chunks(DATA, range(COUNT))).join()


@pytest.mark.parametrize(
    ("plain", "cold", "threads"), [(True, False, 2), (True, True, COUNT), (False, False, COUNT), (False, True, COUNT)]
)
def test_how_many_threads(
    begin: Callable[[Chunks], Run], monkeypatch: pytest.MonkeyPatch, plain: bool, cold: bool, threads: int
) -> None:
    monkeypatch.setattr(load, "_WARM_THREADS", 2)
    reader = Chunks(DATA, range(COUNT), parallel=40)
    reader.plain, reader.cold = plain, cold
    run = begin(reader)
    assert run.join()
    assert len(reader.verified) == threads


def test_what_is_there_before_the_gpu_is(gpus: FakeGpus) -> None:
    """The ring's pages; and the driver is asked for one hardware queue."""
    ring = host.Ring(4)
    assert resident(ring.space) == 4 * WINDOW // mmap.PAGESIZE
    assert [len(buffer) for buffer in ring.buffers] == [WINDOW] * 4
    opening = host.Opening(str(gpus.libcuda), [GPU], str(gpus.directory), Trace())
    opening.start()
    opening.wait()
    opening.close()
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"


def resident(space: mmap.mmap) -> int:
    """How many of its pages are in memory: mincore(2)."""
    pages = (ctypes.c_ubyte * (len(space) // mmap.PAGESIZE))()
    first = ctypes.byref(ctypes.c_char.from_buffer(space))
    assert ctypes.CDLL(None).mincore(first, ctypes.c_size_t(len(space)), pages) == 0
    return sum(page & 1 for page in pages)


@pytest.mark.parametrize("line", ["", "kernel idle", "compiler none"])
@pytest.mark.parametrize(
    "patterns",
    [
        ((0, "x.x"), (1, ".xx"), (0, "..."), (1, "xx")),
        ((1, "x.x"),),
        ((0, "...."), (0, ".")),
        ((0, ".."), (1, "..")),
    ],
)
def test_two_gpus(
    gpus: FakeGpus, line: str, patterns: Sequence[tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    uuids = [fake_gpu.uuid(number) for number in range(2)]
    gpus.node(fake_gpu.gpus(2), more=[line] if line else [])
    numbers = iter(range(COUNT))
    wanted = [
        Piece(
            7, gpu, (at + 1) << 32, len(text) * WINDOW, array("I", [next(numbers) if x == "x" else ZEROS for x in text])
        )
        for at, (gpu, text) in enumerate(patterns)
    ]
    data = DATA[: next(numbers)]
    trace, stop = Trace(), threading.Event()
    opening = host.Opening(str(gpus.libcuda), uuids, str(gpus.directory), trace)
    opening.start()
    digests = [blake3(one).digest() for one in data]
    loaded = Load(Chunks(data, range(len(data))), digests, wanted, opening, stop, trace)
    loaded.start()
    try:
        [places] = loaded.join().values()
        assert right(wanted, places)
    finally:
        loaded.abandon()
    assert not list((gpus.directory / "devices").glob("*/*"))


def test_no_memory_for_the_ring(begin: Callable[[Chunks], Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "RUN", 1 << 26)
    run = begin(Chunks(DATA, range(COUNT)))
    with pytest.raises(GpuError, match=r"map memory of .* bytes"):
        run.join()


def test_nothing_is_handed_on_once_it_was_ended(begin: Callable[[Chunks], Run]) -> None:
    """By another failure of the same restore, after all was loaded."""
    run = begin(Chunks(DATA, range(COUNT)))
    run.load._begun.wait()
    for task in run.load._tasks:
        task.wait()
    run.stop.set()
    with pytest.raises(GpuError, match="the restore has ended"):
        run.load.join()


def test_without_the_compiler_what_is_read_is_verified(gpus: FakeGpus, begin: Callable[[Chunks], Run]) -> None:
    (gpus.directory / "libnvidia-ptxjitcompiler.so.1").unlink()
    run = begin(Chunks(DATA, range(COUNT)))
    assert run.join()
    assert set(run.reader.verified) == {True} and not run.reader.asked_again


def test_given_up_while_a_read_hangs(begin: Callable[[Chunks], Run], monkeypatch: pytest.MonkeyPatch) -> None:
    """What it was about to send is not sent any more: its contexts may be gone."""
    hangs, over = threading.Event(), threading.Event()
    reader = Chunks(DATA, range(COUNT), parallel=1)

    def change(number: int, view: memoryview) -> None:
        if number == 5:
            hangs.set()
            over.wait(20)

    reader.change = change
    sent: list[int] = []
    original = Sender.send

    def noting(self: Sender, chunks: Sequence[int], data: memoryview) -> None:
        sent.extend(chunks)
        original(self, chunks, data)

    monkeypatch.setattr(Sender, "send", noting)
    given: list[int] = []
    give = Device.give

    def noted(device: Device, handles: Sequence[int]) -> list[int]:
        some = give(device, handles)
        given.extend(some)
        return some

    monkeypatch.setattr(Device, "give", noted)
    run = begin(reader)
    assert hangs.wait(10) and run.load._begun.wait(10)
    run.load.abandon()
    assert len(given) == len(PATTERN)
    for fd in given:
        with pytest.raises(OSError):
            os.fstat(fd)
    assert run.load._host is not None and run.load._host.devices, "the contexts are closed under a thread"
    before = list(sent)
    over.set()
    for task in run.load._tasks:
        task.wait(10)
    assert sent == before


def test_no_room(gpus: FakeGpus, begin: Callable[[Chunks], Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_LIMIT", str(4 * WINDOW))
    with pytest.raises(GpuError, match="not enough free memory"):
        begin(Chunks(DATA, range(COUNT))).join()


def test_given_up_leaves_no_memory(gpus: FakeGpus, begin: Callable[[Chunks], Run]) -> None:
    def mapped() -> int:
        with open("/proc/self/maps", encoding="ascii") as maps:
            return sum("memfd:device" in line for line in maps)

    before = mapped()
    run = begin(Chunks(DATA, range(COUNT)))
    assert run.join()
    assert mapped() > before
    free = run.device.free()
    run.load.abandon()
    assert mapped() == before and run.device.free() - free == sum(piece.size for piece in pieces())
