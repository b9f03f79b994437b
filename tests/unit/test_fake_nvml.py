"""The fake NVML, by NVIDIA's own Python binding where that is installed."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support import fake_gpu
from support.fake_gpu import FakeGpus

SECONDS = 20

PYNVML = """
import json
import pynvml as nvml
nvml.nvmlInit()
found = [nvml.nvmlSystemGetDriverVersion()]
for index in range(nvml.nvmlDeviceGetCount()):
    gpu = nvml.nvmlDeviceGetHandleByIndex(index)
    uuid = nvml.nvmlDeviceGetUUID(gpu)
    again = nvml.nvmlDeviceGetHandleByUUID(uuid)
    memory = nvml.nvmlDeviceGetMemoryInfo(gpu)
    try:
        mig = nvml.nvmlDeviceGetMigMode(gpu)
    except nvml.NVMLError_NotSupported:
        mig = None
    running = [[one.pid, one.usedGpuMemory] for one in nvml.nvmlDeviceGetComputeRunningProcesses(again)]
    mps = [one.pid for one in nvml.nvmlDeviceGetMPSComputeRunningProcesses(gpu)]
    found.append([uuid, nvml.nvmlDeviceGetName(again), nvml.nvmlDeviceGetMinorNumber(gpu), memory.total, memory.free,
                  memory.used, nvml.nvmlDeviceGetComputeMode(gpu), mig, running, mps])
try:
    nvml.nvmlDeviceGetHandleByUUID("GPU-none")
except nvml.NVMLError as error:
    found.append(str(error))
nvml.nvmlShutdown()
print(json.dumps(found))
"""


@pytest.fixture
def gpus(tmp_path: Path) -> FakeGpus:
    return FakeGpus(tmp_path / "fake")


def inventory(gpus: FakeGpus) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LD_LIBRARY_PATH": str(gpus.directory)}
    return subprocess.run(
        [sys.executable, "-c", PYNVML], env=environment, text=True, capture_output=True, timeout=SECONDS
    )


def test_nvml_by_its_python_binding(gpus: FakeGpus) -> None:
    first, second = fake_gpu.gpus(2)
    second = second._replace(minor=5, model="NVIDIA T4", total=100, free=40, compute_mode=3, mig=None)
    gpus.node([first, second], driver="1.2", processes=[(second.uuid, 7, 60), (second.uuid, 8, 1)],
              mps=[(first.uuid, 9)])  # fmt: skip
    if importlib.util.find_spec("pynvml") is None:
        library = ctypes.CDLL(str(gpus.nvml))
        version, count = ctypes.create_string_buffer(80), ctypes.c_uint()
        assert (library.nvmlInitWithFlags(0), library.nvmlSystemGetDriverVersion(version, 80)) == (0, 0)
        assert (library.nvmlDeviceGetCount_v2(ctypes.byref(count)), count.value) == (0, 2)
        assert version.value == b"1.2"
        return
    done = inventory(gpus)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [
        "1.2",
        [first.uuid, fake_gpu.H100, 0, first.total, first.free, first.total - first.free, 0, [0, 0], [], [9]],
        [second.uuid, "NVIDIA T4", 5, 100, 40, 60, 3, None, [[7, 60], [8, 1]], []],
        "Not Found",
    ]


def test_nvml_without_a_driver(gpus: FakeGpus) -> None:
    (gpus.directory / "node").unlink()
    assert ctypes.CDLL(str(gpus.nvml)).nvmlInit_v2() == 9
