"""The check of `rewarm doctor` of GPUs, on the fake driver; NVML keeps what it has loaded, so each in a new process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rewarm import doctor_gpu
from rewarm.checks import OK
from support import fake_gpu
from support.cli import environment
from support.fake_gpu import FakeGpu, FakeGpus, uuid
from support.nodes import says, well

CODE = """
import json, sys
from rewarm import doctor, installation
from rewarm.checks import Node
from rewarm.settings import Settings
installation.device_memory = lambda: sys.argv[2]
node = Node(Settings(libcuda=sys.argv[1]), "none")
[found] = [check for check in doctor.examine(node) if check.name == "GPUs"]
print(json.dumps([found.status, found.found, found.mend]))
"""


def examined(gpus: FakeGpus, libcuda: Path | None = None, library: str = __file__) -> tuple[str, str, str]:
    words = [sys.executable, "-c", CODE, str(libcuda or gpus.libcuda), library]
    env = {**environment(), "FAKE_CUDA_DIR": str(gpus.directory)}
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=True)
    status, found, mend = json.loads(done.stdout)
    return status, found, mend


def test_a_node_without_a_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_gpu, "_LOADED", str(tmp_path / "nowhere"))
    says(doctor_gpu.gpus(well(tmp_path)), OK, "none: no NVIDIA driver is loaded")


def test_gpus(tmp_path: Path) -> None:
    gpus = FakeGpus(tmp_path, fake_gpu.gpus(2))
    assert examined(gpus) == ("ok", f"2 with driver 580.159.04 ({gpus.libcuda})", "")
    status, found, mend = examined(gpus, library=str(tmp_path / "nowhere"))
    assert status == "warning" and "device memory library is not installed" in found and "reinstall" in mend
    compiler = gpus.directory / "libnvidia-ptxjitcompiler.so.1"
    compiler.rename(tmp_path / "elsewhere")
    status, found, mend = examined(gpus)
    assert (
        status == "warning" and "the driver's compiler cannot be used: No such file" in found and "whole driver" in mend
    )
    (tmp_path / "elsewhere").rename(compiler)
    gpus.node([FakeGpu(uuid(0), 0), FakeGpu(uuid(1), 1, mig=1)])
    status, found, mend = examined(gpus)
    assert status == "warning" and f"in MIG mode: {uuid(1)}" in found and "MIG off" in mend
    gpus.node([FakeGpu(uuid(0), 0, mig="lost"), FakeGpu(uuid(1), 1)])
    status, found, mend = examined(gpus)
    assert status == "warning" and "NVML cannot read GPU 0 (GPU is lost)" in found and "dmesg" in mend
    gpus.node(fake_gpu.gpus(1), driver="570.1", cuda=12080)
    status, found, mend = examined(gpus)
    assert status == "warning" and "the GPU of the capture only" in found and "580 or newer" in mend


def test_what_is_broken(tmp_path: Path) -> None:
    gpus = FakeGpus(tmp_path)
    for libcuda, expected in (
        (gpus.too_old, "570 or newer is needed"),
        (gpus.foreign, "this machine is"),
        (tmp_path / "nowhere", "No such file"),
    ):
        status, found, mend = examined(gpus, libcuda)
        assert status == "failed" and expected in found and mend, found
    (tmp_path / "node").unlink()
    status, found, _ = examined(gpus)
    assert status == "failed" and "NVML says" in found
