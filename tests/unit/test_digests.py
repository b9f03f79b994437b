"""Digests that the GPU takes, on the fake driver: what it has not found is no digest."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from blake3 import blake3

from rewarm.gpu import blake3_ptx, kernels
from rewarm.gpu.digests import MOST, Digests, zeros
from rewarm.gpu.pieces import WINDOW
from rewarm_native.cuda import CudaError
from rewarm_native.device import Device
from support import fake_gpu
from support.fake_gpu import FakeGpus

GPU = fake_gpu.uuid(0)


class Windows(NamedTuple):
    """Device memory, and what is in it."""

    gpus: FakeGpus
    device: Device
    addresses: list[int]
    digests: list[bytes]


@pytest.fixture
def windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Windows]:
    gpus = FakeGpus(tmp_path / "gpus")
    for name, value in gpus.environment().items():
        monkeypatch.setenv(name, value)
    device = Device(str(gpus.libcuda), fake_gpu.uuid_bytes(GPU))
    [handle] = device.create([3 * WINDOW])
    base = device.map([(handle, 3 * WINDOW)])
    device.release(handle)
    data = [random.Random(1).randbytes(WINDOW), bytes(WINDOW), random.Random(2).randbytes(WINDOW)]
    addresses = [base + at * WINDOW for at in range(3)]
    for address, one in zip(addresses, data, strict=True):
        ctypes.memmove(address, one, WINDOW)
    yield Windows(gpus, device, addresses, [blake3(one).digest() for one in data])
    device.unmap(base, [3 * WINDOW])


def test_in_any_order_and_number(windows: Windows) -> None:
    digests = Digests(windows.device, str(windows.gpus.directory))
    assert digests.of(windows.addresses) == windows.digests
    assert digests.of([]) == []
    many = [at % 3 for at in range(MOST)]
    assert digests.of([windows.addresses[at] for at in many]) == [windows.digests[at] for at in many]
    assert windows.digests[1] == zeros()


def test_what_a_launch_does_not_write_is_no_digest(windows: Windows) -> None:
    """Not that of the launch before, either."""
    digests = Digests(windows.device, str(windows.gpus.directory))
    assert digests.of(windows.addresses) == windows.digests
    windows.gpus.node(fake_gpu.gpus(1), more=["kernel idle"])
    assert digests.of(windows.addresses) == [bytes(32)] * 3


@pytest.mark.parametrize("line", ["kernel idle", "kernel wrong", "compiler none"])
def test_a_kernel_is_tried_before_it_counts(windows: Windows, line: str) -> None:
    windows.gpus.node(fake_gpu.gpus(1), more=[line])
    with pytest.raises(CudaError):
        Digests(windows.device, str(windows.gpus.directory))


def test_a_kernel_is_kept(windows: Windows) -> None:
    def made() -> Digests:
        return Digests(windows.device, str(windows.gpus.directory))

    assert made().of(windows.addresses) == windows.digests
    (path,) = (windows.gpus.directory / "kernels").iterdir()
    whole = path.read_bytes()
    windows.gpus.node(fake_gpu.gpus(1), more=["compiler none"])
    assert made().of(windows.addresses) == windows.digests
    for damaged in (b"", whole[:40], whole[:-1], bytes([*whole[:50], whole[50] ^ 1, *whole[51:]])):
        path.write_bytes(damaged)
        with pytest.raises(CudaError, match="221"):
            made()
    windows.gpus.node(fake_gpu.gpus(1))
    assert made().of(windows.addresses) == windows.digests
    assert path.read_bytes() == whole, "what was damaged is made anew"


@pytest.mark.parametrize("line", ["compiler broken", "compiler useless"])
def test_what_the_linker_cannot_do_loading_can(windows: Windows, line: str) -> None:
    """It makes nothing, or nothing that can be loaded; then it is not kept."""
    windows.gpus.node(fake_gpu.gpus(1), more=[line])
    assert Digests(windows.device, str(windows.gpus.directory)).of(windows.addresses) == windows.digests
    assert not (windows.gpus.directory / "kernels").exists()


def test_a_kept_kernel_that_the_driver_does_not_take(windows: Windows) -> None:
    """As that of another version may be: it is made anew, too."""
    text = blake3_ptx.text(windows.device.capability)
    path = kernels.place(str(windows.gpus.directory), windows.device.version, windows.device.capability, text)
    kernels.keep(path, b"of another driver")
    assert Digests(windows.device, str(windows.gpus.directory)).of(windows.addresses) == windows.digests
    assert kernels.find(path) not in (None, b"of another driver")
