"""What a container on the machine with the GPU is made of: an overlay over /, its Python, the driver, device nodes.

With REWARM_GPU_FAKE=1 it is the base layer of the other tests and a stand-in for every program: the whole control flow
of tests/gpu and bench/gpu.py on a machine without a GPU.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support import rootfs
from support.bundle import Bundle, bind, device
from support.gpu import layer

FAKE = os.environ.get("REWARM_GPU_FAKE") == "1"
CONTROL = Path("/dev/nvidiactl")
_DRIVER_PLACES = ("/usr/local/nvidia", "/usr/lib/x86_64-linux-gnu")
# The host's, so that a container keeps to what the machine asks of NCCL and others on it.
_KEPT = ("NCCL_", "TORCH_SYMM_", "NVSHMEM_")


def present() -> bool:
    """Whether there is anything to test on."""
    return FAKE or CONTROL.exists()


def nodes() -> list[Path]:
    """The device nodes that the NVIDIA container toolkit gives a container with all GPUs."""
    return sorted(path for path in Path("/dev").glob("nvidia*") if path.is_char_device() and "modeset" not in path.name)


def driver_library() -> Path:
    """libcuda.so.1 of this machine. Raises FileNotFoundError."""
    places = [*os.environ.get("LD_LIBRARY_PATH", "").split(":"), "/usr/local/nvidia/lib64", *_DRIVER_PLACES]
    for place in places:
        if place and (Path(place) / "libcuda.so.1").exists():
            return Path(place) / "libcuda.so.1"
    raise FileNotFoundError("libcuda.so.1")


def mount_point(path: Path) -> Path:
    """The mount that a path lies on."""
    here = Path(os.path.realpath(path))
    while not here.is_mount():
        here = here.parent
    return here


@dataclass(frozen=True)
class Machine:
    """Everything that is the same for all containers of a run."""

    python: str
    layers: tuple[Path, ...]
    env: Mapping[str, str]
    mounts: tuple[Mapping[str, Any], ...] = ()
    devices: tuple[Mapping[str, Any], ...] = ()
    fake: bool = field(default=FAKE)

    @staticmethod
    def here() -> Machine:
        return _stand_in() if FAKE else _real()

    def args(self, case: str) -> list[str]:
        """The command line of a module of workloads/gpu."""
        return [self.python, "-u", "-m", f"support.workloads.gpu.{'stand_in' if self.fake else case}"]

    def bundle(
        self,
        directory: Path,
        case: str,
        *,
        network: Path | None,
        env: Mapping[str, str] | None = None,
        annotations: Mapping[str, str] | None = None,
        mounts: Sequence[Mapping[str, Any]] = (),
    ) -> Bundle:
        return Bundle(
            directory,
            self.layers,
            self.args(case),
            env={**self.env, **(env or {})},
            annotations=annotations,
            network=network,
            mounts=[*self.mounts, *mounts],
            devices=self.devices,
        )


def _stand_in() -> Machine:
    made = layer.make("/usr/bin/python3")
    return Machine("python3", (rootfs.base(), made), {"PYTHONPATH": "/opt/app"})


def _real() -> Machine:
    python = os.environ.get("REWARM_GPU_PYTHON") or sys.executable
    driver = driver_library()
    words = os.environ.get("PATH", "").split(":")
    # Not what this run installed: a container knows nothing of rewarm.
    path = ":".join(word for word in words if word and "rewarm" not in word)
    env = {
        "PATH": path,
        "HOME": "/root",
        "PYTHONPATH": "/opt/app",
        "LD_LIBRARY_PATH": os.environ.get("LD_LIBRARY_PATH") or str(driver.parent),
        "TORCHINDUCTOR_CACHE_DIR": "/var/cache/inductor",
        "TRITON_CACHE_DIR": "/var/cache/triton",
        "HF_HUB_OFFLINE": "1",
        # An image has its modules compiled; here each start would write 44 MB of them into its own layer.
        "PYTHONDONTWRITEBYTECODE": "1",
        "TORCH_NCCL_ENABLE_MONITORING": "0",
        # Two dozen threads of OpenMP in every case would only cost captures time.
        "OMP_NUM_THREADS": "4",
        **{key: value for key, value in os.environ.items() if key.startswith(_KEPT)},
    }
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler:
        env["CC"] = compiler
    # An overlay over / shows nothing of what is mounted below it.
    needed = [Path(python), Path(os.path.realpath(python)), Path(sys.prefix), driver, *filter(None, [_path(compiler)])]
    below = sorted({mount_point(path) for path in needed} - {Path("/")})
    return Machine(
        os.path.abspath(python),
        (Path("/"), layer.make(python)),
        env,
        tuple(bind(point, str(point), "ro") for point in below),
        tuple(device(path) for path in nodes()),
    )


def _path(text: str | None) -> Path | None:
    return Path(text) if text else None
