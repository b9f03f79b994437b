"""Layers of the test containers' root filesystems, lowest first: what prepare.sh built, and the workloads' sources."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

from support.proc import command

_here = Path(__file__).resolve().parent
PYTHON = ("python3", "-u", "-m")


class NotPrepared(Exception):
    """A layer is missing: prepare.sh was not run."""


def cache() -> Path:
    """The cache directory: REWARM_TEST_ROOTFS, or build/rootfs of the repository."""
    return Path(os.environ.get("REWARM_TEST_ROOTFS") or _here.parents[1] / "build" / "rootfs")


def layer(name: str) -> Path:
    """A directory that prepare.sh built: "base", "slim", "ocr" and so on (see there). Raises NotPrepared."""
    path = cache() / name
    if not path.is_dir() or not (cache() / f".{name}.stamp").is_file():
        raise NotPrepared(f"no root filesystem {path}; run tests/support/prepare.sh {cache()}")
    return path


def containerd2() -> Path:
    """The directory with containerd 2.1 or newer, its ctr and its shim, to go first in a PATH. Raises NotPrepared."""
    return layer("containerd2") / "bin"


def dockerd() -> Path:
    """Docker's daemon, version 24 or newer, which hands annotations to the runtime. Raises NotPrepared."""
    return layer("docker") / "bin/dockerd"


def kustomize() -> Path:
    """The program. Raises NotPrepared."""
    return layer("kustomize") / "bin/kustomize"


def base() -> Path:
    """Debian with python3 and redis-server. Raises NotPrepared."""
    return layer("base")


def workloads() -> Path:
    """A layer with opt/app/support/workloads, in a directory named by its content: a mounted one never changes."""
    sources = {f"support/workloads/{item.name}": item for item in sorted((_here / "workloads").glob("*.py"))}
    sources["support/__init__.py"] = _here / "__init__.py"
    state = hashlib.sha256()
    for name, source in sorted(sources.items()):
        state.update(f"{name}\0{source.stat().st_size}\0".encode() + source.read_bytes())
    made = cache() / f"workloads-{state.hexdigest()[:16]}"
    if not made.is_dir():
        scratch = cache() / f".workloads-{os.getpid()}"
        for name, source in sources.items():
            target = scratch / "opt/app" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
            target.chmod(0o644)
        # As the other layers, by the suite's Python: else each cold start would compile and write into its overlay.
        command("/usr/bin/python3", "-m", "compileall", "-q", "-s", scratch, "-p", "/", scratch)
        try:
            scratch.rename(made)
        except OSError:
            if not made.is_dir():  # another process may have made the same one
                raise
            shutil.rmtree(scratch)
    return made


def layers(workload: str = "") -> list[Path]:
    """Layers that `workload` (a module of workloads/, or "" for Debian alone) needs. Raises NotPrepared."""
    extra = {"ocr_server": ["ocr"], "multi": ["loop"]}.get(workload, [])
    return [base(), *(layer(name) for name in extra), *([workloads()] if workload else [])]


def args(workload: str) -> list[str]:
    """The command line of a workload."""
    return [*PYTHON, f"support.workloads.{workload}"]


def env(workload: str, **more: str) -> dict[str, str]:
    """The environment of a workload, with `more` added."""
    path = {"ocr_server": "/opt/app:/opt/ocr", "multi": "/opt/app:/opt/loop"}.get(workload, "/opt/app")
    return {"PYTHONPATH": path, **more}
