"""What a restore imports: importing is a large part of the time that `create` takes on its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from support.cli import environment

# The command line's, those for settings that most nodes have not written, for compressed chunks, and for captures.
HEAVY = (
    *("asyncio", "click", "concurrent", "email", "http", "logging", "multiprocessing", "rich", "shutil", "yaml"),
    "zstandard",
)
GPU = ("ctypes", "pynvml", "rewarm_native.cuda", "rewarm.devices", "rewarm.gpu.nvml", "rewarm.gpu.actions")
TESTS = Path(__file__).resolve().parents[1]
CAPTURE = ("rewarm.capture", "rewarm.criu.align", "rewarm.criu.carve", "rewarm.store.chunk_writer")


@pytest.mark.parametrize("modules", ["rewarm.runtime", "rewarm.runtime, rewarm.warm, rewarm.recover, rewarm.cold"])
def test_runtime_imports_little(modules: str) -> None:
    code = f"import sys, {modules}; print(*sys.modules)"
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd="/", env=environment())
    found = set(done.stdout.split())
    assert "rewarm.runtime" in found
    heavy = [name for name in found if name.partition(".")[0] in HEAVY or name in (*CAPTURE, *GPU)]
    assert not heavy, heavy


@pytest.mark.parametrize("script", ["bench/gpu.py", "bench/memory16.py", "gpu/run.py"])
def test_what_is_carried_to_a_machine_without_rewarm(script: str) -> None:
    code = f"import runpy; runpy.run_path({str(TESTS / script)!r})"
    done = subprocess.run(["/usr/bin/python3", "-I", "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
