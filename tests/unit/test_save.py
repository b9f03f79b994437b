"""Device memory on its way into a snapshot, on the fake driver: right whatever the program does once it goes on."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from rewarm.errors import GpuError
from rewarm.gpu import host
from rewarm.gpu.digests import Digests
from rewarm.gpu.pieces import WINDOW, ZEROS, Piece, Span
from rewarm.gpu.save import Save
from rewarm_native.device import Device
from support import fake_gpu
from support.fake_gpu import FakeGpus

GPU = fake_gpu.uuid(0)
LIMIT = 20.0


class Program:
    """Memory of the GPU as a program has it: pieces whose windows are zeros where `content` has None."""

    def __init__(self, gpus: FakeGpus, *contents: Sequence[bytes | None]) -> None:
        self.device = Device(str(gpus.libcuda), fake_gpu.uuid_bytes(GPU))
        self.contents = contents
        self.places: list[tuple[int, int, Span, int]] = []
        self.mapped: list[tuple[int, int]] = []
        for number, content in enumerate(contents):
            size = len(content) * WINDOW
            [handle] = self.device.create([size])
            address = self.device.map([(handle, size)])
            for at, data in enumerate(content):
                ctypes.memmove(address + at * WINDOW, data or bytes(WINDOW), WINDOW)
            self.places.append((7, 0, Span((number + 1) << 32, size), self.device.give([handle])[0]))
            self.device.release(handle)
            self.mapped.append((address, size))

    def goes_on(self) -> None:
        """All of its memory changes."""
        for address, size in self.mapped:
            ctypes.memset(address, 0x5A, size)

    def end(self) -> None:
        for address, size in self.mapped:
            self.device.unmap(address, [size])
        for _, _, _, fd in self.places:
            os.close(fd)


class Store:
    """Takes chunks, once it may."""

    def __init__(self) -> None:
        self.may = threading.Event()
        self.chunks: list[bytes] = []
        self.lock = threading.Lock()

    def add(self, data: memoryview) -> int:
        assert self.may.wait(LIMIT)
        with self.lock:
            self.chunks.append(bytes(data))
            return len(self.chunks) - 1

    def is_right(self, pieces: Sequence[Piece], contents: Sequence[Sequence[bytes | None]]) -> bool:
        assert len(pieces) == len(contents)
        for piece, content in zip(pieces, contents, strict=True):
            found = [None if chunk == ZEROS else self.chunks[chunk] for chunk in piece.chunks]
            if found != list(content):
                return False
        return True


def windows(pattern: str, seed: int = 1) -> list[bytes | None]:
    """Random windows where the pattern has an x, zeros where it has a dot."""
    source = random.Random(seed)
    return [source.randbytes(WINDOW) if letter == "x" else None for letter in pattern]


@pytest.fixture
def gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeGpus:
    found = FakeGpus(tmp_path / "gpus")
    for name, value in found.environment().items():
        monkeypatch.setenv(name, value)
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_CACHE_DISABLE"):
        monkeypatch.setenv(name, GPU if name == "CUDA_VISIBLE_DEVICES" else "1")  # taken back afterwards
    return found


def left() -> tuple[int, int]:
    """Descriptors and mappings of the fake's device memory in this process."""
    with open("/proc/self/maps", encoding="ascii") as maps:
        mapped = sum("memfd:device" in line for line in maps)
    links = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            links.append(os.readlink(f"/proc/self/fd/{name}"))
    return mapped, sum("memfd:device" in link for link in links)


@pytest.fixture
def nothing_left() -> Iterator[None]:
    before = left()
    yield
    assert left() == before


def begin(gpus: FakeGpus, program: Program, store: Store, others: int = 0, threads: int = 3, share: int = 50) -> Save:
    save = Save(str(gpus.libcuda), [GPU], str(gpus.directory), store.add, threads, share)
    save.start(program.places, [others], LIMIT)
    return save


@pytest.mark.parametrize("compiler", [True, False])
def test_the_program_goes_on_while_its_memory_is_stored(gpus: FakeGpus, nothing_left: None, compiler: bool) -> None:
    if not compiler:
        (gpus.directory / "libnvidia-ptxjitcompiler.so.1").unlink()
    program, store = Program(gpus, windows("x.xxx..x"), windows("xx" * 12, 2), windows("....", 3)), Store()
    save = begin(gpus, program, store)
    assert save.detached
    program.goes_on()
    assert not store.chunks
    store.may.set()
    assert store.is_right(save.join(LIMIT), program.contents)
    assert len(store.chunks) == 5 + 24
    save.close()
    program.end()


def test_no_room_for_a_copy(gpus: FakeGpus, nothing_left: None, monkeypatch: pytest.MonkeyPatch) -> None:
    program, store = Program(gpus, windows("xxxx..")), Store()
    # Of what is free beside the program's, the copy would be more than half.
    monkeypatch.setenv("FAKE_LIMIT", str((6 + 7) * WINDOW))
    save = begin(gpus, program, store)
    assert not save.detached
    store.may.set()
    assert store.is_right(save.join(LIMIT), program.contents)
    save.close()
    program.end()


@pytest.mark.parametrize(("free", "others", "detached"), [(8, 0, True), (8, 1, False), (18, 10, True), (2, 8, False)])
def test_what_the_program_has_to_get_back_is_left_free(
    gpus: FakeGpus, nothing_left: None, monkeypatch: pytest.MonkeyPatch, free: int, others: int, detached: bool
) -> None:
    program, store = Program(gpus, windows("x.xx.x")), Store()
    monkeypatch.setenv("FAKE_LIMIT", str((6 + free) * WINDOW))
    store.may.set()
    save = begin(gpus, program, store, others=others * WINDOW)
    assert save.detached is detached
    assert store.is_right(save.join(LIMIT), program.contents)
    save.close()
    program.end()


