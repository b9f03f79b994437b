"""A new replica is a new replica: what a restored container has from its own spec, and not from the source."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from support import counter
from support.node import Node

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
