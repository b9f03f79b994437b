"""Which GPUs of a node a container's OCI spec gives it.

Pure, but for `device_at`, through which bind-mounted device nodes are looked at. Whatever makes the spec (a `--device`
flag, a Kubernetes device plugin, CDI) ends in device nodes, and those are believed first, by major and minor number:
a path in a container may be called anything. Only where an NVIDIA runtime or hook adds the devices later,
NVIDIA_VISIBLE_DEVICES says which (nvidia-container-toolkit, internal/config/image and
cmd/nvidia-container-runtime-hook; libnvidia-container for indices and UUID prefixes). MIG slices are refused: the
driver cannot checkpoint them.
"""

from __future__ import annotations

import os
import stat

from .errors import shown
from .gpu_pairs import MINORS, described

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence
    from typing import Any

    from .gpu_pairs import Gpu

    DeviceAt = Callable[[str], tuple[int, int] | None]

MAJOR = 195
"""The driver's registered major (Documentation/admin-guide/devices.txt, "Nvidia graphics devices")."""
CAPS = "/dev/nvidia-caps/nvidia-cap"
# nvidia-caps: 1 and 2 are MIG's configuration and monitor, then 9 for each of 15 instances of 32 GPUs, then fabric
# management (open-gpu-kernel-modules, kernel-open/nvidia/nv-caps.c).
_MIG_CAPS = range(3, 3 + 32 * 15 * 9)
_LISTED = "/var/run/nvidia-container-devices"
_MOST = 1024  # names in NVIDIA_VISIBLE_DEVICES; more is no list of GPUs


class Unresolved(Exception):
    """The spec gives GPUs that are not there or that cannot be used. `str`: the cause, on one line, naming what was
    asked for and what is there;  next_step: what to do about it, or "".
    """

    def __init__(self, cause: str, next_step: str = "") -> None:
        super().__init__(cause)
        self.next_step = next_step


def device_at(path: str) -> tuple[int, int] | None:
    """(major, minor) of the character device that `path` leads to on this node; None for anything else."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return (os.major(found.st_rdev), os.minor(found.st_rdev)) if stat.S_ISCHR(found.st_mode) else None


def majors(proc_devices: str, *names: str) -> frozenset[int]:
    """The majors under one of `names` among the character devices of the text of /proc/devices."""
    found = set()
    for line in proc_devices.partition("Block devices:")[0].splitlines():
        number, _, name = line.strip().partition(" ")
        if name in names and number.isdecimal():
            found.add(int(number))
    return frozenset(found)


def asks_for_gpus(
    spec: dict[str, Any], *, proc_devices: str = "", low_level: str = "runc", device_at: DeviceAt = device_at
) -> bool:
    """Whether `visible` finds a GPU, or refuses one; needs no inventory, and raises nothing. Parameters as there.

    It says yes to any name in NVIDIA_VISIBLE_DEVICES, whatever it turns out to mean.
    """
    if any(True for _ in _minors(spec, proc_devices, device_at)) or _mig_node(spec, proc_devices, device_at):
        return True
    return injected(spec, low_level)


def count(spec: dict[str, Any], *, proc_devices: str = "", device_at: DeviceAt = device_at) -> int:
    """How many GPUs the spec gives the container by device nodes."""
    return len({minor for minor, _ in _minors(spec, proc_devices, device_at)})


def injected(spec: dict[str, Any], low_level: str = "runc") -> bool:
    """Whether somebody after rewarm adds GPUs by the spec's environment, besides those that the spec gives itself."""
    return _injects(spec, low_level) and _words(spec) not in ([], ["none"])


