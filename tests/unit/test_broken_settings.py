"""`create` while the settings have a mistake: what they say of the pod's namespace is not known, so no mistake in an
annotation makes a container fail."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rewarm.oci import mounts, record
from support.cli import environment

POD = {
    "io.kubernetes.cri.container-type": "container",
    "io.kubernetes.cri.sandbox-namespace": "team",
    "io.kubernetes.cri.container-name": "main",
}
BOTH_ENGINES = {"io.kubernetes.cri-o.ContainerType": "container"}


@dataclass
class Node:
    base: Path

    @property
    def directory(self) -> Path:
        return Path(record.directory(str(self.base / "state"), str(self.base / "root"), "c1"))

    @property
    def log(self) -> str:
        return (self.base / "log").read_text()

    def create(self, annotations: dict[str, str], settings: str = "stoer: /typo") -> int:
        """The status of `create`: 7 is that of the low-level runtime."""
        config = self.base / "config.yaml"
        config.write_text(f"{settings}\nstate_dir: {self.base}/state\n")
        config.chmod(0o644)
        bundle = self.base / "bundle"
        spec = {"ociVersion": "1.0.2", "process": {"args": ["true"], "env": []}, "annotations": {**POD, **annotations}}
        (bundle / "config.json").write_text(json.dumps(spec))
        words = [f"--root={self.base}/root", f"--log={self.base}/log", "create", f"--bundle={bundle}", "c1"]
        env = {**environment(), "REWARM_CONFIG": str(config), "PATH": f"{self.base}/path:/usr/bin:/bin"}
        code = "from rewarm import runtime; runtime.entry()"
        return subprocess.run([sys.executable, "-c", code, *words], env=env, timeout=60).returncode

    def outcome(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.directory / "outcome.json").read_text())
        return found


@pytest.fixture
def node(tmp_path: Path) -> Node:
    for name in ("path", "bundle", "root"):
        (tmp_path / name).mkdir()
    runc = tmp_path / "path/runc"
    runc.write_text("#!/bin/sh\nexit 7\n")
    runc.chmod(0o755)
    return Node(tmp_path)


@pytest.mark.parametrize(
    ("annotations", "said"),
    [
        ({"snapshot": "model", "engin": "vllm"}, "passed over: read annotation rewarm.dev/engin: there is no such key"),
        (
            {"snapshot": "model", "capture": "always"},
            "passed over: read annotation rewarm.dev/capture: 'always' is not",
        ),
        ({"snapshot": "../model"}, "passed over: read annotation rewarm.dev/snapshot: '../model' is not a name"),
        ({"snapshot": "model", "container": "main", "ready": "?"}, "passed over: read annotation rewarm.dev/ready"),
        ({"snapshot": "model", "container": "../x"}, "passed over: read annotation rewarm.dev/container"),
        ({"snapshot": "model", "capture": "on-ready"}, "unknown key"),
        ({"snapshot": "model", "on-miss": "maybe"}, "passed over: read annotation rewarm.dev/on-miss"),
    ],
)
def test_what_would_fail_starts_cold(node: Node, annotations: dict[str, str], said: str) -> None:
    given = {f"rewarm.dev/{key}": value for key, value in annotations.items()}
    try:
        assert node.create(given) == 7, node.log
        outcome = node.outcome()
        assert outcome["outcome"] == "cold" and "unknown key 'stoer'" in outcome["reason"] and said in outcome["reason"]
        assert f"cold start of c1: {outcome['reason']}".replace('"', '\\"') in node.log
        kept = record.load(str(node.directory))
        assert kept is not None and (kept.phase, kept.namespace) == (record.COLD, "team")
        assert (kept.request["capture"], kept.request["on_miss"]) == ("never", "cold-start")
        assert not (node.directory / "watcher.log").exists()
    finally:
        mounts.unmount_below(str(node.directory))


def test_another_container_of_the_pod_is_not_meant(node: Node) -> None:
    assert node.create({"rewarm.dev/snapshot": "m", "rewarm.dev/container": "sidecar", "rewarm.dev/engin": "x"}) == 7
    assert not node.directory.exists()


@pytest.mark.parametrize("more", [{}, {"rewarm.dev/engine": "x"}])
def test_who_would_rather_fail_does(node: Node, more: dict[str, str]) -> None:
    assert node.create({"rewarm.dev/snapshot": "model", "rewarm.dev/on-miss": "fail", **more}) == 1
    assert "unknown key 'stoer'" in node.log and not node.directory.exists()


def test_without_a_mistake_in_the_settings_they_fail(node: Node) -> None:
    for bad in ({"engin": "vllm"}, {"on-miss": "fail"}):
        given = {f"rewarm.dev/{key}": value for key, value in {"snapshot": "model", **bad}.items()}
        assert node.create(given, f"store: {node.base}/store") == 1
        assert "level=error" in node.log and not node.directory.exists()


def test_a_pod_that_makes_up_its_namespace_fails_as_ever(node: Node) -> None:
    """Settings or not: whose snapshots were asked for cannot be said."""
    for settings in ("stoer: /typo", "namespaces: {team: {ignore: all}}"):
        assert node.create({**BOTH_ENGINES, "rewarm.dev/snapshot": "model"}, settings) == 1
        assert "no engine writes both" in node.log and not node.directory.exists()
