"""A new replica is a new replica: what a restored container has from its own spec, and not from the source."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from support import counter
from support.netns import NetworkNamespace
from support.node import Node

ANNOTATION = {"rewarm.dev/snapshot": "counter"}
POD = {
    "io.kubernetes.cri.container-type": "container",
    "io.kubernetes.cri.sandbox-namespace": "default",
    "io.kubernetes.cri.sandbox-name": "ocr-2",
    "io.kubernetes.cri.sandbox-uid": "u-2",
    "io.kubernetes.cri.container-name": "server",
}
HOSTNAME = ["cat", "/proc/sys/kernel/hostname"]
DOMAIN = ["cat", "/proc/sys/kernel/domainname"]


@contextmanager
def uts_namespace(host: str, domain: str | None = None) -> Iterator[Path]:
    """As a pod's, of its pause container: kept by a process."""
    script = f"hostname {host}; " + (f"echo {domain} > /proc/sys/kernel/domainname; " if domain else "")
    with subprocess.Popen(["unshare", "--uts", "sh", "-c", f"{script}echo; exec sleep 600"], stdout=-1) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == b"\n"
            yield Path(f"/proc/{process.pid}/ns/uts")
        finally:
            process.kill()


@contextmanager
def network_namespace() -> Iterator[Path]:
    """As a pod's, with addresses."""
    with NetworkNamespace() as found:
        for words in (
            ["link", "set", "lo", "up"],
            ["address", "add", "10.88.0.7/32", "dev", "lo", "scope", "global"],
            ["address", "add", "10.88.0.8/32", "dev", "lo", "scope", "link"],
            ["address", "add", "fd00::7/128", "dev", "lo", "nodad"],
            ["address", "add", "fd00::8/128", "dev", "lo", "nodad", "preferred_lft", "0"],
        ):
            subprocess.run(found.argv("ip", *words), check=True)
        yield found.path


def joining(made: Any, path: Path) -> Any:
    spec = made.spec
    spec.pop("hostname")
    for namespace in spec["linux"]["namespaces"]:
        if namespace["type"] == "uts":
            namespace["path"] = str(path)
    made.write()
    return made


def names(node: Node, name: str) -> tuple[str, str]:
    exec_ = node.runtime.exec
    return exec_(name, *HOSTNAME).strip(), exec_(name, *DOMAIN).strip()


def start(node: Node, name: str, made: Any) -> None:
    node.runtime.create(name, made)
    assert node.outcome(name)["outcome"] == "warm", node.outcome(name)
    node.runtime.start(name)


def test_its_host_name_is_its_own(node: Node) -> None:
    counter.captured(node, hostname="source-1")
    start(node, "copy", counter.bundle(node.directory / "copy", hostname="copy-2"))
    assert names(node, "copy") == ("copy-2", "(none)")
    assert names(node, "source")[0] == "source-1"


def test_a_namespace_without_a_name_is_a_copy_of_the_nodes(node: Node) -> None:
    counter.captured(node, hostname="source-1")
    made = counter.bundle(node.directory / "copy")
    made.spec.pop("hostname")
    made.write()
    start(node, "copy", made)
    assert names(node, "copy")[0] == os.uname().nodename


@pytest.mark.parametrize("domain", [None, "example.org"])
def test_a_pods_namespace_keeps_its_names(node: Node, domain: str | None) -> None:
    with uts_namespace("pod-a") as source:
        made = joining(counter.bundle(node.directory / "source"), source)
        counter.run(node.runtime, "source", made)
        node.rewarm("capture", "source", "--name", "counter", "--stop")
    node.runtime.delete("source")
    with uts_namespace("pod-b", domain) as target:
        start(node, "copy", joining(counter.bundle(node.directory / "copy"), target))
        assert names(node, "copy") == ("pod-b", domain or "(none)")
        seen = subprocess.run(["nsenter", f"--uts={target}", "hostname"], check=True, capture_output=True, text=True)
        assert seen.stdout == "pod-b\n", "the pod's other containers have the namespace, too"
        node.runtime.kill("copy", "KILL")
        node.runtime.wait_stopped("copy")
        node.runtime.delete("copy")


def told(node: Node, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(node.runtime.exec(name, "cat", "/run/rewarm/restored.json"))
    return found


def test_it_is_told_what_is_new(node: Node) -> None:
    counter.captured(node, annotations=ANNOTATION)
    assert node.runtime.run("exec", "source", "cat", "/run/rewarm/restored.json", check=False).returncode != 0
    environment = {"PYTHONHASHSEED": "0", "HOSTNAME": "copy=2"}
    with network_namespace() as network:
        more = {"hostname": "copy-2", "env": environment, "network": network}
        start(node, "copy", counter.bundle(node.directory / "copy", {**ANNOTATION, **POD}, **more))
        found = told(node, "copy")
        assert found["snapshot"] == node.outcome("copy")["snapshot"]
        assert found["reason"] == f"restored from {found['snapshot']} at {found['restored']}"
        assert abs(datetime.fromisoformat(found["restored"]).timestamp() - time.time()) < 60
        assert found["pod"] == {"namespace": "default", "name": "ocr-2", "uid": "u-2", "container": "server"}
        assert (found["container"], found["hostname"]) == ("copy", "copy-2")
        assert found["addresses"] == ["10.88.0.7", "fd00::7"], "neither of the loopback, of one link nor deprecated"
        assert {key: found["environment"][key] for key in environment} == environment
        node.runtime.kill("copy", "KILL")
        node.runtime.wait_stopped("copy")
        node.runtime.delete("copy")


def test_one_that_falls_back_has_none(node: Node) -> None:
    counter.captured(node)
    made = counter.bundle(node.directory / "copy", env={"PYTHONHASHSEED": "0", "MODE": "new"})
    counter.run(node.runtime, "copy", made)
    assert node.outcome("copy")["outcome"] == "cold"
    assert node.runtime.run("exec", "copy", "cat", "/run/rewarm/restored.json", check=False).returncode != 0


def test_a_copy_of_a_copy_is_told_of_itself(node: Node) -> None:
    counter.captured(node, hostname="one")
    start(node, "copy", counter.bundle(node.directory / "copy", hostname="two"))
    node.rewarm("capture", "copy", "--name", "counter")
    start(node, "again", counter.bundle(node.directory / "again", hostname="three"))
    assert (told(node, "again")["hostname"], told(node, "again")["container"]) == ("three", "again")
    assert told(node, "again")["snapshot"] != told(node, "copy")["snapshot"]
    assert names(node, "again")[0] == "three"