def visible(
    spec: dict[str, Any],
    inventory: Sequence[Gpu],
    *,
    mig_minors: Collection[int] = (),
    proc_devices: str = "",
    low_level: str = "runc",
    device_at: DeviceAt = device_at,
) -> tuple[Gpu, ...]:
    """The GPUs of the container with this spec, in the order of minor numbers.

    inventory: the node's GPUs in PCI order, which is that of their indices;  mig_minors: minor numbers of those in MIG
    mode;  proc_devices: the text of /proc/devices;  low_level: name or path of the runtime below rewarm.
    Raises Unresolved.
    """
    if name := _mig_node(spec, proc_devices, device_at):
        raise _mig(f"device {shown(name)} is of a MIG instance")
    found: dict[int, Gpu] = {}
    for minor, name in _minors(spec, proc_devices, device_at):
        gpu = next((gpu for gpu in inventory if gpu.minor == minor), None)
        if gpu is None:
            raise _missing(f"device {shown(name)} with minor number {minor}", inventory)
        found[minor] = gpu
    if not found and _injects(spec, low_level):
        words = _words(spec)
        if len(words) > _MOST:
            raise Unresolved(f"NVIDIA_VISIBLE_DEVICES lists {len(words)} names, at most {_MOST} are understood")
        for word in words:
            found.update((gpu.minor, gpu) for gpu in _named(word, inventory))
    for gpu in found.values():
        if gpu.minor in mig_minors:
            raise _mig(f"{gpu.uuid} (/dev/nvidia{gpu.minor}) is in MIG mode")
    return tuple(found[minor] for minor in sorted(found))


def _minors(spec: dict[str, Any], proc_devices: str, device_at: DeviceAt) -> Iterator[tuple[int, str]]:
    """(minor number, path) of every device node of a GPU in the spec."""
    known = majors(proc_devices, "nvidia", "nvidia-frontend") or (MAJOR,)
    for path, major, minor in _nodes(spec, device_at):
        if major in known and minor < MINORS:
            yield minor, path


def _mig_node(spec: dict[str, Any], proc_devices: str, device_at: DeviceAt) -> str:
    """The path of a device node of a MIG instance in the spec, or ""."""
    known = majors(proc_devices, "nvidia-caps")
    for path, major, minor in _nodes(spec, device_at):
        if (major in known or path.startswith(CAPS)) and minor in _MIG_CAPS:
            return path
    return ""


def _nodes(spec: dict[str, Any], device_at: DeviceAt) -> Iterator[tuple[str, int, int]]:
    """(path in the container, major, minor) of every character device that the spec adds or bind-mounts."""
    linux = spec.get("linux")
    for device in _objects(linux.get("devices") if isinstance(linux, dict) else None):
        major, minor = device.get("major"), device.get("minor")
        if device.get("type") in ("c", "u") and type(major) is int and type(minor) is int and minor >= 0:
            yield str(device.get("path", "")), major, minor
    for mount in _objects(spec.get("mounts")):
        options = mount.get("options")
        bind = mount.get("type") == "bind" or (isinstance(options, list) and ("bind" in options or "rbind" in options))
        source = mount.get("source")
        if bind and isinstance(source, str) and (found := device_at(source)):
            yield str(mount.get("destination", "")), *found


def _injects(spec: dict[str, Any], low_level: str) -> bool:
    """Whether somebody after rewarm reads NVIDIA_VISIBLE_DEVICES and adds the GPUs that it names.

    CDI's own hooks (nvidia-ctk, nvidia-cdi-hook) add links and caches, never a device.
    """
    if "nvidia" in os.path.basename(low_level):
        return True
    hooks = spec.get("hooks")
    if not isinstance(hooks, dict):
        return False
    for stage in ("prestart", "createRuntime"):
        for hook in _objects(hooks.get(stage)):
            name = os.path.basename(str(hook.get("path", "")))
            if "nvidia-container-runtime-hook" in name or name == "nvidia-container-toolkit":  # the older name
                return True
    return False


