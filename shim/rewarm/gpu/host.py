"""GPUs as rewarm itself uses them: to fill device memory that a container gets, and to read what it had."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from contextlib import suppress

from rewarm.errors import GpuError
from rewarm_native.cuda import OUT_OF_MEMORY, CudaError
from rewarm_native.device import Device

from . import container, library
from .pieces import WINDOW


class Host:
    """A CUDA context of this process on each of some GPUs, and pinned memory that all of them reach."""

    def __init__(self, libcuda: str, uuids: Sequence[str], windows: int) -> None:
        """`libcuda` is the setting; `windows`: buffers of WINDOW bytes. Takes some tenths of a second, and some hundred
        MB on each GPU. Raises GpuError."""
        self._space = mmap.mmap(-1, windows * WINDOW, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        # Pinning goes page by page: with huge ones it takes a hundredth of the time.
        with suppress(OSError):
            self._space.madvise(mmap.MADV_HUGEPAGE)
        path = library.find(libcuda)
        self.devices: list[Device] = []
        for uuid in uuids:
            try:
                self.devices.append(Device(path, container.uuid_bytes(uuid)))
            except (OSError, LookupError, CudaError) as error:
                raise failed("use", uuid, error) from None
        view = memoryview(self._space)
        self.buffers = [view[at : at + WINDOW] for at in range(0, len(view), WINDOW)]
        if self.devices:
            try:
                self.devices[0].pin(self._space)
            except CudaError as error:
                raise failed("pin memory for", uuids[0], error) from None

    def close(self) -> None:
        """Let go of the GPUs; what others have of their memory stays."""
        for device in self.devices:
            with suppress(CudaError):  # a GPU that has failed: this process's end does it
                device.close()
        self.devices = []


def prepare(uuids: Sequence[str]) -> None:
    """Have the driver look at these GPUs only: on a node with eight, the others would take most of the time. While
    no other thread is in the driver: the environment is not made for several."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(uuids)
    os.environ.pop("CUDA_DEVICE_ORDER", None)


def failed(operation: str, uuid: str, error: Exception) -> GpuError:
    """What the driver has said, as an error about a GPU."""
    if isinstance(error, CudaError) and error.code == OUT_OF_MEMORY:
        return GpuError(operation, uuid, "the GPU has not enough free memory", "see who uses it with `nvidia-smi`")
    return GpuError(operation, uuid, str(error), "look for Xid lines in `dmesg`")
