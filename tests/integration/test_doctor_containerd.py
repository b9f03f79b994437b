"""What `rewarm doctor` makes of files that a real containerd, 1.6 or 2.x, warns of: it says so on standard error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from rewarm import doctor_containerd
from rewarm.checks import OK, WARNING
from support import rootfs
from support.nodes import containerd_config, says, well
from support.proc import command
from support.registering import Registering

OLD = "/usr/bin/containerd"


def new() -> str:
    return str(rootfs.containerd2() / "containerd")


def default_of_the_old() -> str:
    """What a node has after an upgrade from 1.6, whose administrator began with `containerd config default`."""
    return command(OLD, "config", "default").stdout


def unknown_key() -> str:
    return 'no_such_key = 1\nversion = 2\n[plugins."io.containerd.grpc.v1.cri"]\nneither_this = true\n'


def without_version() -> str:
    return 'root = "/var/lib/containerd"\n[plugins.cri]\nstream_server_port = "0"\n'


@pytest.mark.parametrize(
    ("text", "program"),
    [
        pytest.param(default_of_the_old, new, id="1.6's default under 2.x"),
        pytest.param(unknown_key, new, id="unknown keys under 2.x"),
        pytest.param(default_of_the_old, lambda: OLD, id="1.6's default"),
    ],
)
def test_a_warning_is_no_failure(tmp_path: Path, text: Callable[[], str], program: Callable[[], str]) -> None:
    config = tmp_path / "etc/config.toml"
    config.parent.mkdir()
    config.write_text(text())
    node = replace(well(tmp_path), containerd_config=str(config))
    done = Registering("containerd", config, tmp_path / "state").try_register(node.launcher, program())
    assert done.stdout == "containerd changed\n", done.stderr
    says(doctor_containerd.registered(node, program()), OK, "runtime rewarm", node.launcher)


def test_a_file_without_version(tmp_path: Path) -> None:
    """1.6 warns of it and goes on; 2.x takes it for one of version 1, and overlooks the runtime: that is said."""
    node = well(tmp_path)
    config = Path(node.containerd_config)
    config.write_text(containerd_config(node.launcher, plugin="cri").replace("version = 3\n", ""))
    said = command(OLD, "--config", config, "config", "dump")
    assert "deprecated" in said.stderr, "this containerd does not warn: the test has nothing to tell"
    says(doctor_containerd.registered(node, OLD), OK, "runtime rewarm")
    config.write_text(without_version())
    says(doctor_containerd.registered(node, OLD), WARNING, "no runtime of", "containerd warns: ", "deprecated")
    config.write_text(containerd_config(node.launcher).replace("version = 2\n", "version = 3\n"))
    says(doctor_containerd.registered(node, new()), WARNING, "no runtime of", "containerd warns: ", "unknown key")
