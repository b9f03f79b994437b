"""A containerd with its CRI plugin whose configuration a test may change, restarted as a node's is."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from support import rootfs
from support.containerd import Containerd
from support.cri import Cri, pb
from support.image import pack
from support.node import Node

IMAGE = "rewarm.test/base:1"
# The node's own network, so that no plugin is needed, and pids as the kubelet has them by default.
_NAMESPACES = pb.NamespaceOption(network=pb.NODE, pid=pb.CONTAINER)


class CriContainerd(Containerd):
    """containerd (the machine's, or the newer one) with CRI and the base image, as its only image and its sandbox's.

    `config` has version 2, or 3 (newer only) and imports conf.d/*.toml then. `runc` is the binary that its runtime
    `runc` names.
    """

    def __init__(self, directory: Path, node: Node, *, newer: bool = False, version: int = 2, runc: str = "") -> None:
        self.node = node
        self.version = version
        self.runc = runc
        programs = rootfs.containerd2() if newer else None
        self.program = str(programs / "containerd") if programs else "/usr/bin/containerd"
        env = dict(node.env)
        if programs:  # its shim is found in PATH
            env["PATH"] = f"{programs}:{os.environ['PATH']}"
        super().__init__(directory, cri=True, binary=self.program, env=env)
        self.config = directory / "config.toml"
        try:
            command = ("python3", "-c", "import time; time.sleep(3600)")
            image = pack(rootfs.cache() / "images" / "pod.tar", IMAGE, [rootfs.base()], args=command)
            self.import_image(image, namespace="k8s.io")
        except BaseException:
            self.stop()
            raise

    def _config(self, cri: bool, cri_config: Sequence[str], runtimes: Mapping[str, Path | None]) -> str:
        text = super()._config(cri, cri_config, runtimes)
        runtime = "io.containerd.cri.v1.runtime" if self.version == 3 else "io.containerd.grpc.v1.cri"
        if self.version == 3:
            text = text.replace("io.containerd.grpc.v1.cri", runtime).replace("version = 2", "version = 3")
            text = f'imports = ["{self.directory}/conf.d/*.toml"]\n{text}'
            text += f'[plugins."io.containerd.cri.v1.images".pinned_images]\nsandbox = "{IMAGE}"\n'
        else:
            text += f'sandbox_image = "{IMAGE}"\n'
        if self.runc:
            table = f'plugins."{runtime}".containerd.runtimes.runc'
            if self.version == 2:  # the newer one has the type built in, and merges
                text += f'[{table}]\nruntime_type = "io.containerd.runc.v2"\n'
            text += f'[{table}.options]\nBinaryName = "{self.runc}"\n'
        return text

    @property
    def runc_root_of_pods(self) -> Path:
        """runc's root for the CRI's containers, which no option of the CRI plugin changes."""
        return Path("/run/containerd/runc/k8s.io")

    def call(self, method: str, **fields: Any) -> Any:
        """One call of the CRI. Raises CriError."""
        with Cri(self.socket) as cri:
            return cri.call(method, **fields)

    @contextmanager
    def pod(self, handler: str, annotations: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
        """A pod sandbox: its id and the configuration that its containers need; stopped and removed afterwards."""
        logs = self.directory / "pods"
        logs.mkdir(exist_ok=True)
        config = pb.PodSandboxConfig(
            metadata=pb.PodSandboxMetadata(name="pod", uid="uid-1", namespace="default"),
            log_directory=str(logs),
            annotations=dict(annotations),
            linux=pb.LinuxPodSandboxConfig(
                cgroup_parent=self.cgroup,
                security_context=pb.LinuxSandboxSecurityContext(namespace_options=_NAMESPACES),
            ),
        )
        made = self.call("RunPodSandbox", config=config, runtime_handler=handler).pod_sandbox_id
        try:
            yield made, config
        finally:
            self.call("StopPodSandbox", pod_sandbox_id=made)
            self.call("RemovePodSandbox", pod_sandbox_id=made)

    def run_container(self, pod: tuple[str, Any], name: str, command: Sequence[str]) -> str:
        """Creates and starts a container of the pod; its id. Its output goes to `log_of`."""
        context = pb.LinuxContainerSecurityContext(namespace_options=_NAMESPACES)
        config = pb.ContainerConfig(
            metadata=pb.ContainerMetadata(name=name),
            image=pb.ImageSpec(image=IMAGE),
            command=list(command),
            log_path=f"{name}.log",
            linux=pb.LinuxContainerConfig(security_context=context),
        )
        made: str = self.call(
            "CreateContainer", pod_sandbox_id=pod[0], config=config, sandbox_config=pod[1]
        ).container_id
        self.call("StartContainer", container_id=made)
        return made

    def log_of(self, name: str) -> str:
        path = self.directory / "pods" / f"{name}.log"
        return path.read_text() if path.exists() else ""

    def runtime_binary(self, container_id: str) -> str:
        """The runtime that the container's shim calls, from the bundle."""
        bundle = self._run / "state/io.containerd.runtime.v2.task/k8s.io" / container_id
        options: dict[str, Any] = json.loads((bundle / "options.json").read_text())
        return str(options.get("binary_name") or options.get("BinaryName") or "")
