"""The DaemonSet's pod, as a manifest has it, on a bare node, with an API server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support import manifests
from support.bare_node import BareNode
from support.kube_api import KubeApi
from support.node_image import NodeImage, RunningPod

ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"


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