def test_zeros_alone_are_nothing_to_store(gpus: FakeGpus, nothing_left: None) -> None:
    program, store = Program(gpus, windows("." * 40)), Store()
    save = begin(gpus, program, store)
    assert save.detached
    assert store.is_right(save.join(LIMIT), program.contents)
    assert not store.chunks
    save.close()
    program.end()


@pytest.mark.parametrize("kernel", ["idle-later", "wrong-later", "zeros-later"])
def test_a_kernel_that_is_wrong_makes_no_zeros(gpus: FakeGpus, nothing_left: None, kernel: str) -> None:
    """No digest is not the digest of zeros, and some of what it takes for zeros is looked at."""
    gpus.node(fake_gpu.gpus(1), more=[f"kernel {kernel}"])
    program, store = Program(gpus, windows("xxxxx..xx")), Store()
    store.may.set()
    save = begin(gpus, program, store)
    assert store.is_right(save.join(LIMIT), program.contents)
    save.close()
    program.end()


def test_no_copy_unless_it_is_wanted(gpus: FakeGpus, nothing_left: None) -> None:
    program, store = Program(gpus, windows("xx.x")), Store()
    store.may.set()
    save = begin(gpus, program, store, share=0)
    assert not save.detached
    assert store.is_right(save.join(LIMIT), program.contents)
    assert len(store.chunks) == 3
    save.close()
    program.end()


def test_others_were_faster(gpus: FakeGpus, nothing_left: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The room for the copy is gone when it is made."""
    program, store = Program(gpus, windows("x" * 600)), Store()
    monkeypatch.setenv("FAKE_LIMIT", str(1200 * WINDOW - WINDOW))
    monkeypatch.setattr(Device, "free", lambda self: 10_000 * WINDOW)
    store.may.set()
    save = begin(gpus, program, store)
    assert not save.detached
    assert store.is_right(save.join(LIMIT), program.contents)
    save.close()
    program.end()


def test_a_start_that_takes_too_long(gpus: FakeGpus, nothing_left: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is closed under it, and it does nothing more when it goes on."""
    program, goes_on, asked = Program(gpus, windows("x" * 4), windows("x" * 4, 2)), threading.Event(), []
    original = Digests.of

    def of(self: Digests, addresses: Sequence[int]) -> list[bytes]:
        asked.append(len(addresses))
        assert goes_on.wait(LIMIT)
        return original(self, addresses)

    save = Save(str(gpus.libcuda), [GPU], str(gpus.directory), lambda data: 0, 2, 50)
    monkeypatch.setattr(Digests, "of", of)
    with pytest.raises(GpuError, match=r"more than 0\.2 s"):
        save.start(program.places, [0], 0.2)
    save.close()
    assert save._host.devices, "the contexts are closed under a thread"
    goes_on.set()
    assert save._starting is not None and save._starting.wait(LIMIT)
    assert asked == [4] and not save.detached
    save.close()
    program.end()


@pytest.mark.parametrize("share", [0, 50])
def test_a_store_that_hangs(gpus: FakeGpus, nothing_left: None, share: int) -> None:
    """The memory of the program, or the copy, is let go of while a thread is in the store."""
    program, store = Program(gpus, windows("x" * 40)), Store()
    before = left()
    save = begin(gpus, program, store, share=share)
    with pytest.raises(GpuError, match="more than"):
        save.join(0.3)
    save.close()
    assert left() == before
    store.may.set()
    for task in save._tasks:
        assert task.wait(LIMIT)
    program.end()


def test_a_slow_store_holds_up_nobody(gpus: FakeGpus, nothing_left: None) -> None:
    """From a copy it may take as long as it does, as long as something is stored."""
    program, store = Program(gpus, windows("x" * 8)), Store()

    def slowly(data: memoryview) -> int:
        time.sleep(0.3)
        return store.add(data)

    store.may.set()
    save = Save(str(gpus.libcuda), [GPU], str(gpus.directory), slowly, 1, 50)
    save.start(program.places, [0], LIMIT)
    assert save.detached
    assert store.is_right(save.join(1.0), program.contents)
    save.close()
    program.end()


@pytest.mark.parametrize("detached", [True, False])
def test_a_store_that_fails(
    gpus: FakeGpus, nothing_left: None, monkeypatch: pytest.MonkeyPatch, detached: bool
) -> None:
    program = Program(gpus, windows("x" * 40))
    if not detached:
        monkeypatch.setenv("FAKE_LIMIT", str(50 * WINDOW))

    def add(_data: memoryview) -> int:
        raise GpuError("store", "chunk", "no space left")

    save = Save(str(gpus.libcuda), [GPU], str(gpus.directory), add, 2, 50)
    save.start(program.places, [0], LIMIT)
    assert save.detached is detached
    with pytest.raises(GpuError, match="no space left"):
        save.join(LIMIT)
    save.close()
    program.end()


def test_closed_in_the_middle(gpus: FakeGpus, nothing_left: None) -> None:
    program, store = Program(gpus, windows("x" * 40)), Store()
    save = begin(gpus, program, store)
    threading.Timer(0.2, store.may.set).start()
    save.close()
    program.end()


def test_the_environment_names_the_gpu(gpus: FakeGpus) -> None:
    host.prepare([GPU])
    assert os.environ["CUDA_VISIBLE_DEVICES"] == GPU
    assert os.environ["CUDA_CACHE_DISABLE"] == "1"
