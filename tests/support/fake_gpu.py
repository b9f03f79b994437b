"""A machine with GPUs that are not there: libcuda.so.1 and libnvidia-ml.so.1 in C, and the files they live by.

All lie in one directory, which $FAKE_CUDA_DIR names, else it is the one that the library was loaded from. A container
with `workloads.gpu_fake` in it has the same directory as a bind mount. Lines of the files:

node    driver VERSION                       without the file NVML says that no driver is loaded
        cuda NUMBER                          cuDriverGetVersion; 13000 by default
        gpu UUID MINOR TOTAL FREE COMPUTE_MODE MIG MODEL NAME      bytes; MIG is 0, 1, "-" for a GPU without the mode,
                                                                            or "lost" for one off the bus
        delay MS                                what NVML takes to say how much memory is free
        compiler none, kernel idle, …        how PTX is taken: fake_cuda_digests.c
        process UUID PID BYTES               what NVML says uses a GPU; `mps UUID PID` for clients of MPS
script  CALL NUMBER RESULT                   this call of its kind over all callers fails; CALL is one of `CALLS`,
        CALL NUMBER sleep MS                 NUMBER counts from 1 or is "*" for each of them; both lines may apply
        CALL NUMBER kill-target              SIGKILL for the process that the call is about, before the driver acts
        CALL NUMBER kill-caller              SIGKILL for who called
        patience MS                          how long a checkpoint or restore waits for a stopped process (10000)
        nodes                                a restore needs /dev/nvidiaMINOR (195:MINOR) in the process's root
log     BEGIN_NS END_NS CALLER_PID CALL TARGET_PID RESULT [OLD=NEW,…]        monotonic clock; in the order of the ends
counts  how many calls of each kind there were, 32 bits each
devices/UUID/TOKEN is the device memory of one process while it has the GPU.

The process's side is one page at 0x7ca000000000: `struct page` of fake_cuda.h.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from support import rootfs
from support.bundle import bind
from support.proc import command

CALLS = ("state", "thread", "lock", "checkpoint", "restore", "unlock")
RUNNING, LOCKED, CHECKPOINTED, FAILED = range(4)
MOUNT_POINT = "/fake-cuda"
H100 = "NVIDIA H100 80GB HBM3"

_here = Path(__file__).resolve().parent
_HEADERS = ("fake_cuda.h", "fake_node.h")
_SOURCES = {
    "libcuda.so.1": (
        "fake_cuda.c",
        "fake_cuda_device.c",
        "fake_cuda_script.c",
        "fake_cuda_copies.c",
        "fake_cuda_digests.c",
        "device_memory/fake_libcuda.c",
    ),
    "libcudart.so.12": ("device_memory/fake_libcudart.c",),
    "libnvidia-ml.so.1": ("fake_nvml.c",),
    "libnvidia-ptxjitcompiler.so.1": ("fake_compiler.c",),
    "too-old/libcuda.so.1": ("fake_cuda.c",),
}
_FLAGS = ["-std=gnu17", "-D_GNU_SOURCE", "-O1", "-g", "-fPIC", "-shared", "-fvisibility=hidden"]
_WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wshadow", "-Wconversion"]
_OTHER_MACHINES = {"x86_64": 183, "aarch64": 62}  # e_machine of the other one


def build(directory: Path) -> None:
    """Put the libraries into `directory`: see `_SOURCES`, and foreign/libcuda.so.1 of another architecture.

    As files of their own, not links: the loader takes two links for one library, in the place of the first.
    """
    shutil.copytree(_built(), directory, dirs_exist_ok=True)


def _built() -> Path:
    state = hashlib.sha256(" ".join([*_FLAGS, *_WARNINGS]).encode())
    for name in sorted({"fake_gpu.py", *_HEADERS, *(source for sources in _SOURCES.values() for source in sources)}):
        state.update((_here / name).read_bytes())
    made = rootfs.cache() / f"fake-gpu-{state.hexdigest()[:16]}"
    if made.is_dir():
        return made
    scratch = rootfs.cache() / f".fake-gpu-{os.getpid()}"
    for name, sources in _SOURCES.items():
        target = scratch / name
        target.parent.mkdir(parents=True, exist_ok=True)
        define = ["-DTOO_OLD"] if name.startswith("too-old") else []
        words = ["gcc", *_FLAGS, *_WARNINGS, *define, f"-Wl,-soname,{target.name}", "-o", str(target)]
        command(*words, *(_here / source for source in sources))
    shutil.copy(scratch / "libnvidia-ml.so.1", scratch / "too-old")
    foreign = bytearray((scratch / "libcuda.so.1").read_bytes())
    struct.pack_into("<H", foreign, 18, _OTHER_MACHINES[os.uname().machine])
    (scratch / "foreign").mkdir()
    (scratch / "foreign/libcuda.so.1").write_bytes(foreign)
    shutil.copy(scratch / "libnvidia-ml.so.1", scratch / "foreign")
    try:
        scratch.rename(made)
    except OSError:
        if not made.is_dir():  # another process may have made the same one
            raise
        shutil.rmtree(scratch)
    return made


def uuid(number: int) -> str:
    """A UUID that is easy to tell from others."""
    return f"GPU-{number:08x}-fa4e-4000-8000-{number:012x}"


def uuid_bytes(text: str) -> bytes:
    """As the driver has it."""
    return bytes.fromhex(text.removeprefix("GPU-").replace("-", ""))


class FakeGpu(NamedTuple):
    """A line `gpu` of the node file."""

    uuid: str
    minor: int
    model: str = H100
    total: int = 85520809984
    free: int = 79 << 30
    compute_mode: int = 0
    mig: int | str | None = 0

    def line(self) -> str:
        mig = "-" if self.mig is None else self.mig
        return f"gpu {self.uuid} {self.minor} {self.total} {self.free} {self.compute_mode} {mig} {self.model}"


@dataclass(frozen=True)
class Call:
    """A line of the log; `map` is the device map of a restore, old UUIDs to new ones."""

    began: int
    ended: int
    caller: int
    name: str
    pid: int
    result: int
    map: Mapping[str, str]

    def overlaps(self, other: Call) -> bool:
        return self.began < other.ended and other.began < self.ended


def gpus(count: int, first: int = 0) -> list[FakeGpu]:
    """So many equal GPUs, with the minor numbers and UUIDs from `first` on."""
    return [FakeGpu(uuid(number), number) for number in range(first, first + count)]


class FakeGpus:
    """A directory with the libraries and a node of `gpus`, one by default."""

    def __init__(self, directory: Path, found: Sequence[FakeGpu] | None = None) -> None:
        self.directory = directory
        build(directory)
        self.libcuda = directory / "libcuda.so.1"
        self.nvml = directory / "libnvidia-ml.so.1"
        self.too_old = directory / "too-old" / "libcuda.so.1"
        self.foreign = directory / "foreign" / "libcuda.so.1"
        self.node(gpus(1) if found is None else found)

    def node(
        self,
        found: Iterable[FakeGpu],
        *,
        driver: str = "580.159.04",
        cuda: int = 13000,
        processes: Iterable[tuple[str, int, int]] = (),
        mps: Iterable[tuple[str, int]] = (),
        delay_ms: int = 0,
        more: Sequence[str] = (),
    ) -> None:
        """Make the node one with these GPUs; (UUID, pid, bytes) for the processes on them, (UUID, pid) for MPS."""
        lines = [f"driver {driver}", f"cuda {cuda}", f"delay {delay_ms}"]
        for gpu in found:
            lines.append(gpu.line())
            place = self.directory / "devices" / gpu.uuid
            place.mkdir(parents=True, exist_ok=True)
            place.chmod(0o777)  # the container's user may be another
        lines += [f"process {gpu} {pid} {size}" for gpu, pid, size in processes]
        lines += [f"mps {gpu} {pid}" for gpu, pid in mps]
        lines += more
        # Never half a file: the libraries read it at each call.
        scratch = self.directory / ".node"
        scratch.write_text("\n".join(lines) + "\n")
        scratch.rename(self.directory / "node")

    def script(self, *lines: str) -> None:
        """Make the calls from now on go as `lines` say; calls are counted from 1 again."""
        (self.directory / "counts").unlink(missing_ok=True)
        (self.directory / "script").write_text("".join(f"{line}\n" for line in lines))

    def log(self, *names: str) -> list[Call]:
        """The calls so far in the order of their beginnings, all kinds or those of `names`."""
        path = self.directory / "log"
        calls = [_call(line) for line in path.read_text().splitlines()] if path.exists() else []
        return sorted((one for one in calls if not names or one.name in names), key=lambda one: one.began)

    def begun(self, name: str) -> int:
        """How many calls of a kind have begun since the last `script`."""
        path = self.directory / "counts"
        found = path.read_bytes() if path.exists() else b""
        return int(struct.unpack_from("=I", found.ljust(4 * len(CALLS), b"\0"), 4 * CALLS.index(name))[0])

    def clear_log(self) -> None:
        (self.directory / "log").unlink(missing_ok=True)

    def memories(self, gpu: str) -> list[bytes]:
        """The device memory that processes hold on a GPU."""
        return [path.read_bytes() for path in sorted((self.directory / "devices" / gpu).glob("*"))]

    def environment(self) -> dict[str, str]:
        """For a process on this machine: rewarm, or the workload."""
        return {"FAKE_CUDA_DIR": str(self.directory), "LD_LIBRARY_PATH": str(self.directory)}

    def mount(self) -> dict[str, Any]:
        """For `Bundle(mounts=…)`."""
        return bind(self.directory, MOUNT_POINT)

    def container_environment(self, **more: str) -> dict[str, str]:
        """For a container with `workloads.gpu_fake` and `mount`."""
        return rootfs.env("gpu_fake", FAKE_CUDA_DIR=MOUNT_POINT, **more)


def _call(line: str) -> Call:
    began, ended, caller, name, pid, result, *rest = line.split()
    pairs = dict(pair.split("=") for word in rest for pair in word.split(","))
    return Call(int(began), int(ended), int(caller), name, int(pid), int(result), pairs)
