"""A node on which everything is well, for `rewarm doctor` to look at, and ways to make it unwell."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rewarm.checks import OK, Check, Node
from rewarm.oci import record
from rewarm.oci.record import Record
from rewarm.settings import Settings


def program(path: Path, script: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def well(tmp_path: Path) -> Node:
    """A node on which everything is well: programs that answer, an installation, directories."""
    prefix = tmp_path / "prefix"
    parts = ("bin/rewarm-runc", "libexec/rewarm-guard", "venv/bin/python3", "lib/rewarm-hooks/rewarm_hooks/workload.py")
    for part in parts:
        program(prefix / part, "exit 0")
    config = tmp_path / "config.toml"
    config.write_text(containerd_config(str(prefix / "bin/rewarm-runc")))
    settings = Settings(
        store=str(tmp_path / "store"),
        work_dir=str(tmp_path / "work"),
        state_dir=str(tmp_path / "state"),
        criu=program(tmp_path / "criu", 'test "$1" = check && echo "Looks good." || echo "Version: 4.2.1"'),
        runtimes=(
            program(tmp_path / "runc", 'test "$1" = --version && echo "runc version 1.1.5+ds1" && exit 0; exit 1'),
        ),
    )
    return Node(settings, str(tmp_path / "config.yaml"), prefix=str(prefix), containerd_config=str(config))


def containerd_config(
    binary: str, annotations: str = '"rewarm.dev/*"', plugin: str = "io.containerd.grpc.v1.cri"
) -> str:
    version = 2 if "grpc" in plugin else 3
    return f"""
version = {version}
[plugins."{plugin}".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
[plugins."{plugin}".containerd.runtimes.rewarm]
  runtime_type = "io.containerd.runc.v2"
  pod_annotations = [{annotations}]
  [plugins."{plugin}".containerd.runtimes.rewarm.options]
    BinaryName = "{binary}"
"""


def with_settings(node: Node, **changed: object) -> Node:
    return replace(node, settings=node.settings._replace(**changed))  # type: ignore[arg-type]


def says(check: Check, status: str, *texts: str) -> None:
    assert check.status == status, check
    for text in texts:
        assert text in check.found + check.mend, check
    assert bool(check.mend) == (status != OK), check


def killed_restore(node: Node, tmp_path: Path) -> str:
    """A container directory as a rewarm that was killed in the middle of a restore leaves it."""
    root = str(tmp_path / "runc-root")
    path = record.directory(node.settings.state_dir, root, "c1")
    record.make_directory(path, Record("c1", root, "/no/bundle", record.RESTORING, owner_pid=2**22 + 1, owner_start=1))
    return path
