"""What a manifest says of GPUs: those that the source had, and which of its processes hold device memory in theirs."""

from __future__ import annotations

from typing import NamedTuple

from rewarm_hooks import gpu_pairs

from . import fields
from .fields import Bad, Reader


class GpuDevice(NamedTuple):
    """A GPU as NVML names it: "GPU-…", its model, its memory in bytes, the minor number of its device node, its compute
    mode."""

    uuid: str
    model: str
    memory_bytes: int
    minor: int
    compute_mode: str

    @property
    def gpu(self) -> gpu_pairs.Gpu:
        return gpu_pairs.Gpu(self.uuid, self.model, self.memory_bytes, self.minor)


class Cuda(NamedTuple):
    """`processes`: those whose device memory the driver has moved into their own memory, by their number in the
    container; `used_bytes`: what they had of each GPU of `requires.gpus`, in that order; `served_bytes`: how much of
    all that does not go the driver's way, but in pieces (gpu/pieces.py); `served_zeros`: what of it is not stored."""

    processes: tuple[int, ...] = ()
    used_bytes: tuple[int, ...] = ()
    served_bytes: int = 0
    served_zeros: int = 0


def read_gpus(reader: Reader, key: str) -> tuple[GpuDevice, ...]:
    """Raises Bad."""
    devices = tuple(_device(one) for one in reader.objects(key))
    try:
        gpu_pairs.checked([device.gpu for device in devices], f"field {reader.path(key)}")
    except gpu_pairs.CannotPair as error:
        raise Bad(str(error)) from None
    return devices


def _device(reader: Reader) -> GpuDevice:
    device = GpuDevice(
        uuid=reader.text("uuid", 128),
        model=reader.text("model", 128),
        memory_bytes=reader.integer("memory_bytes"),
        minor=reader.integer("minor", 255),
        compute_mode=reader.text("compute_mode", 64),
    )
    reader.done()
    return device


def read_cuda(reader: Reader, gpus: int) -> Cuda:
    """Raises Bad."""
    cuda = Cuda(
        reader.integers("processes", fields.MAX_PID),
        reader.integers("used_bytes", fields.MAX_I64),
        reader.integer_or("served_bytes", 0),
        reader.integer_or("served_zeros", 0),
    )
    reader.done()
    if cuda.served_zeros > cuda.served_bytes:
        raise Bad(f"field {reader.path('served_zeros')} is more than served_bytes")
    if cuda.served_bytes and not cuda.processes:
        raise Bad(f"field {reader.path('served_bytes')} is of no process that uses CUDA")
    if len(set(cuda.processes)) != len(cuda.processes) or 0 in cuda.processes:
        raise Bad(f"field {reader.path('processes')} is no list of different processes")
    if cuda.processes and not gpus:
        raise Bad(f"field {reader.path('processes')} has processes that use CUDA, but there are no GPUs")
    if cuda.processes and len(cuda.used_bytes) != gpus:
        raise Bad(f"field {reader.path('used_bytes')} has {len(cuda.used_bytes)} entries for {gpus} GPUs")
    return cuda
