"""config/: the settings file shows every key with its true default, and the snippets are what the programs read."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest

from rewarm import settings

CONFIG = Path(__file__).parents[2] / "config"
BINARY = "/opt/rewarm/bin/rewarm-runc"


def load(tmp_path: Path, text: str) -> settings.Settings:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    path.chmod(0o644)
    return settings.load(path)


def test_every_default_is_shown(tmp_path: Path) -> None:
    text = (CONFIG / "config.yaml").read_text()
    assert load(tmp_path, text) == settings.Settings()
    uncommented = re.sub(r"^#(?=[a-z_]+:|  - )", "", text, flags=re.MULTILINE)
    shown = re.findall(r"^([a-z_]+):", uncommented, flags=re.MULTILINE)
    assert shown == list(settings.Settings._fields)
    assert load(tmp_path, uncommented) == settings.Settings()
    example = re.search(r"^#   (namespaces:\n(?:#    .*\n)+)", text, flags=re.MULTILINE)
    assert example is not None
    assert load(tmp_path, example[1].replace("#   ", "")).namespaces["*"].ignore == ("all",)


@pytest.mark.parametrize(
    ("name", "plugin"), [("v2", "io.containerd.grpc.v1.cri"), ("v3", "io.containerd.cri.v1.runtime")]
)
def test_containerd(name: str, plugin: str) -> None:
    data = tomllib.loads((CONFIG / f"containerd-{name}.toml").read_text())
    assert f"v{data['version']}" == name
    runtimes = data["plugins"][plugin]["containerd"]["runtimes"]
    assert runtimes["rewarm"]["options"]["BinaryName"] == BINARY
    assert runtimes["rewarm"]["pod_annotations"] == ["rewarm.dev/*"]
    assert ("runc" in runtimes) == (name == "v2"), "where a table replaces the built-in one it has to be there"


def test_crio() -> None:
    handlers = tomllib.loads((CONFIG / "crio.conf").read_text())["crio"]["runtime"]["runtimes"]
    assert (handlers["rewarm"]["runtime_path"], handlers["rewarm"]["runtime_type"]) == (BINARY, "oci")
    assert not [name for name in handlers["rewarm"]["allowed_annotations"] if "rewarm" in name]


def test_docker_and_podman() -> None:
    assert json.loads((CONFIG / "docker-daemon.json").read_text())["runtimes"]["rewarm"]["path"] == BINARY
    podman = tomllib.loads((CONFIG / "podman-containers.conf").read_text())
    assert podman["engine"]["runtimes"]["rewarm"] == [BINARY]
