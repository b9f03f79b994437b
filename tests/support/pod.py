"""A containerd with its CRI plugin whose configuration a test may change: restarted as a node would, asked by gRPC.

The few calls of the CRI that a pod with one container takes, in the protobuf wire format: fields by their numbers in
api.proto of k8s.io/cri-api v1.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc

from support import rootfs
from support.containerd import Containerd
from support.image import pack
from support.node import Node
from support.proc import wait_for

IMAGE = "rewarm.test/base:1"
# NamespaceMode: the node's own network, so that no plugin is needed, and pids as kubelet has them by default.
_NODE, _CONTAINER = 2, 1


def message(*fields: tuple[int, object]) -> bytes:
    """Encodes (number, value) pairs: int, str, bytes (a message) or a dict of strings (map<string, string>)."""
    encoded = b""
    for number, value in fields:
        if isinstance(value, dict):
            for key, text in value.items():
                encoded += message((number, message((1, key), (2, text))))
        elif isinstance(value, int):
            encoded += _varint(number << 3) + _varint(value)
        else:
            data = value.encode() if isinstance(value, str) else value
            assert isinstance(data, bytes)
            encoded += _varint(number << 3 | 2) + _varint(len(data)) + data
    return encoded


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 127:
        encoded.append(number & 127 | 128)
        number >>= 7
    return bytes([*encoded, number])


def first_text(answer: bytes) -> str:
    """The string in field 1 of an answer that is shorter than 128 bytes there: an id."""
    assert answer[0] == 1 << 3 | 2, answer
    return answer[2 : 2 + answer[1]].decode()


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
        self.env = dict(node.env)
        if programs:  # its shim is found in PATH
            self.env["PATH"] = f"{programs}:{os.environ['PATH']}"
        super().__init__(directory, cri=True, binary=self.program, env=self.env)
        self.config = directory / "config.toml"
        try:
            command = ("python3", "-c", "import time; time.sleep(3600)")
            image = pack(rootfs.cache() / "images" / "pod.tar", IMAGE, [rootfs.base()], args=command)
            self.import_image(image, namespace="k8s.io")
        except BaseException:
            self.stop()
            raise

    def _config(self, cri: bool) -> str:
        text = super()._config(cri)
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

    def restart(self) -> None:
        """Ends the daemon and starts it anew, with whatever is in its configuration now."""
        assert self._process is not None
        self._process.terminate()
        self._process.wait(30)
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.network.argv(self.program, "--config", self.config),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **self.env, "TMPDIR": str(self._run)},
                start_new_session=True,
            )
        wait_for("containerd's answer", self._answers, timeout=30)

    def call(self, method: str, request: bytes) -> bytes:
        """One call of the CRI. Raises grpc.RpcError."""
        with grpc.insecure_channel(f"unix://{self.socket}") as channel:
            ask = channel.unary_unary(f"/runtime.v1.RuntimeService/{method}", None, None)
            answer: bytes = ask(request, timeout=60, wait_for_ready=True)
            return answer

    @contextmanager
    def pod(self, handler: str, annotations: Mapping[str, str]) -> Iterator[tuple[str, bytes]]:
        """A pod sandbox: its id and the configuration that its containers need; stopped and removed afterwards."""
        names = message((1, _NODE), (2, _CONTAINER))
        linux = message((1, self.cgroup), (2, message((1, names))))
        metadata = message((1, "pod"), (2, "uid-1"), (3, "default"))
        logs = self.directory / "pods"
        logs.mkdir(exist_ok=True)
        config = message((1, metadata), (3, str(logs)), (7, dict(annotations)), (8, linux))
        made = first_text(self.call("RunPodSandbox", message((1, config), (2, handler))))
        try:
            yield made, config
        finally:
            self.call("StopPodSandbox", message((1, made)))
            self.call("RemovePodSandbox", message((1, made)))

    def run_container(self, pod: tuple[str, bytes], name: str, command: Sequence[str]) -> str:
        """Creates and starts a container of the pod; its id. Its output goes to `log_of`."""
        namespaces = message((1, _NODE), (2, _CONTAINER))
        config = message(
            (1, message((1, name))),
            (2, message((1, IMAGE))),
            *((3, word) for word in command),
            (11, f"{name}.log"),
            (15, message((2, message((3, namespaces))))),
        )
        made = first_text(self.call("CreateContainer", message((1, pod[0]), (2, config), (3, pod[1]))))
        self.call("StartContainer", message((1, made)))
        return made

    def log_of(self, name: str) -> str:
        path = self.directory / "pods" / f"{name}.log"
        return path.read_text() if path.exists() else ""

    def runtime_binary(self, container_id: str) -> str:
        """The runtime that the container's shim calls, from the bundle."""
        bundle = self._run / "state/io.containerd.runtime.v2.task/k8s.io" / container_id
        options: dict[str, Any] = json.loads((bundle / "options.json").read_text())
        return str(options.get("binary_name") or options.get("BinaryName") or "")
