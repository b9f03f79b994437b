"""The fill, into real stopped processes: everything or an error."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import threading
import time
import weakref
from collections.abc import Iterator, Sequence

import pytest

from rewarm.errors import RestoreError, SnapshotDamaged
from rewarm.memory.fill import Fill
from rewarm.memory.places import FORCED, MASK_BYTES, PAGE, WINDOW, Place
from rewarm.trace import Trace
from support.proc import wait_for

PID = 7
"""Of the process in the images."""


class Victim:
    """A stopped child with a private mapping of `windows` windows; its memory can be read from outside."""

    def __init__(self, windows: int, protection: int = mmap.PROT_READ | mmap.PROT_WRITE) -> None:
        self._memory = mmap.mmap(-1, windows * WINDOW, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=3)
        self.base = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        if protection != 3:
            libc = ctypes.CDLL(None, use_errno=True)
            assert libc.mprotect(ctypes.c_void_p(self.base), ctypes.c_size_t(windows * WINDOW), protection) == 0
        self.pid = os.fork()
        if self.pid == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
            os._exit(0)
        os.waitpid(self.pid, os.WUNTRACED)

    def read(self, address: int, size: int) -> bytes:
        fd = os.open(f"/proc/{self.pid}/mem", os.O_RDONLY)
        try:
            return os.pread(fd, size, address)
        finally:
            os.close(fd)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self.pid = 0

    def close(self) -> None:
        if self.pid:
            self.kill()


@pytest.fixture
def victim() -> Iterator[Victim]:
    made = Victim(16)
    yield made
    made.close()


class Chunks:
    """A reader of chunks that are in memory; number N can be made to fail, or to take its time."""

    def __init__(self, data: Sequence[bytes], parallel: int = 3) -> None:
        self.parallel = parallel
        self.cold = False
        self.data = data
        self.bad = -1
        self.pause = 0.0
        self.taken = 0
        self.finished = 0
        self._left = iter(range(len(data)))
        self._lock = threading.Lock()

    def stream(self) -> Chunks:
        return self

    def finish(self) -> None:
        self.finished += 1

    def next(self, buffer: memoryview) -> tuple[int, memoryview] | None:
        with self._lock:
            number = next(self._left, None)
            self.taken += number is not None
        if number is None:
            return None
        time.sleep(self.pause)
        if number == self.bad:
            raise SnapshotDamaged("read memory", f"chunk {number}", "it is damaged")
        buffer[: len(self.data[number])] = self.data[number]
        return number, buffer[: len(self.data[number])]


def random_chunks(victim: Victim, count: int) -> tuple[list[Place], list[bytes]]:
    """A chunk in every window, with every second page of a random number."""
    where, data = [], []
    for number in range(count):
        bits = sum(1 << at for at in range(0, 512, number % 3 + 1))
        where.append(Place(PID, 0, victim.base + number * WINDOW, bits.to_bytes(MASK_BYTES, "little")))
        data.append(os.urandom(bits.bit_count() * PAGE))
    return where, data


def start(
    where: Sequence[Place], data: Sequence[bytes], ahead: int = 64 * WINDOW
) -> tuple[Fill, Chunks, threading.Event]:
    stop = threading.Event()
    reader = Chunks(data)
    return Fill(reader, where, stop, Trace(), ahead=ahead), reader, stop


def contents(victim: Victim, place: Place) -> bytes:
    pages = (at for at in range(512) if place.bits >> at & 1)
    return b"".join(victim.read(place.base + at * PAGE, PAGE) for at in pages)


def test_everything_arrives_and_nothing_else_is_touched(victim: Victim) -> None:
    where, data = random_chunks(victim, 16)
    fill, _, _ = start(where, data)
    fill.start()
    fill.release({PID: victim.pid})
    fill.join()
    for place, one in zip(where, data, strict=True):
        assert contents(victim, place) == one
        for at in range(512):
            if not place.bits >> at & 1:
                assert victim.read(place.base + at * PAGE, PAGE) == bytes(PAGE)


def test_nothing_is_written_before_the_release(victim: Victim) -> None:
    where, data = random_chunks(victim, 8)
    fill, _, _ = start(where, data)
    fill.start()
    time.sleep(0.2)
    assert all(not any(contents(victim, place)) for place in where)
    fill.release({PID: victim.pid})
    fill.join()
    assert all(contents(victim, place) == one for place, one in zip(where, data, strict=True))


def test_no_more_than_so_much_is_read_ahead(victim: Victim) -> None:
    where, data = random_chunks(victim, 16)
    fill, reader, _ = start(where, data, ahead=3 * 2 * WINDOW)
    fill.start()
    time.sleep(0.2)
    assert reader.taken == 2, "one thread reads before there is time for more"
    fill.hurry()
    time.sleep(0.2)
    assert reader.taken == 4, "one core is left to CRIU"
    fill.release({PID: victim.pid})
    fill.join()
    assert reader.taken == 16


@pytest.mark.parametrize(("parallel", "early", "beside"), [(1, 1, 1), (4, 1, 3), (5, 0, 4), (16, 0, 12)])
def test_how_many_read_when(victim: Victim, parallel: int, early: int, beside: int) -> None:
    """Before CRIU is started, and beside it; all when there are processes."""
    where, data = random_chunks(victim, 16)
    reader = Chunks(data, parallel)
    fill = Fill(reader, where, threading.Event(), Trace(), ahead=parallel * WINDOW)
    fill.start()
    assert len(fill._tasks) == early
    fill.hurry()
    assert len(fill._tasks) == max(beside, 1)
    fill.release({PID: victim.pid})
    assert len(fill._tasks) == parallel
    fill.join()


def test_who_waits_for_storage_begins_at_once(victim: Victim) -> None:
    where, data = random_chunks(victim, 16)
    reader = Chunks(data, 16)
    reader.cold = True
    fill = Fill(reader, where, threading.Event(), Trace(), ahead=16 * WINDOW)
    fill.start()
    assert len(fill._tasks) == 16
    fill.release({PID: victim.pid})
    fill.join()


@pytest.mark.parametrize("storage", ["cold", "slow", "none"])
def test_what_is_read_and_what_is_ready(victim: Victim, monkeypatch: pytest.MonkeyPatch, storage: str) -> None:
    """Storage would have nothing to do until all that waits is written: in turn. Without storage what waits comes last,
    since a chunk of it is the least that a thread can take on while others end."""
    where, data = random_chunks(victim, 16)
    stop, written = threading.Event(), []
    monkeypatch.setattr("rewarm.memory.fill._WAITED", 0.05 if storage == "slow" else 30.0)

    class Watched(Chunks):
        def next(self, buffer: memoryview) -> tuple[int, memoryview] | None:
            written.append(sum(any(contents(victim, place)) for place in where))
            return super().next(buffer)

    reader = Watched(data, parallel=1)
    reader.cold = storage == "cold"
    reader.pause = 0.1 if storage == "slow" else 0.0
    fill = Fill(reader, where, stop, Trace(), ahead=8 * WINDOW)
    fill.start()
    wait_for("the end of reading ahead", lambda: reader.finished == 1)
    assert reader.taken == 8
    fill.release({PID: victim.pid})
    fill.join()
    assert written == [0] * 9 + ([1, 2, 3, 4, 5, 6, 7, 8] if storage == "none" else [2, 4, 6, 8, 10, 12, 14, 16])
    assert all(contents(victim, place) == one for place, one in zip(where, data, strict=True))


@pytest.mark.parametrize("failing", [False, True])
def test_what_was_read_ahead_is_given_back(victim: Victim, failing: bool) -> None:
    """The object that is still there afterwards does not keep it."""
    where, data = random_chunks(victim, 16)
    fill, reader, _ = start(where, data, ahead=3 * 4 * WINDOW)
    fill.start()
    wait_for("the end of reading ahead", lambda: reader.finished == 1)
    spaces = [weakref.ref(space) for space in fill._spaces]
    assert [space() is not None for space in spaces] == [True]
    if failing:
        fill.abandon()
    else:
        fill.release({PID: victim.pid})
        fill.join()
    wait_for("the end of the buffers", lambda: not any(space() for space in spaces))


def test_a_thread_that_hangs_leaves_the_rest_to_the_others(victim: Victim) -> None:
    where, data = random_chunks(victim, 16)
    stuck = threading.Event()

    class First(Chunks):
        def next(self, buffer: memoryview) -> tuple[int, memoryview] | None:
            found = super().next(buffer)
            if found is not None and found[0] == 0:
                stuck.wait()
            return found

    reader = First(data, parallel=8)
    reader.cold = True
    fill = Fill(reader, where, threading.Event(), Trace(), ahead=8 * 16 * WINDOW)
    fill.start()
    wait_for("everything to be read", lambda: reader.taken == 16)
    stuck.set()
    fill.release({PID: victim.pid})
    fill.join()
    assert all(contents(victim, place) == one for place, one in zip(where, data, strict=True))


@pytest.mark.parametrize(
    ("free", "expected"), [(1 << 40, 16), (16 * WINDOW * (1 + 16), 16), (16 * WINDOW * 9, 8), (1, 1)]
)
def test_memory_that_is_needed_is_not_used_to_read_ahead(
    victim: Victim, monkeypatch: pytest.MonkeyPatch, free: int, expected: int
) -> None:
    """One sixteenth of what is free beside the process, no more than there is to read, and one window at least."""
    monkeypatch.setattr("rewarm.memory.fill.available", lambda: free)
    where, data = random_chunks(victim, 16)
    reader = Chunks(data, parallel=1)
    fill = Fill(reader, where, threading.Event(), Trace(), ahead=1 << 40)
    fill.start()
    wait_for("the end of reading ahead", lambda: reader.finished == 1)
    assert reader.taken == expected
    fill.release({PID: victim.pid})
    fill.join()
    assert all(contents(victim, place) == one for place, one in zip(where, data, strict=True))


def test_memory_that_the_process_may_not_write() -> None:
    victim = Victim(2, mmap.PROT_READ)
    try:
        where, data = random_chunks(victim, 2)
        fill, _, _ = start(where, data)
        fill.start()
        fill.release({PID: victim.pid})
        with pytest.raises(RestoreError, match="Bad address"):
            fill.join()
        forced = [place._replace(flags=FORCED) for place in where]
        fill, _, _ = start(forced, data)
        fill.start()
        fill.release({PID: victim.pid})
        fill.join()
        assert all(contents(victim, place) == one for place, one in zip(where, data, strict=True))
    finally:
        victim.close()


def test_a_bad_chunk(victim: Victim) -> None:
    where, data = random_chunks(victim, 16)
    fill, reader, stop = start(where, data)
    reader.bad = 11
    fill.start()
    fill.release({PID: victim.pid})
    with pytest.raises(SnapshotDamaged, match="chunk 11"):
        fill.join()
    assert stop.is_set()


def test_a_process_that_vanishes(victim: Victim) -> None:
    where, data = random_chunks(victim, 16)
    fill, reader, _ = start(where, data)
    reader.pause = 0.1
    fill.start()
    fill.release({PID: victim.pid})
    victim.kill()
    with pytest.raises(RestoreError, match="the process has ended"):
        fill.join()


@pytest.mark.parametrize("forced", [False, True])
def test_a_mapping_that_is_not_there(victim: Victim, forced: bool) -> None:
    where, data = random_chunks(victim, 2)
    where[1] = where[1]._replace(base=0x1000, flags=FORCED if forced else 0)
    fill, _, _ = start(where, data)
    fill.start()
    fill.release({PID: victim.pid})
    with pytest.raises(RestoreError, match="at 0x1000"):
        fill.join()


def test_a_process_that_was_not_restored(victim: Victim) -> None:
    where, data = random_chunks(victim, 2)
    fill, _, _ = start(where, data)
    fill.start()
    with pytest.raises(RestoreError, match="process 7"):
        fill.release({PID + 1: victim.pid})
    fill.abandon()


def test_a_reader_that_forgets_a_chunk(victim: Victim) -> None:
    where, data = random_chunks(victim, 4)
    fill, _, _ = start(where, data[:3])
    fill.start()
    fill.release({PID: victim.pid})
    with pytest.raises(RestoreError, match="1 of 4 chunks"):
        fill.join()


def test_abandoned_threads_end_and_write_nothing(victim: Victim) -> None:
    where, data = random_chunks(victim, 16)
    fill, _, _ = start(where, data)
    fill.start()
    fill.abandon()
    assert all(task.wait(0) for task in fill._tasks)
    assert all(not any(contents(victim, place)) for place in where)
