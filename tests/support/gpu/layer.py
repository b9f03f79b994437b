"""A layer with the GPU programs, as rootfs.workloads() makes one of the others."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

from support import rootfs

_support = Path(__file__).resolve().parents[1]


def make(python: str) -> Path:
    """The layer, compiled for `python`, in a directory named by its content: a mounted one never changes."""
    names = ["__init__.py", "workloads/__init__.py", "workloads/web.py", "workloads/memory.py", "workloads/virtual.py"]
    names += [f"workloads/gpu/{item.name}" for item in sorted((_support / "workloads/gpu").glob("*.py"))]
    state = hashlib.sha256(python.encode())
    for name in names:
        state.update(f"{name}\0".encode() + (_support / name).read_bytes())
    made = rootfs.cache() / f"gpu-workloads-{state.hexdigest()[:16]}"
    if not made.is_dir():
        scratch = rootfs.cache() / f".gpu-workloads-{os.getpid()}"
        for name in names:
            target = scratch / "opt/app/support" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(_support / name, target)
            target.chmod(0o644)
        words = [python, "-m", "compileall", "-q", "-s", str(scratch), "-p", "/", str(scratch)]
        subprocess.run(words, check=True, env={**os.environ, "PYTHONDONTWRITEBYTECODE": ""})
        scratch.rename(made)
    return made
