"""The DaemonSet's pod on a bare node, with an API server: fixtures and a start for the tests of both."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support import manifests
from support.bare_node import BareNode
from support.kube_api import KubeApi
from support.node import Node
from support.node_image import NodeImage, RunningPod

ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory, prefix: Path) -> Iterator[NodeImage]:
    with NodeImage(Node(tmp_path_factory.mktemp("image") / "node", prefix)) as podman:
        podman.build()
        podman.first_container()
        yield podman


@pytest.fixture
def machine(nothing_left_behind: None, tmp_path: Path) -> Iterator[BareNode]:
    with BareNode(tmp_path / "machine") as one:
        yield one


@pytest.fixture
def api(nothing_left_behind: None, tmp_path: Path) -> Iterator[KubeApi]:
    with KubeApi(tmp_path / "account", "node-1", {"kubernetes.io/hostname": "node-1"}) as one:
        yield one


def pod_of(overlay: str) -> dict[str, Any]:
    daemonset = manifests.pick(manifests.build(overlay), "DaemonSet", "rewarm-node")
    pod: dict[str, Any] = daemonset["spec"]["template"]["spec"]
    return pod


def start(
    image: NodeImage,
    machine: BareNode,
    api: KubeApi,
    *more: str,
    overlay: str = "base",
    settings: Path | None = None,
    volumes: dict[str, Path] | None = None,
    name: str = "node",
) -> RunningPod:
    return image.start(
        pod_of(overlay),
        f"--target={machine.pid}",
        "--interval=2",
        *more,
        env={**api.environment, "NODE_NAME": api.node},
        volumes={
            ACCOUNT: api.directory,
            **({"/etc/rewarm-node": settings} if settings is not None else {}),
            **(volumes or {}),
        },
        name=name,
    )
