"""A private Docker engine with rewarm as one of its runtimes, driven through its API by testcontainers."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from testcontainers.core.container import DockerContainer
from testcontainers.core.docker_client import DockerClient

from support import rootfs
from support.bundle import unmount_below
from support.containerd import Containerd
from support.node import Node
from support.proc import CommandFailed, kill, wait_for

RUNTIME = "rewarm"
# dockerd before version 24 writes a key here, wherever its other files are.
_KEY = Path("/etc/docker/key.json")
IMAGE = "rewarm.test/base:1"
# Without Ryuk, which testcontainers would pull: `Docker.stop` removes every container. The other two keep it from
# asking the bridge, which is not there, for an address.
CLIENT = {
    "TESTCONTAINERS_RYUK_DISABLED": "true",
    "TESTCONTAINERS_HOST_OVERRIDE": "127.0.0.1",
    "TESTCONTAINERS_CONNECTION_MODE": "docker_host",
}


class Docker:
    """A dockerd below `node.directory`, with a containerd and a network namespace of its own.

    Its own containerd is a `Containerd`, not the one dockerd would start: dockerd takes the machine's when that
    runs. No bridge, no firewall rules: containers have the network "none", or "host", which is the daemon's
    namespace. Runtime `rewarm` is this node's rewarm-runc, found by name in daemon.json; its REWARM_CONFIG comes
    by the environment that containerd hands to shim and runtime. `node` is configured to find the containers. Unless
    `registered`, daemon.json (`config`) says nothing of rewarm, for a test to register it there. `program` is the
    daemon: the machine's, or another version (`rootfs.dockerd`).
    """

    def __init__(self, node: Node, *, registered: bool = True, program: Path | str = "dockerd") -> None:
        self.node = node
        self._program = program
        self.directory = node.directory / "docker"
        self.directory.mkdir(parents=True)
        # Short: a unix socket's path has 107 bytes at most, and test directories have long names.
        self._run = Path(tempfile.mkdtemp(prefix=f"rwt-{os.getpid()}-", dir="/run"))
        self.socket = self._run / "docker.sock"
        # The runc root of all of dockerd's runtimes, whatever their name; moby is its containerd namespace.
        self.runc_root = self._run / "exec" / "runtime-runc" / "moby"
        self.log = self.directory / "dockerd.log"
        self.config = self.directory / "daemon.json"
        self._registered = registered
        self._had_key = _KEY.exists()
        self._process: subprocess.Popen[bytes] | None = None
        self._containerd: Containerd | None = None
        node.configure(runtime_roots=[str(self._run / "exec" / "runtime-*" / "moby")])
        try:
            self._containerd = Containerd(self.directory / "containerd", env=node.env)
            self._start(self._containerd)
            with self.environment():
                self.api = DockerClient().client.api
            self._import_image()
        except BaseException as error:
            error.add_note(self._log_tail())
            self.stop()
            raise

    def __enter__(self) -> Docker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is not None:
            error.add_note(self._log_tail())
        self.stop()

    def _start(self, containerd: Containerd) -> None:
        settings = {
            "bridge": "none",
            "cgroup-parent": containerd.cgroup,  # which Containerd.stop removes
            "containerd": str(containerd.socket),
            "data-root": str(self.directory / "data"),
            "exec-opts": ["native.cgroupdriver=cgroupfs"],
            "exec-root": str(self._run / "exec"),
            "hosts": [f"unix://{self.socket}"],
            "ip-forward": False,
            "iptables": False,
            "pidfile": str(self._run / "docker.pid"),
            "storage-driver": "overlay2",  # rewarm takes a container's changes out of its overlay
        }
        if self._registered:
            settings["runtimes"] = {RUNTIME: {"path": str(self.node.prefix / "bin" / "rewarm-runc")}}
        self.config.write_text(json.dumps(settings, indent=1))
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                containerd.network.argv(self._program, "--config-file", self.config),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **self.node.env, "TMPDIR": str(self._run)},
                start_new_session=True,
            )
        wait_for("dockerd's answer", self._answers, timeout=60)

    def _answers(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            raise CommandFailed(["dockerd"], self._process.returncode, self._log_tail())
        return "API listen on" in self.log.read_text(errors="replace")

    def _log_tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-20:]) if self.log.exists() else ""

    def _import_image(self) -> None:
        """`docker import -` of the base root filesystem, as one layer."""
        words = ["tar", "--numeric-owner", "-C", str(rootfs.base()), "-c", "."]
        with subprocess.Popen(words, stdout=subprocess.PIPE) as tar:
            assert tar.stdout is not None
            repository, tag = IMAGE.split(":")
            pieces = iter(partial(tar.stdout.read, 1 << 20), b"")
            said = self.api.import_image(src=pieces, repository=repository, tag=tag)
        if tar.returncode != 0:
            raise CommandFailed(words, tar.returncode, str(said))

    def reload(self) -> None:
        """What `systemctl reload docker` does: dockerd reads its file again. Returns once it has."""
        assert self._process is not None
        before = self.log.read_text(errors="replace").count("Got signal to reload")
        self._process.send_signal(signal.SIGHUP)
        wait_for(
            "dockerd reading its file again",
            lambda: (
                "Reloaded configuration" in self.log.read_text(errors="replace").split("Got signal to reload")[-1]
                and self.log.read_text(errors="replace").count("Got signal to reload") > before
            ),
        )

    @contextmanager
    def environment(self) -> Iterator[None]:
        """This process's environment for testcontainers, which reads it when a container object is made."""
        wanted = {**CLIENT, "DOCKER_HOST": f"unix://{self.socket}"}
        before = {key: os.environ.get(key) for key in wanted}
        os.environ.update(wanted)
        try:
            yield
        finally:
            for key, value in before.items():
                if value is None:
                    del os.environ[key]
                else:
                    os.environ[key] = value

    @property
    def annotations(self) -> bool:
        """Whether the engine hands annotations to the runtime: API 1.43, Docker 24 and newer."""
        version = self.api.version()["ApiVersion"]
        return tuple(map(int, version.split("."))) >= (1, 43)

    @contextmanager
    def container(
        self, args: Sequence[str], *, env: Mapping[str, str] | None = None, network: str = "none"
    ) -> Iterator[DockerContainer]:
        """A container of the base image by testcontainers, under runtime `rewarm`; removed afterwards."""
        with self.environment():
            made = DockerContainer(IMAGE).with_command(list(args)).with_envs(**(env or {}))
            with made.with_kwargs(runtime=RUNTIME, network_mode=network) as running:
                yield running

    @contextmanager
    def annotated(
        self,
        args: Sequence[str],
        annotations: Mapping[str, str],
        *,
        env: Mapping[str, str] | None = None,
        image: str = IMAGE,
        host: Mapping[str, Any] | None = None,
        **config: Any,
    ) -> Iterator[str]:
        """The id of a started container with annotations, which testcontainers has no word for; removed afterwards.

        `host` are parameters of docker-py's create_host_config, `config` of its create_container_config.
        """
        wanted = {"network_mode": "none", "runtime": RUNTIME, **(host or {})}
        host_config = {**self.api.create_host_config(**wanted), "Annotations": dict(annotations)}
        config = self.api.create_container_config(
            image, list(args), environment=dict(env or {}), host_config=host_config, **config
        )
        made: str = self.api.create_container_from_config(config)["Id"]
        try:
            self.api.start(made)
            yield made
        finally:
            self.api.remove_container(made, force=True, v=True)

    def inspect(self, container_id: str) -> dict[str, Any]:
        """`docker inspect`."""
        found: dict[str, Any] = self.api.inspect_container(container_id)
        return found

    def under_rewarm(self, container_id: str) -> bool:
        """Whether containerd has this node's rewarm-runc on record as a container's runtime binary."""
        assert self._containerd is not None
        said = self._containerd.ctr("containers", "info", container_id, namespace="moby").stdout
        # The shim's options, a protobuf message that ctr prints as its bytes.
        options = base64.b64decode(json.loads(said)["Runtime"]["Options"]["value"])
        return str(self.node.prefix / "bin" / "rewarm-runc").encode() in options

    def stop(self) -> None:
        """Removes containers, ends the daemons, unmounts, removes directories but logs. A second call does nothing."""
        if self._process is not None:
            self._process.terminate()  # it stops its containers
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        if self._containerd is not None:
            for pid in self._containerd.shims():
                kill(pid)
            self._containerd.stop()
            self._containerd = None
        if not self._had_key:
            _KEY.unlink(missing_ok=True)
        for place in (self._run, self.directory):
            unmount_below(place)
        for place in (self._run, self.directory / "data"):
            if place.exists():
                shutil.rmtree(place)