def _words(spec: dict[str, Any]) -> list[str]:
    """What NVIDIA_VISIBLE_DEVICES names; `all` and `none` are alone in the list."""
    process = spec.get("process")
    lines = process.get("env") if isinstance(process, dict) else None
    lines = lines if isinstance(lines, list) else []
    env = dict(line.split("=", 1) for line in lines if isinstance(line, str) and "=" in line)
    value = env.get("NVIDIA_VISIBLE_DEVICES")
    if value is None:
        # An image from before NVIDIA_REQUIRE_CUDA says by CUDA_VERSION alone that it wants all.
        value = "all" if env.get("CUDA_VERSION") and not env.get("NVIDIA_REQUIRE_CUDA") else ""
    if value.strip() == _LISTED:
        words = list(_volumes(spec))
    else:
        words = [word for word in map(str.strip, value.split(",")) if word]
    if "void" in words:
        return []
    return next(([word] for word in ("none", "all") if word in words), words)


def _volumes(spec: dict[str, Any]) -> Iterator[str]:
    """The names that a device plugin gives as mounts of /dev/null, which a pod cannot set by its environment."""
    for mount in _objects(spec.get("mounts")):
        path = os.path.normpath(str(mount.get("destination", "")))
        if mount.get("source") == "/dev/null" and path.startswith(_LISTED + "/"):
            kind, _, name = path.removeprefix(_LISTED + "/").removeprefix("cdi/").rpartition("/")
            yield f"{kind}={name}" if kind else name


def _named(word: str, inventory: Sequence[Gpu]) -> Sequence[Gpu]:
    """The GPUs that one word of NVIDIA_VISIBLE_DEVICES, or a CDI name, means."""
    name = word
    kind, equals, tail = word.partition("=")
    if equals:
        vendor, _, what = kind.partition("/")
        if what != "gpu" or not (vendor == "nvidia.com" or vendor.endswith(".nvidia.com")):
            raise Unresolved(f"NVIDIA_VISIBLE_DEVICES names {shown(word)}, which is no GPU", "name GPUs by UUID")
        # nvidia-ctk names them by index, by type and index (gpu0), or by UUID: --device-name-strategy.
        name = tail.removeprefix("gpu") if tail[3:].isdecimal() else tail
    if name in ("none", "void"):
        return ()
    if name == "all":
        return inventory
    if name.upper().startswith("MIG-") or _is_slice(name):
        raise _mig(f"NVIDIA_VISIBLE_DEVICES names the MIG device {shown(word)}")
    if name.isascii() and name.isdecimal() and len(name) <= 4 and name == str(int(name)):
        if int(name) < len(inventory):
            return (inventory[int(name)],)
        raise _missing(f"index {name}", inventory)
    if name[:4].upper() == "GPU-" and len(name) > 4:
        fitting = [gpu for gpu in inventory if gpu.uuid.lower().startswith(name.lower())]
        if len(fitting) > 1:
            uuids = ", ".join(gpu.uuid for gpu in fitting[:4])
            raise Unresolved(f"NVIDIA_VISIBLE_DEVICES names {shown(word)}, which could be {uuids}", "name all of it")
        if fitting:
            return fitting
    raise _missing(shown(word), inventory)


def _is_slice(name: str) -> bool:
    """`0:0`, `mig0:0`: instance by index. A PCI address has more in it."""
    gpu, colon, instance = name.removeprefix("mig").partition(":")
    return bool(colon) and gpu.isdecimal() and instance.isdecimal()


def _missing(what: str, inventory: Sequence[Gpu]) -> Unresolved:
    there = ", ".join(f"{gpu.minor} {gpu.uuid}" for gpu in inventory[:8]) + ", …" * (len(inventory) > 8)
    text = f"{described(inventory)}: {there}" if inventory else "none"
    return Unresolved(f"this container is given GPU {what}, this node has {text}", "look at `nvidia-smi -L`")


def _mig(cause: str) -> Unresolved:
    return Unresolved(f"{cause}; the driver cannot checkpoint MIG devices", "give the container a whole GPU")


def _objects(value: object) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []
