"""Which processes of a container use CUDA, and what of their use the driver cannot checkpoint.

The driver answers by host pid, so a process counts in whatever pid namespace below the container's it is.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

from rewarm import processes
from rewarm.errors import GpuError
from rewarm_native.cuda import CudaError, Driver

_DEVICES = "/dev/nvidia"
_UVM = "/dev/nvidia-uvm"
_EVENTS = "/dev/shm/cuda.shm."
"""Files by which the driver shares events with another process."""
_COUNTS, _COUNTS_BYTES = "/dev/shm/torch_", 80_064
"""Files by which PyTorch does reference counts, and their size: 10000 counts of 8 bytes (torch/csrc/CudaIPCTypes.h) and
64 of its allocator. Tensors of the CPU that are shared have such names as well."""
_UVM_OWN = 2 << 20
"""Bytes of /dev/nvidia-uvm that every CUDA process maps (driver 580); managed memory is mapped beside it."""


class Context(NamedTuple):
    """A process that uses CUDA: its host pid, its start time (clock ticks since boot, tells it from a later process
    with that pid) and its command."""

    pid: int
    start_time: int
    command: str

    def __str__(self) -> str:
        return f"process {self.pid} ({self.command})"


def find(driver: Driver, pids: Iterable[int]) -> list[Context]:
    """Those of the processes that use CUDA. Raises GpuError if the driver does not answer."""
    found = []
    for pid in sorted(pids):
        start = processes.start_time(pid)
        try:
            used = start is not None and driver.restore_thread(pid) is not None
        except CudaError as error:
            what = f"process {pid} ({processes.command(pid)})"
            raise GpuError("ask the NVIDIA driver about", what, error.name, "run `rewarm doctor`") from None
        if start is not None and used:
            found.append(Context(pid, start, processes.command(pid)))
    return found


def check_inside(contexts: Iterable[Context], tree: Collection[int]) -> None:
    """A snapshot holds the init's tree: what `exec` put beside it would be missing. Raises GpuError."""
    for context in contexts:
        if context.pid not in tree:
            cause = "it was started beside the container's own processes (exec), of which alone a snapshot is made"
            raise _refused(context, cause, "end it before the capture")


def check(contexts: Iterable[Context], all_pids: Iterable[int], mps_clients: Collection[int]) -> None:
    """Refuse by name, before anything is paused, what can be seen from outside that the driver cannot checkpoint.

    What cannot be seen the driver refuses itself at the lock or the checkpoint, and everything is undone; but for
    memory imported by CUDA IPC without an event, which it cannot give back (docs/decisions/0013). Raises GpuError.
    """
    using = {context.pid: context for context in contexts}
    for context in using.values():
        found = processes.stat(context.pid)
        if found is not None and found.state == "T":
            raise _refused(context, "a signal has stopped it, and the driver needs it to run", "send it SIGCONT")
        if context.pid in mps_clients:
            raise _refused(context, "it is a client of MPS", "run it without CUDA MPS")
        if _managed_bytes(context.pid):
            raise _refused(context, "it uses managed memory (cudaMallocManaged)", "have it use cudaMalloc instead")
    _check_sharing(list(using.values()))
    for pid in sorted(set(all_pids) - using.keys()):
        device = held_device(pid)
        if device:
            raise _refused(
                Context(pid, 0, processes.command(pid)),
                f"it holds {device} without using CUDA, as NVML, graphics and compile workers of PyTorch do",
                "have it close the device before the capture (TORCHINDUCTOR_COMPILE_THREADS=1)",
            )


def _check_sharing(contexts: Sequence[Context]) -> None:
    """CUDA IPC, by the files that go with it: of IPC events, which PyTorch has beside each tensor that it hands on, and
    of PyTorch's reference counts. The driver (580) checkpoints who has imported memory, and can never restore it.
    """
    seen: dict[tuple[int, int], Context] = {}
    for context in contexts:
        for path, file in _mapped_files(context.pid):
            other = seen.setdefault(file, context)
            if other != context:
                raise _refused(
                    context,
                    f"it shares {path} with {other}, as programs do that hand on device memory by CUDA IPC, which the "
                    "driver does not restore",
                    "have each process hold its tensors itself",
                )


def _mapped_files(pid: int) -> Iterator[tuple[str, tuple[int, int]]]:
    """Path, and device and inode, of such files that a process has mapped."""
    for words in _mappings(pid):
        start, _, end = words[0].partition("-")
        pages = -(-_COUNTS_BYTES // mmap.PAGESIZE) * mmap.PAGESIZE
        counts = words[5].startswith(_COUNTS) and int(end, 16) - int(start, 16) == pages
        if words[5].startswith(_EVENTS) or counts:
            major, minor = (int(part, 16) for part in words[3].split(":"))
            yield words[5].rstrip("\n"), (os.makedev(major, minor), int(words[4]))


def check_alive(contexts: Iterable[Context]) -> None:
    """Those whose memory was taken are to be in the snapshot. Raises GpuError."""
    for context in contexts:
        if processes.start_time(context.pid) != context.start_time:
            raise _refused(context, "it has ended since its device memory was taken", "capture it again")


def check_released(pids: Iterable[int]) -> None:
    """After the checkpoint no process may hold a device any more: CRIU could not dump it. Raises GpuError."""
    for pid in sorted(pids):
        device = held_device(pid)
        if device:
            raise _refused(
                Context(pid, 0, processes.command(pid)),
                f"it still holds {device} after the checkpoint, as memory exported to other processes, or NVML, does",
                "have it close what it shares (CUDA IPC, exported handles, NVML) before the capture",
            )


def held_device(pid: int) -> str:
    """An NVIDIA device that the process has open or mapped, "" if there is none."""
    try:
        for name in os.listdir(f"/proc/{pid}/fd"):
            try:
                target = os.readlink(f"/proc/{pid}/fd/{name}")
            except FileNotFoundError:
                continue  # closed since it was listed
            if target.startswith(_DEVICES):
                return target
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return next((path for path, _ in _device_mappings(pid)), "")


def _managed_bytes(pid: int) -> int:
    sizes = [size for path, size in _device_mappings(pid) if path == _UVM]
    return sum(size for size in sizes if size > _UVM_OWN)


def _device_mappings(pid: int) -> list[tuple[str, int]]:
    """Path and bytes of each mapping of an NVIDIA device."""
    found = []
    for words in _mappings(pid):
        if words[5].startswith(_DEVICES):
            start, _, end = words[0].partition("-")
            found.append((words[5].rstrip("\n"), int(end, 16) - int(start, 16)))
    return found


def _mappings(pid: int) -> Iterator[list[str]]:
    """The six words of each line of /proc/PID/maps that has a name; none if the process is gone."""
    try:
        with open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace", newline="\n") as file:
            yield from (words for words in (line.split(None, 5) for line in file) if len(words) == 6)
    except (FileNotFoundError, ProcessLookupError):
        return


def _refused(context: Context, cause: str, next_step: str) -> GpuError:
    return GpuError("capture GPU memory of", str(context), cause, next_step)
