"""install/register.py on the shapes that a node's containerd files have, and what real containerds make of it."""

from __future__ import annotations

import json
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from support import rootfs
from support.proc import command
from support.registering import Registering, write

OLD = "/usr/bin/containerd"
CRI = {2: "io.containerd.grpc.v1.cri", 3: "io.containerd.cri.v1.runtime"}


def new() -> str:
    return str(rootfs.containerd2() / "containerd")


def runtime(name: str, version: int, **options: object) -> str:
    table = f'plugins."{CRI[version]}".containerd.runtimes.{name}'
    lines = [f"[{table}]", 'runtime_type = "io.containerd.runc.v2"', f"[{table}.options]"]
    return "\n".join([*lines, *(f"{key} = {json.dumps(value)}" for key, value in options.items()), ""])


def default(name: str, version: int) -> str:
    return f'[plugins."{CRI[version]}".containerd]\ndefault_runtime_name = "{name}"\n'


class Shape:
    """A main file and what it imports: `imported` is a directory's only file, or a file that is named itself."""

    def __init__(self, directory: Path, version: int, main: str, imported: str | None, by_pattern: bool) -> None:
        self.version = version
        self.main, self.imported = directory / "config.toml", directory / "conf.d/99-nvidia.toml"
        head = f"version = {version}\n"
        if imported is not None:
            write(self.imported, head + imported)
            head += f'imports = ["{self.imported.parent / "*.toml" if by_pattern else self.imported}"]\n'
        write(self.main, head + main)

    def effective(self, program: str) -> dict[str, Any]:
        plugins = tomllib.loads(command(program, "--config", self.main, "config", "dump").stdout)["plugins"]
        plugin = plugins.get(CRI[3]) or plugins[CRI[2]]
        runtimes: dict[str, Any] = plugin["containerd"]["runtimes"]
        return runtimes


@pytest.mark.parametrize("place", ["main", "named", "pattern"])
@pytest.mark.parametrize("newer", [False, True], ids=["1.6", "2.x"])
def test_nvidia_beside_a_runc_that_no_file_names(tmp_path: Path, place: str, newer: bool) -> None:
    """Where containerd has `runc` all the same, rewarm runs what that runs. 1.6 has only what files name."""
    nvidia = write(tmp_path / "nvidia-container-runtime", "#!/bin/sh\necho runc version 1.2.4\n")
    nvidia.chmod(0o755)
    text = default("nvidia", 2) + runtime("nvidia", 2, BinaryName=str(nvidia), SystemdCgroup=True)
    shape = Shape(tmp_path / "c", 2, *((text, None) if place == "main" else ("", text)), place == "pattern")
    one = Registering("containerd", shape.main, tmp_path / "state")
    settings, program = tmp_path / "config.yaml", new() if newer else OLD
    words = ("--binary", "/opt/rewarm/bin/rewarm-runc", "--settings", str(settings), "--python", sys.executable)
    done = one.run("register", *words, f"containerd={shape.main}:{program}")
    assert done.returncode == 0, done.stderr
    runtimes = shape.effective(program)
    assert set(runtimes) == ({"nvidia", "rewarm", "runc"} if newer else {"nvidia", "rewarm"})
    assert runtimes["rewarm"]["options"]["SystemdCgroup"] is True, "as the node's default runtime has it"
    assert settings.exists() is not newer
    assert ("nvidia-container-runtime" in done.stderr) is not newer
