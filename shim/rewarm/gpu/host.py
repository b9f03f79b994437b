"""GPUs as rewarm itself uses them: to fill device memory that a container gets, and to read what it had."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from contextlib import suppress

from rewarm import aside
from rewarm.aside import Task
from rewarm.errors import GpuError
from rewarm.trace import Trace
from rewarm_native import memory
from rewarm_native.cuda import OUT_OF_MEMORY, CudaError
from rewarm_native.device import Device

from . import container, library
from .pieces import WINDOW


class Ring:
    """Buffers that are to be pinned: in huge pages, which take a tenth of the time, and there already, which is most of
    the rest, and needs no GPU."""

    def __init__(self, count: int, size: int = WINDOW) -> None:
        """So many buffers of `size` bytes. Raises GpuError."""
        try:
            self.space = mmap.mmap(-1, count * size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            cause = error.strerror or str(error)
            raise GpuError(
                "map memory of", f"{count * size} bytes", cause, "see the limits of who calls rewarm"
            ) from None
        with suppress(OSError):
            self.space.madvise(mmap.MADV_HUGEPAGE)
        with suppress(OSError):
            memory.populate(self.space)
        view = memoryview(self.space)
        self.buffers = [view[at : at + size] for at in range(0, len(view), size)]


class Host:
    """A CUDA context of this process on each of some GPUs, and pinned memory that all of them reach."""

    def __init__(self, libcuda: str, uuids: Sequence[str]) -> None:
        """`libcuda` is the setting. Takes some tenths of a second, and some hundred MB on each GPU. Raises GpuError."""
        path = library.find(libcuda)
        self._rings: list[Ring] = []
        self.devices: list[Device] = []
        for uuid in uuids:
            try:
                self.devices.append(Device(path, container.uuid_bytes(uuid)))
            except (OSError, LookupError, CudaError) as error:
                self.close()
                raise failed("use", uuid, error) from None
        self._uuids = uuids

    def pin(self, ring: Ring) -> list[memoryview]:
        """Its buffers, which all of the GPUs reach from now on. Raises GpuError."""
        self._rings.append(ring)
        if self.devices:
            try:
                self.devices[0].enter()
                self.devices[0].pin(ring.space)
            except CudaError as error:
                raise failed("pin memory for", self._uuids[0], error) from None
        return ring.buffers

    def close(self) -> None:
        """Let go of the GPUs; what others have of their memory stays."""
        for device in self.devices:
            with suppress(CudaError):  # a GPU that has failed: this process's end does it
                device.close()
        self.devices = []


class Opening:
    """A Host that is opened in a thread, while there are other things to do."""

    def __init__(self, libcuda: str, uuids: Sequence[str], state_dir: str, trace: Trace) -> None:
        """`libcuda` and `state_dir` are the settings."""
        self.uuids = uuids
        self.state_dir = state_dir
        self._libcuda = libcuda
        self._trace = trace
        self._host: Host | None = None
        self._failure: Exception | None = None
        self._has_compiler = False
        self._task = Task(self._open, "device")
        self._compiler = Task(self._load_compiler, "compiler")

    def start(self) -> None:
        """Raises RestoreError if no thread can be made."""
        prepare(self.uuids)
        self._task.start()
        self._compiler.start()

    def has_compiler(self) -> bool:
        """Whether the driver can compile; known before the GPUs are open."""
        self._compiler.wait()
        return self._has_compiler

    def wait(self) -> Host:
        """What was opened, its compiler as well. Raises GpuError."""
        self._task.wait()
        if self._failure is not None:
            raise self._failure
        assert self._host is not None
        self._compiler.wait()
        return self._host

    def close(self) -> None:
        """Let go of the GPUs, unless opening them hangs."""
        if aside.wait([self._task]) and self._host is not None:
            self._host.close()

    def _open(self) -> None:
        try:
            with self._trace.phase("device.open"):
                self._host = Host(self._libcuda, self.uuids)
        except Exception as error:
            self._failure = error  # raised by `wait`

    def _load_compiler(self) -> None:
        self._has_compiler = library.load_compiler(self._libcuda)


def prepare(uuids: Sequence[str]) -> None:
    """Have the driver look at these GPUs only: on a node with eight, the others would take most of the time. While
    no other thread is in the driver: the environment is not made for several."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(uuids)
    os.environ.pop("CUDA_DEVICE_ORDER", None)
    # Hardware queues of a context: half the time to make one is theirs, and one of them keeps PCIe as busy as eight.
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    os.environ["CUDA_CACHE_DISABLE"] = "1"  # what is compiled for rewarm is kept by kernels.py, and in nobody's home


def failed(operation: str, uuid: str, error: Exception) -> GpuError:
    """What the driver has said, as an error about a GPU."""
    if isinstance(error, CudaError) and error.code == OUT_OF_MEMORY:
        return GpuError(operation, uuid, "the GPU has not enough free memory", "see who uses it with `nvidia-smi`")
    return GpuError(operation, uuid, str(error), "look for Xid lines in `dmesg`")
