"""Memory of the GPU in this process: all pieces of a call, or none of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from rewarm_native.cuda import OUT_OF_MEMORY, CudaError
from rewarm_native.device import Device
from support import fake_gpu, loads
from support.fake_gpu import FakeGpus

SIZE = 2 << 20


@pytest.fixture
def gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpus]:
    with loads.gpus(tmp_path, monkeypatch) as found:
        yield found


@pytest.fixture
def device(gpus: FakeGpus) -> Iterator[Device]:
    found = Device(str(gpus.libcuda), fake_gpu.uuid_bytes(loads.GPU))
    yield found
    found.close()


def test_one_behind_the_other(device: Device) -> None:
    sizes = [SIZE, 3 * SIZE, 2 * SIZE]
    handles = device.create(sizes)
    assert len(set(handles)) == 3
    base = device.map(list(zip(handles, sizes, strict=True)))
    device.unmap(base, sizes)
    fds = device.give(handles)
    assert [os.fstat(fd).st_size for fd in fds] == sizes
    for fd in fds:
        os.close(fd)
    for handle in handles:
        device.release(handle)


def test_none_is_asked_for(device: Device) -> None:
    assert device.create([]) == []
    assert device.give([]) == []


def test_one_that_does_not_fit(device: Device) -> None:
    """Those before it are given back."""
    device.enter()
    before = device.free()
    with pytest.raises(CudaError) as caught:
        device.create([SIZE, SIZE, 1 << 50, SIZE])
    assert (caught.value.code, caught.value.call) == (OUT_OF_MEMORY, "cuMemCreate")
    assert device.free() == before


def test_one_that_cannot_be_exported(device: Device) -> None:
    handles = device.create([SIZE, SIZE])
    [fd] = device.give(handles[:1])
    imported = device.take(fd)
    os.close(fd)
    open_before = os.listdir("/proc/self/fd")
    with pytest.raises(CudaError) as caught:
        device.give([*handles, imported])
    assert caught.value.call == "cuMemExportToShareableHandle"
    assert len(os.listdir("/proc/self/fd")) == len(open_before)


def test_one_that_cannot_be_mapped(device: Device) -> None:
    """The others are taken away again."""
    [handle] = device.create([SIZE])
    with pytest.raises(CudaError) as caught:
        device.map([(handle, SIZE), (handle, 2 * SIZE)])
    assert caught.value.call == "cuMemMap"
    before = device.free()
    device.release(handle)
    assert device.free() == before + SIZE, "it is mapped somewhere"
