"""What is seen of CUDA processes from outside, on real processes that look like them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from rewarm import processes
from rewarm.errors import GpuError
from rewarm.gpu import contexts
from rewarm.gpu.contexts import Context
from support.proc import wait_for

# Maps each file given, and stays.
PROGRAM = """
import mmap, os, sys
held = [mmap.mmap(os.open(path, os.O_RDWR), 0) for path in sys.argv[1:]]
print("ready", flush=True)
sys.stdin.read()
"""


@contextmanager
def process(*files: Path) -> Iterator[Context]:
    words = [sys.executable, "-I", "-c", PROGRAM, *map(str, files)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as found:
        assert found.stdout is not None and found.stdout.readline() == "ready\n"
        start = processes.start_time(found.pid)
        assert start is not None
        try:
            yield Context(found.pid, start, "python3")
        finally:
            found.kill()


@pytest.fixture
def shared() -> Iterator[list[Path]]:
    """Two files as PyTorch and the driver name them."""
    paths = [Path(f"/dev/shm/torch_{os.getpid()}_4711_0"), Path(f"/dev/shm/cuda.shm.0.{os.getpid():x}.1")]
    for path in paths:
        path.write_bytes(bytes(80_000))
    yield paths
    for path in paths:
        path.unlink()


def test_memory_shared_by_torch_is_refused(shared: list[Path]) -> None:
    with process(shared[0], shared[1]) as one, process(shared[1]) as other:
        with pytest.raises(GpuError) as caught:
            contexts.check([one, other], [one.pid, other.pid], ())
        text = str(caught.value)
        assert f"process {other.pid}" in text and f"process {one.pid}" in text and "CUDA IPC" in text
        assert str(shared[1]) in text


def test_reference_counts_are_told_from_tensors_of_the_cpu(shared: list[Path]) -> None:
    """Both have PyTorch's names."""
    with process(shared[0]) as one, process(shared[0]) as other, pytest.raises(GpuError, match="CUDA IPC"):
        contexts.check([one, other], [one.pid, other.pid], ())
    for size in (4096, 64 << 20):
        os.truncate(shared[0], size)
        with process(shared[0]) as one, process(shared[0]) as other:
            contexts.check([one, other], [one.pid, other.pid], ())


def test_each_with_files_of_its_own_is_not(shared: list[Path]) -> None:
    with process(shared[0]) as one, process(shared[1]) as other:
        contexts.check([one, other], [one.pid, other.pid], ())
        contexts.check([one], [one.pid], ())


def test_nor_if_only_one_of_them_uses_cuda(shared: list[Path]) -> None:
    with process(shared[0]) as one, process(shared[0]) as other:
        contexts.check([one], [one.pid, other.pid], ())


def test_one_that_has_ended_is_refused() -> None:
    """Reaped or not."""
    with process() as one:
        contexts.check_alive([one])
        os.kill(one.pid, signal.SIGKILL)
        wait_for("the end", lambda: (found := processes.stat(one.pid)) is not None and found.state == "Z")
        with pytest.raises(GpuError, match="has ended since its device memory was taken"):
            contexts.check_alive([one])
    with pytest.raises(GpuError, match="has ended"):
        contexts.check_alive([one])


def test_a_stopped_process_is_refused() -> None:
    with process() as one:
        os.kill(one.pid, signal.SIGSTOP)
        wait_for("the stop", lambda: (found := processes.stat(one.pid)) is not None and found.state == "T")
        with pytest.raises(GpuError, match="a signal has stopped it"):
            contexts.check([one], [one.pid], ())
        os.kill(one.pid, signal.SIGCONT)


def test_a_client_of_mps_is_refused() -> None:
    with process() as one, pytest.raises(GpuError, match="it is a client of MPS"):
        contexts.check([one], [one.pid], {one.pid})


@pytest.mark.parametrize(
    ("sizes", "refused"), [([2 << 20], False), ([2 << 20, 64 << 20], True), ([256 << 20], True)], ids=str
)
def test_managed_memory(monkeypatch: pytest.MonkeyPatch, sizes: list[int], refused: bool) -> None:
    """Every CUDA process maps 2 MiB of /dev/nvidia-uvm; what managed memory adds was seen on an H100."""
    monkeypatch.setattr(contexts, "_device_mappings", lambda pid: [("/dev/nvidia-uvm", size) for size in sizes])
    with process() as one, ExitStack() as stack:
        if refused:
            stack.enter_context(pytest.raises(GpuError, match="managed memory"))
        contexts.check([one], [one.pid], ())


def test_a_device_that_is_held_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = tmp_path / "nvidiactl"
    device.write_bytes(bytes(4096))
    monkeypatch.setattr(contexts, "_DEVICES", str(tmp_path / "nvidia"))
    with process(device) as one:
        with pytest.raises(GpuError, match="without using CUDA"):
            contexts.check([], [one.pid], ())
        with pytest.raises(GpuError, match="after the checkpoint"):
            contexts.check_released([one.pid])
    contexts.check_released([one.pid])
