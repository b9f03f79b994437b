"""A kubelet's part of a pod's life, on a node with a containerd of its own: sandbox, mounts, containers, restarts.

What the kubelet gives to a container is made as it makes it: /etc/hosts, the termination log, a service account's
token, ConfigMaps by way of `..data`, Secrets in a file system of their own in memory, log files below the pod's log
directory.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from support import cgroups, image, rootfs
from support.bundle import unmount_below
from support.containerd import Containerd
from support.cri import Cri, CriError, pb
from support.node import Node
from support.proc import Timeout, command, command_line, wait_for

HANDLER = "rewarm"
_PAUSE = "rewarm.test/pause:1"
DNS = "10.96.0.10"
_PLUGINS = Path("/usr/lib/cni")
SYSTEMD = "REWARM_TEST_SYSTEMD"
"""The variable that is set where systemd makes the cgroups (test_pods_systemd.py)."""
_SLICE = "rewarmtest"
_READY = 60.0
_GONE = 5.0
_MASKED = ["/proc/asound", "/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list"]
_READ_ONLY = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]
"""The kubelet's defaults."""


def pause_image() -> Path:
    """The archive of the sandboxes' image."""
    layer = rootfs.cache() / "pause"
    source = Path(__file__).with_name("pause.c")
    if not (layer / "pause").exists() or (layer / "pause").stat().st_mtime < source.stat().st_mtime:
        layer.mkdir(exist_ok=True)
        scratch = layer.with_name(f".pause-{os.getpid()}")
        command("gcc", "-static", "-Os", "-Wall", "-Wextra", "-Werror", "-o", scratch, source)
        scratch.rename(layer / "pause")
    return image.pack(rootfs.cache() / "images" / "pause.tar", _PAUSE, [layer], args=["/pause"])


@dataclass
class Pod:
    """A sandbox with what belongs to it. `ips`: IPv4, then IPv6."""

    name: str
    namespace: str
    uid: str
    directory: Path
    config: Any
    sandbox: str = ""
    ips: list[str] = field(default_factory=list)
    containers: list[str] = field(default_factory=list)


