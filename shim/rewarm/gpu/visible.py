"""Which GPUs a live OCI spec gives a container, with rewarm's errors.

What a spec means is said in `rewarm_hooks.gpu_visible`, since the device-remap hook has to find the same GPUs. That is
imported once a container may have GPUs at all.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from rewarm.errors import Unfit

if TYPE_CHECKING:
    from rewarm_hooks.gpu_pairs import Gpu

_DEVICES = "/proc/devices"


def asks_for_gpus(spec: dict[str, Any], low_level: str = "runc") -> bool:
    """Whether the spec gives the container any GPU, one that is refused included; needs no driver and no inventory.

    low_level: name or path of the runtime below rewarm, which may be NVIDIA's.
    """
    from rewarm_hooks import gpu_visible

    return gpu_visible.asks_for_gpus(spec, proc_devices=_proc_devices(), low_level=low_level)


def count(spec: dict[str, Any]) -> int:
    """How many GPUs the spec gives the container by device nodes. Of the sources of bind mounts only those in /dev are
    looked at: a volume may take the question and not answer, and who starts a container cold must not wait for it."""
    from rewarm_hooks import gpu_visible

    def device_at(path: str) -> tuple[int, int] | None:
        return gpu_visible.device_at(path) if os.path.normpath(path).startswith("/dev/") else None

    return gpu_visible.count(spec, proc_devices=_proc_devices(), device_at=device_at)


def injected(spec: dict[str, Any], low_level: str) -> bool:
    """Whether NVIDIA's hook or runtime adds GPUs to what the spec gives, and with them bind mounts."""
    from rewarm_hooks import gpu_visible

    return gpu_visible.injected(spec, low_level)


def visible(
    spec: dict[str, Any], inventory: Sequence[Gpu], mig_minors: Collection[int] = (), low_level: str = "runc"
) -> tuple[Gpu, ...]:
    """The container's GPUs out of the node's `inventory` (in PCI order), in the order of minor numbers.

    mig_minors: minor numbers of GPUs in MIG mode;  low_level: as above. Raises Unfit for a GPU that is not there, and
    for MIG.
    """
    from rewarm_hooks import gpu_visible

    try:
        return gpu_visible.visible(
            spec, inventory, mig_minors=mig_minors, proc_devices=_proc_devices(), low_level=low_level
        )
    except gpu_visible.Unresolved as error:
        raise Unfit("find GPUs of", "this container", str(error), error.next_step) from error


def _proc_devices() -> str:
    try:
        with open(_DEVICES, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""  # the driver's registered major is known without it
