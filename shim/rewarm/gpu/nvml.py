"""What NVML says of this node's GPUs, by nvidia-ml-py, which is imported when a container has a GPU and not before.

NVML's library lies beside libcuda and is loaded from there first: nvidia-ml-py looks for the name alone, and on a node
of the GPU operator no loader finds that.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Collection
from functools import cached_property
from typing import Any, NamedTuple

from rewarm.errors import GpuError
from rewarm_hooks.gpu_pairs import Gpu

from . import library

_NAME = "libnvidia-ml.so.1"
_MODES = {0: "default", 1: "exclusive thread", 2: "prohibited", 3: "exclusive process"}
"""nvmlComputeMode_t."""


class Device(NamedTuple):
    """A GPU of this node: what it is, its free memory in bytes, its compute mode, and whether it is in MIG mode."""

    gpu: Gpu
    free_bytes: int
    compute_mode: str
    mig: bool


class Inventory(NamedTuple):
    """The driver's version ("580.159.04"), the GPUs in the order of PCI addresses, and in words those that NVML cannot
    read: one that has fallen off the bus is no reason to start the containers of all others cold."""

    driver: str
    devices: tuple[Device, ...]
    unreadable: tuple[str, ...] = ()

    @property
    def gpus(self) -> tuple[Gpu, ...]:
        return tuple(device.gpu for device in self.devices)

    @property
    def mig_minors(self) -> frozenset[int]:
        return frozenset(device.gpu.minor for device in self.devices if device.mig)

    def device(self, uuid: str) -> Device:
        """The GPU with that UUID. Raises GpuError."""
        for device in self.devices:
            if device.gpu.uuid == uuid:
                return device
        raise GpuError("find GPU", uuid, "NVML does not list it", "look at `nvidia-smi -L`")


class Nvml:
    """NVML, initialised once for a process: that takes 13 ms with one GPU, and is never undone."""

    def __init__(self, libcuda: str) -> None:
        """`libcuda` is the setting. Raises GpuError if there is no driver, or NVML does not answer."""
        path = os.path.join(os.path.dirname(library.find(libcuda)), _NAME)
        try:
            ctypes.CDLL(path)
        except OSError as error:
            raise GpuError("load NVML", path, " ".join(str(error).split()), "see `libcuda` in the settings") from None
        try:
            import pynvml
        except ImportError as error:
            raise GpuError("load NVML", "nvidia-ml-py", str(error), "reinstall rewarm") from None
        self._nvml: Any = pynvml
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            raise self._error("initialise NVML", path, error) from None

    @cached_property
    def inventory(self) -> Inventory:
        """As it was when it was first asked for. Raises GpuError."""
        nvml = self._nvml
        try:
            count, driver = nvml.nvmlDeviceGetCount(), _text(nvml.nvmlSystemGetDriverVersion())
        except nvml.NVMLError as error:
            raise self._error("list the GPUs of", "this node", error) from None
        devices, unreadable = [], []
        for index in range(count):
            try:
                devices.append(self._device(nvml.nvmlDeviceGetHandleByIndex(index)))
            except nvml.NVMLError as error:
                unreadable.append(f"GPU {index} ({error})")
        return Inventory(driver, tuple(devices), tuple(unreadable))

    def free_bytes(self, uuid: str) -> int:
        """Free memory of a GPU. Raises GpuError."""
        try:
            return int(self._nvml.nvmlDeviceGetMemoryInfo(self._nvml.nvmlDeviceGetHandleByUUID(uuid)).free)
        except self._nvml.NVMLError as error:
            raise self._error("ask for the free memory of", uuid, error) from None

    def used_bytes(self, uuids: Collection[str], pids: Collection[int]) -> dict[str, dict[int, int]] | None:
        """What these processes (host pids) have of each GPU; None where NVML does not say. Raises GpuError."""
        found: dict[str, dict[int, int]] = {}
        for uuid in uuids:
            sizes = found[uuid] = {}
            for pid, size in self.processes(uuid):
                if pid in pids and size is None:
                    return None
                if pid in pids and size is not None:
                    sizes[pid] = sizes.get(pid, 0) + size
        return found if any(found.values()) else None

    def processes(self, uuid: str) -> list[tuple[int, int | None]]:
        """Host pid and bytes of every process that computes on a GPU, as far as NVML says. Raises GpuError."""
        nvml = self._nvml
        try:
            listed = nvml.nvmlDeviceGetComputeRunningProcesses(nvml.nvmlDeviceGetHandleByUUID(uuid))
        except nvml.NVMLError_NotSupported:
            return []
        except nvml.NVMLError as error:
            raise self._error("ask for the processes on", uuid, error) from None
        return [(int(one.pid), None if one.usedGpuMemory is None else int(one.usedGpuMemory)) for one in listed]

    def not_persistent(self) -> list[str]:
        """UUIDs of GPUs whose state the driver does not keep when nobody uses them. Raises GpuError."""
        nvml = self._nvml
        found = []
        for device in self.inventory.devices:
            try:
                handle = nvml.nvmlDeviceGetHandleByUUID(device.gpu.uuid)
                if nvml.nvmlDeviceGetPersistenceMode(handle) == nvml.NVML_FEATURE_DISABLED:
                    found.append(device.gpu.uuid)
            except (nvml.NVMLError_NotSupported, nvml.NVMLError_FunctionNotFound):
                continue
            except nvml.NVMLError as error:
                raise self._error("ask for the persistence mode of", device.gpu.uuid, error) from None
        return found

    def mps_clients(self, uuids: tuple[str, ...]) -> frozenset[int]:
        """Host pids that use these GPUs through MPS. Raises GpuError."""
        found: set[int] = set()
        for uuid in uuids:
            try:
                handle = self._nvml.nvmlDeviceGetHandleByUUID(uuid)
                found.update(int(one.pid) for one in self._nvml.nvmlDeviceGetMPSComputeRunningProcesses(handle))
            except self._nvml.NVMLError_NotSupported:
                continue
            except self._nvml.NVMLError as error:
                raise self._error("ask for the MPS clients of", uuid, error) from None
        return frozenset(found)

    def _device(self, handle: Any) -> Device:
        nvml = self._nvml
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        try:
            mig = nvml.nvmlDeviceGetMigMode(handle)[0] == nvml.NVML_DEVICE_MIG_ENABLE
        except nvml.NVMLError_NotSupported:
            mig = False
        gpu = Gpu(
            _text(nvml.nvmlDeviceGetUUID(handle)),
            _text(nvml.nvmlDeviceGetName(handle)),
            int(memory.total),
            int(nvml.nvmlDeviceGetMinorNumber(handle)),
        )
        mode = int(nvml.nvmlDeviceGetComputeMode(handle))
        return Device(gpu, int(memory.free), _MODES.get(mode, f"number {mode}"), mig)

    def _error(self, operation: str, object: str, error: Exception) -> GpuError:
        return GpuError(operation, object, f"NVML says: {error}", "run `nvidia-smi`")


def _text(value: str | bytes) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
