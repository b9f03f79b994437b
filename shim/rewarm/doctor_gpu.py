"""The check of what GPU containers need: NVIDIA's driver, and GPUs in a state in which it can move memory."""

from __future__ import annotations

import os

from rewarm import installation
from rewarm.checks import OK, WARNING, Check, Node
from rewarm.errors import GpuError

_LOADED = "/proc/driver/nvidia"


def gpus(node: Node) -> Check:
    """A node without a driver, or with one that is not to be looked for, has nothing to check. Raises GpuError."""
    if node.settings.libcuda == "auto" and not os.path.isdir(_LOADED):
        return Check("GPUs", OK, "none: no NVIDIA driver is loaded")
    from rewarm.gpu import library
    from rewarm.gpu.nvml import Nvml

    driver = library.load(node.settings.libcuda)
    nvml = Nvml(node.settings.libcuda)
    inventory = nvml.inventory
    found = f"{len(inventory.devices)} with driver {inventory.driver} ({library.find(node.settings.libcuda)})"
    if inventory.unreadable:
        step = "run `nvidia-smi`, and look for Xid lines in `dmesg`: its containers start cold"
        return Check("GPUs", WARNING, f"{found}; NVML cannot read {', '.join(inventory.unreadable)}", step)
    sliced = [device.gpu.uuid for device in inventory.devices if device.mig]
    if sliced:
        step = "turn MIG off on GPUs whose containers are to be captured"
        return Check("GPUs", WARNING, f"{found}; in MIG mode: {', '.join(sliced)}", step)
    asleep = nvml.not_persistent()
    if asleep:
        # cuda.h of 13.0 asks for it, or for a process that keeps the driver initialised.
        step = "run nvidia-persistenced, or `nvidia-smi -pm 1`"
        return Check("GPUs", WARNING, f"{found}; persistence mode is off on {', '.join(asleep)}", step)
    if driver.version < library.NEEDED_FOR_MAP:
        step = "update the driver to 580 or newer"
        return Check("GPUs", WARNING, f"{found}; it restores to the GPU of the capture only", step)
    if not os.path.isfile(installation.device_memory()):
        step = "reinstall rewarm: all device memory goes by way of the driver"
        return Check("GPUs", WARNING, f"{found}; the device memory library is not installed", step)
    try:
        library.compiler(node.settings.libcuda)
    except GpuError as error:
        step = "install the whole driver: device memory is verified by the processors, which takes longer"
        return Check("GPUs", WARNING, f"{found}; the driver's compiler cannot be used: {error.cause}", step)
    if driver.has_custom_storage:
        found += "; the driver's own custom storage is there, and not used yet"
    return Check("GPUs", OK, found)
