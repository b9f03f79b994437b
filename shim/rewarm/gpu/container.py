"""The GPUs that a container has on this node: which they are, and what state they are in.

A container that has none costs looks at its spec, nothing else.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from rewarm import aside
from rewarm.errors import Unfit
from rewarm_hooks.gpu_pairs import Gpu

from . import visible

if TYPE_CHECKING:
    from .nvml import Device, Inventory, Nvml


EXCLUSIVE = "exclusive process"
"""The compute mode in which a GPU has one process."""


class ContainerGpus(NamedTuple):
    """The node's driver version ("" if that does not matter) and the container's GPUs in the order of minor numbers."""

    driver: str = ""
    devices: tuple[Device, ...] = ()


def uuid_bytes(uuid: str) -> bytes:
    """The 16 bytes of "GPU-ad04c04b-…", as cuda.h's CUuuid has them. ValueError for what is none."""
    found = bytes.fromhex(uuid.removeprefix("GPU-").replace("-", ""))
    if len(found) != _UUID_BYTES:
        raise ValueError(uuid)
    return found


_UUID_BYTES = 16
_loading = threading.Lock()


def begin(spec: dict[str, Any], low_level: str, libcuda: str) -> None:
    """Load NVML in a thread of its own if a container with this spec has GPUs: half of that is waiting for the driver.

    `nvml` waits for it, and says what is wrong. Raises RestoreError if no thread can be made.
    """
    # The look at the spec as well: it looks at the sources of bind mounts, which may hang.
    aside.Task(lambda: _try(spec, low_level, libcuda), "nvml").start()


def nvml(libcuda: str) -> Nvml:
    """NVML of this process, loaded once. `libcuda` is the setting. Raises GpuError."""
    with _loading:
        return _nvml(libcuda)


@cache
def _nvml(libcuda: str) -> Nvml:
    from .nvml import Nvml  # only for containers with GPUs

    return Nvml(libcuda)


def _try(spec: dict[str, Any], low_level: str, libcuda: str) -> None:
    with suppress(Exception):  # who needs it meets the error again
        if visible.asks_for_gpus(spec, low_level) and not visible.injected(spec, low_level):
            with _loading:
                _ = _nvml(libcuda).inventory


def of_spec(spec: dict[str, Any], low_level: str, libcuda: str) -> ContainerGpus:
    """The GPUs of a container with this spec. `low_level` is the runtime below rewarm.

    Raises Unfit for MIG, and for GPUs that are not there; GpuError if NVML does not answer.
    """
    if not visible.asks_for_gpus(spec, low_level):
        return ContainerGpus()
    if visible.injected(spec, low_level):
        cause = f"{low_level} would add them when it creates the container, but not when it restores it"
        if visible.injected(spec, "runc"):
            cause = "NVIDIA's hook adds them, with bind mounts that the spec does not have and CRIU could not dump"
        raise Unfit("find GPUs of", "this container", cause, "use CDI or device nodes, and runc below rewarm")
    found = nvml(libcuda).inventory
    try:
        gpus = visible.visible(spec, found.gpus, found.mig_minors, low_level)
    except Unfit as error:
        if not found.unreadable:
            raise
        cause = f"{error.cause}, and NVML cannot read {', '.join(found.unreadable)}"
        raise Unfit(
            error.operation, error.object, cause, "run `nvidia-smi`, and look for Xid lines in `dmesg`"
        ) from error
    return ContainerGpus(found.driver, tuple(found.device(gpu.uuid) for gpu in gpus))


def of_node(sources: Sequence[Gpu], libcuda: str) -> ContainerGpus:
    """The GPUs of this node that a container would best have for a snapshot of `sources`: the same ones, else some of
    the same kind; all of them if there are not enough. Raises GpuError."""
    found = nvml(libcuda).inventory
    return ContainerGpus(found.driver, _best(sources, found))


def _best(sources: Sequence[Gpu], found: Inventory) -> tuple[Device, ...]:
    wanted = {source.uuid for source in sources}
    free = [device for device in found.devices if not device.mig]
    chosen = [device for device in free if device.gpu.uuid in wanted]
    free = [device for device in free if device.gpu.uuid not in wanted]
    have = {device.gpu.uuid for device in chosen}
    for source in sources:
        kind = (source.model, source.memory_bytes)
        match = next((one for one in free if (one.gpu.model, one.gpu.memory_bytes) == kind), None)
        if source.uuid not in have and match is not None:
            free.remove(match)
            chosen.append(match)
    if len(chosen) < len(sources):
        return found.devices
    return tuple(sorted(chosen, key=lambda device: device.gpu.minor))