class KubeNode:
    """A node: containerd with the runtime `rewarm`, pod networks `10.100+NUMBER.0.0/24` and `fd00:100+NUMBER::/64`.

    Nodes that are given one `store` share it. `binary` is containerd's, whose own directory has its shim and ctr.
    `annotations` are passed on to the runtime, too. `older`: seconds for which it has been up longer. `systemd_cgroup`:
    pods are slices of systemd's, as with the kubelet's cgroup driver of that name.
    """

    def __init__(
        self,
        directory: Path,
        prefix: Path,
        *,
        number: int = 1,
        store: Path | None = None,
        binary: Path = Path("/usr/bin/containerd"),
        systemd_cgroup: bool = False,
        older: int = 0,
        annotations: Sequence[str] = (),
        **settings: object,
    ) -> None:
        self.directory = directory
        self.node = Node(directory / "node", prefix, store=store, **settings)
        self.number = number
        self.binary = binary
        self.systemd_cgroup = systemd_cgroup
        self._pods: list[Pod] = []
        networks = directory / "networks"
        networks.mkdir(parents=True)
        (networks / "pods.conflist").write_text(json.dumps(self._network()))
        runtime = prefix / "bin" / "rewarm-runc"
        path = f"{binary.parent}:{os.environ['PATH']}"
        self.engine = Containerd(
            directory / "containerd",
            env={**self.node.env, "PATH": path},
            binary=binary,
            cri=True,
            cri_config=[
                f'sandbox_image = "{_PAUSE}"',
                "netns_mounts_under_state_dir = true",
                "tolerate_missing_hugetlb_controller = true",
                '[plugins."io.containerd.grpc.v1.cri".cni]',
                f'bin_dir = "{_PLUGINS}"',
                f'conf_dir = "{networks}"',
            ],
            cri_runtimes={"runc": None, HANDLER: runtime},
            cri_annotations=annotations,
            systemd_cgroup=systemd_cgroup,
            older=older,
        )
        try:
            self._settings = settings
            self.configure()
            self.cri = Cri(self.engine.socket)
            self.engine.import_image(pause_image(), namespace="k8s.io")
            wait_for("the pod network", self._network_ready, timeout=30)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> KubeNode:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def configure(self, **settings: object) -> None:
        """The node's settings: those it was made with, and these."""
        self.node.configure(runtime_roots=[str(self.engine.runc_root / "*")], **{**self._settings, **settings})

    def _network(self) -> dict[str, Any]:
        ranges = [[{"subnet": f"10.{100 + self.number}.0.0/24"}], [{"subnet": f"fd00:{100 + self.number}::/64"}]]
        addresses = {"type": "host-local", "dataDir": str(self.directory / "addresses"), "ranges": ranges}
        bridge = {"type": "bridge", "bridge": "pods", "isGateway": True, "ipam": addresses}
        return {"cniVersion": "1.0.0", "name": "pods", "plugins": [bridge]}

    def _network_ready(self) -> bool:
        conditions = {one.type: one.status for one in self.cri.call("Status").status.conditions}
        return bool(conditions.get("NetworkReady"))

    @property
    def gateway(self) -> str:
        """The node's own address in its pod network."""
        return f"10.{100 + self.number}.0.1"

    def import_image(self, archive: Path) -> None:
        self.engine.import_image(archive, namespace="k8s.io")

    def pod(
        self,
        name: str,
        *,
        namespace: str = "default",
        annotations: Mapping[str, str] | None = None,
        handler: str = HANDLER,
        share_pids: bool = False,
        host_network: bool = False,
        host_ipc: bool = False,
        sysctls: Mapping[str, str] | None = None,
        dns: str = DNS,
    ) -> Pod:
        """RunPodSandbox: a pod of this name, with a new uid. Raises CriError."""
        uid = secrets.token_hex(8)
        directory = self.directory / "pods" / f"{namespace}_{name}_{uid}"
        (directory / "logs").mkdir(parents=True)
        config = pb.PodSandboxConfig(
            metadata=pb.PodSandboxMetadata(name=name, uid=uid, namespace=namespace),
            hostname="" if host_network else name[:63],
            log_directory=str(directory / "logs"),
            dns_config=pb.DNSConfig(servers=[dns], searches=[f"{namespace}.svc.cluster.local"]),
            annotations=dict(annotations or {}),
            linux=pb.LinuxPodSandboxConfig(
                cgroup_parent=f"{_SLICE}-pod{uid}.slice" if self.systemd_cgroup else f"{self.engine.cgroup}/pod{uid}",
                sysctls=dict(sysctls or {}),
                security_context=pb.LinuxSandboxSecurityContext(
                    namespace_options=pb.NamespaceOption(
                        pid=pb.POD if share_pids else pb.CONTAINER,
                        network=pb.NODE if host_network else pb.POD,
                        ipc=pb.NODE if host_ipc else pb.POD,
                    ),
                    seccomp=pb.SecurityProfile(profile_type=pb.SecurityProfile.RuntimeDefault),
                ),
            ),
        )
        made = Pod(name, namespace, uid, directory, config)
        self._pods.append(made)
        made.sandbox = self.cri.call("RunPodSandbox", config=config, runtime_handler=handler).pod_sandbox_id
        network = self.cri.call("PodSandboxStatus", pod_sandbox_id=made.sandbox).status.network
        made.ips = ["127.0.0.1"] if host_network else [network.ip, *(one.ip for one in network.additional_ips)]
        self._volumes(made)
        return made

    def _volumes(self, pod: Pod) -> None:
        directory = pod.directory
        names = "\n".join(f"{ip}\t{pod.name}" for ip in pod.ips)
        (directory / "etc-hosts").write_text(f"# Kubernetes-managed hosts file.\n127.0.0.1\tlocalhost\n{names}\n")
        (directory / "secret").mkdir()
        command("mount", "-t", "tmpfs", "tmpfs", directory / "secret")
        for volume in ("token", "config", "secret"):
            version = directory / volume / "..2026_01"
            version.mkdir(parents=True)
            (version / volume).write_text(f"{volume} of {pod.name} {pod.uid}\n")
            os.symlink(version.name, directory / volume / "..data")
            os.symlink(f"..data/{volume}", directory / volume / volume)
        (directory / "empty").mkdir(mode=0o777)
        (directory / "empty").chmod(0o777)

    def container(
        self,
        pod: Pod,
        name: str,
        reference: str,
        args: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        attempt: int = 0,
        annotations: Mapping[str, str] | None = None,
        resources: Mapping[str, int] | None = None,
        security: Mapping[str, Any] | None = None,
        mounts: Sequence[tuple[str, Path, bool]] = (),
        start: bool = True,
    ) -> str:
        """CreateContainer and, if wanted, StartContainer; its id. Raises CriError.

        `mounts`: path, source, read-only.
        """
        log = pod.directory / "logs" / name
        log.mkdir(exist_ok=True)
        termination = pod.directory / f"termination-{name}-{attempt}"
        termination.touch()
        own = [
            ("/etc/hosts", pod.directory / "etc-hosts", False),
            ("/dev/termination-log", termination, False),
            ("/var/run/secrets/kubernetes.io/serviceaccount", pod.directory / "token", True),
            ("/etc/config", pod.directory / "config", True),
            ("/etc/secret", pod.directory / "secret", True),
            ("/cache", pod.directory / "empty", False),
        ]
        wanted: dict[str, Any] = {
            "namespace_options": pod.config.linux.security_context.namespace_options,
            "masked_paths": _MASKED,
            "readonly_paths": _READ_ONLY,
            "seccomp": pb.SecurityProfile(profile_type=pb.SecurityProfile.RuntimeDefault),
            **(security or {}),
        }
        config = pb.ContainerConfig(
            metadata=pb.ContainerMetadata(name=name, attempt=attempt),
            image=pb.ImageSpec(image=reference),
            command=list(args),
            envs=[
                pb.KeyValue(key=key, value=value)
                for key, value in {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "HOSTNAME": pod.name, **(env or {})}.items()
            ],
            mounts=[
                pb.Mount(container_path=path, host_path=str(source), readonly=read_only)
                for path, source, read_only in [*own, *mounts]
            ],
            annotations=dict(annotations or {}),
            log_path=f"{name}/{attempt}.log",
            linux=pb.LinuxContainerConfig(
                resources=pb.LinuxContainerResources(**{"oom_score_adj": 1000, "cpu_shares": 2, **(resources or {})}),
                security_context=pb.LinuxContainerSecurityContext(**wanted),
            ),
        )
        made: str = self.cri.call(
            "CreateContainer", pod_sandbox_id=pod.sandbox, config=config, sandbox_config=pod.config
        ).container_id
        pod.containers.append(made)
        if start:
            self.cri.call("StartContainer", container_id=made)
        return made

    def cgroup(self, pod: Pod, container: str = "") -> str:
        """The cgroup of a pod, or of one of its containers."""
        parent = str(pod.config.linux.cgroup_parent)
        if not self.systemd_cgroup:
            return f"{parent}/{container}".rstrip("/")
        return f"/{_SLICE}.slice/{parent}/" + (f"cri-containerd-{container}.scope" if container else "")

    def status(self, container: str) -> Any:
        return self.cri.call("ContainerStatus", container_id=container).status

    def pid(self, container: str) -> int:
        """The pid of a container's init on this node."""
        info = self.cri.call("ContainerStatus", container_id=container, verbose=True).info
        return int(json.loads(info["info"])["pid"])

    def log(self, pod: Pod, name: str, attempt: int = 0) -> str:
        """What `kubectl logs` shows: the CRI's log format without its prefixes."""
        path = pod.directory / "logs" / name / f"{attempt}.log"
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        return "".join(line.split(" ", 3)[3] + "\n" for line in lines if line.count(" ") >= 3)

    def state(self, container: str) -> dict[str, Any]:
        """What runc says of a container."""
        said = command("runc", "--root", self.engine.runc_root / "k8s.io", "state", container).stdout
        found: dict[str, Any] = json.loads(said)
        return found

    def exec(self, container: str, *args: str) -> str:
        """ExecSync, as an exec probe does; standard output. Raises AssertionError for a status other than 0."""
        done = self.cri.call("ExecSync", container_id=container, cmd=list(args), timeout=30)
        assert done.exit_code == 0, (args, done.exit_code, done.stdout, done.stderr)
        return str(done.stdout.decode())

    def outcome(self, container: str) -> dict[str, Any]:
        """What rewarm says about a container: warm or cold, and why."""
        return self.node.outcome(container, self.engine.runc_root / "k8s.io")

    def watched(self, container: str, *, timeout: float = _READY) -> dict[str, Any]:
        """What the watcher of a container with `capture: on-ready` says at its end."""
        path = self.node.container_directory(container, self.engine.runc_root / "k8s.io") / "capture.json"
        wait_for(f"the capture of {container[:12]}", path.exists, timeout=timeout)
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    def wait_captured(self, container: str, *, timeout: float = _READY) -> dict[str, Any]:
        """The same. Raises AssertionError if it says no."""
        found = self.watched(container, timeout=timeout)
        assert found["captured"], found
        return found

    def wait_exited(self, container: str, *, timeout: float = 30.0) -> Any:
        """Waits for the end of a container; its status."""
        wait_for(
            f"end of {container[:12]}",
            lambda: self.status(container).state == pb.CONTAINER_EXITED,
            timeout=timeout,
        )
        return self.status(container)

    def json(self, pod: Pod, path: str, *, port: int = 8000, timeout: float = 10.0, ip: str = "") -> Any:
        """GET of a pod's server, as another pod of the node would."""
        return self.engine.network.json(port, path, host=ip or pod.ips[0], timeout=timeout)

    def wait_ready(self, pod: Pod, path: str = "/ready", *, port: int = 8000, timeout: float = _READY) -> float:
        """Asks as a readiness probe does, every 10 ms; seconds that it took."""
        began = time.monotonic()
        self.engine.network.wait_http(port, path, host=pod.ips[0], timeout=timeout)
        return time.monotonic() - began

    def remove(self, pod: Pod) -> None:
        """What the kubelet does when a pod is deleted. A second call does nothing.

        Raises CriError, and AssertionError for what then was there still; that is gone, too.
        """
        if pod not in self._pods:
            return
        left: list[str] = []
        if pod.sandbox:
            self.cri.call("StopPodSandbox", pod_sandbox_id=pod.sandbox)
            self.cri.call("RemovePodSandbox", pod_sandbox_id=pod.sandbox)
            left = _staying(lambda: [f"{pid} {command_line(pid)}" for pid in cgroups.processes(self.cgroup(pod))])
        if self.systemd_cgroup:
            command("systemctl", "stop", pod.config.linux.cgroup_parent)
        if pod.sandbox:
            left += _staying(lambda: self._traces(pod))
        cgroups.remove(self.cgroup(pod))
        unmount_below(pod.directory)
        self._pods.remove(pod)
        assert not left, f"left by pod {pod.name}: {left}"

    def _traces(self, pod: Pod) -> list[str]:
        """Cgroups below the pod's own, and what runc knows of its containers."""
        below = [path for path in cgroups.directories(self.cgroup(pod)) if path.name != Path(self.cgroup(pod)).name]
        known = [path for name in (pod.sandbox, *pod.containers) for path in self.engine.runc_root.glob(f"*/{name}")]
        return [str(path) for path in (*below, *known)]

    def remove_all(self) -> None:
        """Every pod, though one of them fails. Raises CriError and AssertionError."""
        with contextlib.ExitStack() as stack:
            for pod in self._pods:
                stack.callback(self.remove, pod)

    def close(self) -> None:
        """Removes every pod, then the engine. A second call does nothing. Raises AssertionError."""
        with contextlib.ExitStack() as stack:
            stack.callback(self._stop)
            cri: Cri | None = getattr(self, "cri", None)
            if cri is not None:
                stack.callback(cri.close)
                for pod in self._pods:
                    stack.callback(self._remove_if_possible, pod)

    def _remove_if_possible(self, pod: Pod) -> None:
        with contextlib.suppress(CriError):  # what is left ends with the engine
            self.remove(pod)

    def _stop(self) -> None:
        if self.systemd_cgroup:
            command("systemctl", "stop", f"{_SLICE}.slice")
        self.engine.stop()
        self.node.runtime.cleanup()
        unmount_below(self.directory / "pods")
        shutil.rmtree(self.directory / "pods", ignore_errors=True)


def _staying(probe: Callable[[], list[str]]) -> list[str]:
    """What is there still when it had its time to go."""
    with contextlib.suppress(Timeout):
        wait_for("it to go", lambda: not probe(), timeout=_GONE)
        return []
    return probe()
