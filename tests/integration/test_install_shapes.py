"""install/register.py on the shapes that a node's containerd files have, and what real containerds make of it."""

from __future__ import annotations

import json
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rewarm import doctor_node
from rewarm.checks import FAILED, WARNING, Check, Node
from support import rootfs
from support.nodes import says, well
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
    main, imported = (text, None) if place == "main" else ("", text)
    shape = Shape(tmp_path / "c", 2, main, imported, place == "pattern")
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


# What doctor makes of it, before and after a change


MAIN, NAMED, PATTERN = "main", "named", "pattern"
SYSTEMD, CGROUPFS = {"SystemdCgroup": True}, {"SystemdCgroup": False}
Part = tuple[str, dict[str, Any]] | None
SHAPES: dict[str, tuple[Part, Part, str]] = {
    "nothing": (None, None, MAIN),
    "runc": (("runc", SYSTEMD), None, MAIN),
    "runc without options, nvidia": (("runc", {}), ("nvidia", SYSTEMD), PATTERN),
    "runc, nvidia by name": (("runc", CGROUPFS), ("nvidia", SYSTEMD), NAMED),
    "nvidia": (None, ("nvidia", SYSTEMD), PATTERN),
    "nvidia by name": (None, ("nvidia", SYSTEMD), NAMED),
    "runc in two files": (("runc", SYSTEMD), ("runc", {"ShimCgroup": "/y"}), PATTERN),
    "runc in two files, by name": (("runc", SYSTEMD), ("runc", {"ShimCgroup": "/y"}), NAMED),
    "runc, overridden": (("runc", {**SYSTEMD, "Root": "/x"}), ("runc", {**CGROUPFS, "Root": ""}), PATTERN),
    "runc, overridden by name": (("runc", {**SYSTEMD, "Root": "/x"}), ("runc", {**CGROUPFS, "Root": ""}), NAMED),
}


def text_of(part: Part, version: int) -> str:
    if part is None:
        return ""
    name, options = part
    return ("" if name == "runc" else default(name, version)) + runtime(name, version, **options)


def judged(node: Node) -> Check:
    return next(engine.check(node, engine) for engine in doctor_node.found(node) if engine.name == "containerd")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("newer", [False, True], ids=["1.6", "2.x"])
def test_options_that_are_changed(tmp_path: Path, shape: str, newer: bool) -> None:
    """As when an administrator gives every runtime the other cgroup driver: rewarm's is not in the files for them.

    Whatever the shape, after a registration nothing differs, or the DaemonSet would register for ever.
    """
    program, version = (new(), 3) if newer else (OLD, 2)
    main, imported, place = SHAPES[shape]
    text = None if place == MAIN else text_of(imported, version)
    files = Shape(tmp_path / "c", version, text_of(main, version), text, place == PATTERN)
    node = replace(well(tmp_path), containerd_config=str(files.main))
    one = Registering("containerd", files.main, Path(node.install_state))

    def register() -> str:
        done = one.try_register(node.launcher, program)
        assert done.returncode == 0, done.stderr
        says(judged(node), WARNING, "containerd does not run with")
        return done.stdout

    def systemd(name: str) -> bool:
        return bool(files.effective(program)[name]["options"].get("SystemdCgroup"))

    assert register() == "containerd changed\n"
    copied = json.loads((one.state / "engines.json").read_text())["containerd"]["copied"]
    before = systemd(copied)
    assert systemd("rewarm") == before
    for path in filter(Path.exists, (files.main, files.imported)):
        theirs, mark, ours = path.read_text().partition("# BEGIN rewarm")
        swapped = theirs.replace("= true", "= TRUE").replace("= false", "= true").replace("= TRUE", "= false")
        path.write_text(swapped + mark + ours)
    if systemd(copied) == before:  # another runtime's, or what this containerd takes from another file
        says(judged(node), WARNING, "containerd does not run with")
        return
    says(judged(node), FAILED, f"another SystemdCgroup than runtime {copied}", "run install/install.sh again")
    assert register() == "containerd changed\n"
    assert systemd("rewarm") == systemd(copied) != before
