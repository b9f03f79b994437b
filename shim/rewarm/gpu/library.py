"""Where NVIDIA's user-space driver is on this node: libcuda.so.1, with libnvidia-ml.so.1 beside it.

It is loaded into a process of root, so only fixed places are looked at, never the loader's path of whoever called, and
only a file that nobody but root can have written (the directories on the way are the operator's to keep).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence

from rewarm.errors import GpuError
from rewarm_native.cuda import Driver, MissingSymbol, preload

NAME = "libcuda.so.1"
PLACES = (
    # The system's, by distribution.
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib/aarch64-linux-gnu",
    "/usr/lib64",
    "/usr/lib",
    # Images and managed nodes (GKE's device plugin among them).
    "/usr/local/nvidia/lib64",
    "/usr/local/nvidia/lib",
    "/home/kubernetes/bin/nvidia/lib64",
    # The GPU operator's driver container.
    "/run/nvidia/driver/usr/lib/x86_64-linux-gnu",
    "/run/nvidia/driver/usr/lib/aarch64-linux-gnu",
    "/run/nvidia/driver/usr/lib64",
)
COMPILER = "libnvidia-ptxjitcompiler.so.1"
"""What the driver loads to compile PTX: it belongs to the driver and lies beside it."""
NEEDED = "570"
"""The first driver with the process checkpoint API (cuda.h of CUDA 12.8)."""
NEEDED_FOR_MAP = 13000
"""CUDA version of driver 580, the first that can restore to another GPU."""

_SETTING = "see `libcuda` in the settings"
# e_ident[EI_CLASS] and e_machine of elf.h.
_MACHINES = {"x86_64": (2, 62), "aarch64": (2, 183)}
_MACHINE_NAMES = {3: "x86", 40: "arm", 62: "x86_64", 183: "aarch64"}


def find(setting: str, places: Sequence[str] = PLACES) -> str:
    """The path of libcuda.so.1: the setting's, or with "auto" the first place that has one. Raises GpuError."""
    if setting != "auto":
        _check(setting)
        return setting
    for place in places:
        path = os.path.join(place, NAME)
        if os.path.exists(path):
            _check(path)
            return path
    raise GpuError("find the NVIDIA driver", NAME, f"it is in none of {', '.join(places)}", _SETTING)


def load(setting: str) -> Driver:
    """The driver, ready for calls. Raises GpuError that says what is wrong with the library."""
    path = find(setting)
    try:
        return Driver(path)
    except MissingSymbol as error:
        raise GpuError(
            "load the NVIDIA driver",
            path,
            f"it has no {error}; driver {NEEDED} or newer is needed",
            "update the driver",
        ) from None
    except OSError as error:
        raise GpuError("load the NVIDIA driver", path, " ".join(str(error).split()), _SETTING) from None


def compiler(setting: str) -> str:
    """The path of the driver's compiler: that beside the driver, of the same version. Raises GpuError."""
    path = os.path.join(os.path.dirname(find(setting)), COMPILER)
    _check(path)
    return path


def load_compiler(setting: str) -> bool:
    """Load the driver's compiler, before the driver looks for it by its name and takes this one; whether it is there.
    Takes some hundredths of a second."""
    try:
        preload(compiler(setting))
    except (GpuError, OSError):
        return False
    return True


def _check(path: str) -> None:
    """Raises GpuError unless this is a shared library of this machine's architecture that only root can change."""
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            head = file.read(20) if stat.S_ISREG(status.st_mode) else b""
    except OSError as error:
        raise GpuError("read the NVIDIA driver", path, error.strerror or str(error), _SETTING) from None
    if head[:4] != b"\x7fELF" or len(head) < 20:
        raise GpuError("read the NVIDIA driver", path, "it is not a shared library", _SETTING)
    if status.st_uid != 0 or status.st_mode & 0o022:
        cause = f"owner {status.st_uid}, mode {stat.S_IMODE(status.st_mode):04o}: others than root may write it"
        raise GpuError("read the NVIDIA driver", path, cause, _SETTING)
    here = os.uname().machine
    machine = int.from_bytes(head[18:20], "little" if head[5] == 1 else "big")
    if here in _MACHINES and (head[4], machine) != _MACHINES[here]:
        found = _MACHINE_NAMES.get(machine, f"machine {machine}")
        cause = f"it is built for {found}{' (32 bits)' if head[4] == 1 else ''}, this machine is {here}"
        raise GpuError("read the NVIDIA driver", path, cause, _SETTING)
