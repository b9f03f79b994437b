"""A private Podman with rewarm as its runtime: its own storage, state, runc root and cgroups."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from support import cgroups, rootfs
from support.bundle import cgroup_parent, unmount_below
from support.node import Node
from support.proc import CommandFailed, command

IMAGE = "localhost/rewarm.test/base:1"


class Podman:
    """Podman below `node.directory`, without a daemon: every call of `run` is a podman of its own.

    Containers have the network "none". `node` is configured to find them below `runc_root`. `stop` removes all.
    """

    def __init__(self, node: Node) -> None:
        self.node = node
        self.directory = node.directory / "podman"
        self.directory.mkdir(parents=True)
        # Short: conmon's attach socket is below it, and a unix socket's path has 107 bytes at most.
        self._run = Path(tempfile.mkdtemp(prefix=f"rwt-{os.getpid()}-", dir="/run"))
        self.cgroup = f"{cgroup_parent()}/{self._run.name}"
        self.runc_root = self._run / "runc"
        self._graph = self.directory / "graph"
        self._runtime = self._write_runtime()
        self._config = self._write_config()
        node.configure(runtime_roots=[str(self.runc_root)])
        try:
            self._import_image()
        except BaseException:
            self.stop()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def _write_runtime(self) -> Path:
        """What Podman has as its runtime: a script that sets REWARM_CONFIG and runc's root, and becomes rewarm-runc.

        Podman starts conmon, and so `create`, with a short list of variables of its own, and `start` and `delete`
        with almost none: what this process has in its environment does not arrive. A node has its settings in
        /etc/rewarm/config.yaml and needs no such script. The root is given here and not by `--runtime-flag`, which
        the podman that conmon calls when a container has ended is not told.
        """
        script = self.directory / "rewarm-runc"
        launcher = self.node.prefix / "bin" / "rewarm-runc"
        words = f"REWARM_CONFIG='{self.node.config}' exec '{launcher}' --root '{self.runc_root}' \"$@\""
        script.write_text(f"#!/bin/sh\n{words}\n")
        script.chmod(0o755)
        return script

    def _write_config(self) -> Path:
        # Unless told, Podman raises limits to the kernel's, which needs CAP_SYS_RESOURCE. It lowers its own first (to
        # 32768 processes): what a container gets has to be below that and below this process's.
        limits = []
        for name, number in (("nofile", resource.RLIMIT_NOFILE), ("nproc", resource.RLIMIT_NPROC)):
            given = [value for value in resource.getrlimit(number) if value != resource.RLIM_INFINITY]
            limit = min([8192, *given])
            limits.append(f"{name}={limit}:{limit}")
        tables: dict[str, dict[str, object]] = {
            "containers": {"default_ulimits": limits, "log_driver": "k8s-file"},
            "engine": {
                "cgroup_manager": "cgroupfs",
                "events_logger": "file",
                "lock_type": "file",  # in tmp_dir; the default is one segment in /dev/shm for the whole machine
                "runtime": str(self._runtime),
                "runtime_supports_json": [self._runtime.name],  # its errors come by --log-format json, as runc's do
                "static_dir": str(self._graph / "libpod"),  # the only place that Podman takes beside --root
                "tmp_dir": str(self._run / "tmp"),
                "volume_path": str(self._graph / "volumes"),
            },
        }
        config = self.directory / "containers.conf"
        # Strings and lists of strings have one form in TOML and JSON.
        config.write_text(
            "".join(
                f"[{table}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())
                for table, values in tables.items()
            )
        )
        return config

    def run(self, *args: str | Path, check: bool = True, timeout: float = 120.0) -> subprocess.CompletedProcess[str]:
        """One call of podman. Raises CommandFailed if `check` is set."""
        return command(*self._words(*args), check=check, timeout=timeout, env=self._environment())

    def _words(self, *args: str | Path) -> list[str]:
        words = ["podman", "--root", self._graph, "--runroot", self._run / "storage", "--storage-driver", "overlay"]
        # Else a bind mount of the storage on itself comes and goes with the podmans that run.
        words += ["--storage-opt", "overlay.skip_mount_home=true"]
        return [str(word) for word in (*words, *args)]

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "CONTAINERS_CONF": str(self._config), "TMPDIR": str(self._run)}

    def _base(self) -> tuple[Path, str]:
        """The root filesystem to import, and the image's name."""
        return rootfs.base(), IMAGE

    def _import_image(self) -> None:
        """`podman import -` of the base root filesystem, as one layer."""
        directory, image = self._base()
        words = ["tar", "--numeric-owner", "-C", str(directory), "-c", "."]
        with subprocess.Popen(words, stdout=subprocess.PIPE) as tar:
            done = subprocess.run(
                self._words("import", "--quiet", "-", image),
                stdin=tar.stdout,
                capture_output=True,
                text=True,
                env=self._environment(),
                timeout=120,
            )
        if tar.returncode or done.returncode:
            raise CommandFailed(["podman", "import"], tar.returncode or done.returncode, done.stdout + done.stderr)

    def container(
        self,
        args: Sequence[str],
        *,
        name: str,
        env: Mapping[str, str] | None = None,
        annotations: Mapping[str, str] | None = None,
        pod: str = "",
        ipc: str = "",
    ) -> str:
        """`podman run --detach`: the new container's id. Raises CommandFailed with the runtime's words."""
        words = ["run", "--detach", "--name", name]
        words += ["--pod", pod] if pod else ["--network", "none", "--cgroup-parent", self.cgroup]
        words += ["--ipc", ipc] if ipc else []
        for key, value in (env or {}).items():
            words += ["--env", f"{key}={value}"]
        for key, value in (annotations or {}).items():
            words += ["--annotation", f"{key}={value}"]
        return self.run(*words, IMAGE, *args).stdout.strip()

    def pod(self, name: str) -> str:
        """`podman pod create`: the id of a pod whose containers share an IPC namespace."""
        words = ["pod", "create", "--name", name, "--network", "none", "--share", "ipc", "--cgroup-parent", self.cgroup]
        words += ["--infra-image", IMAGE, "--infra-command", "sleep 1000"]
        return self.run(*words).stdout.strip()

    def inspect(self, name: str) -> dict[str, Any]:
        """`podman container inspect` of one container."""
        found: list[dict[str, Any]] = json.loads(self.run("container", "inspect", name).stdout)
        return found[0]

    def logs(self, name: str) -> str:
        """`podman logs`: what it wrote to standard output."""
        return self.run("logs", name).stdout

    def outcome(self, container_id: str) -> dict[str, Any]:
        """rewarm's outcome.json of a container."""
        return self.node.outcome(container_id, self.runc_root)

    def remove_all(self) -> None:
        """`podman rm --force` of every container and pod. Raises CommandFailed."""
        self.run("pod", "rm", "--force", "--all", "--time", "0")
        self.run("rm", "--force", "--all", "--time", "0")

    def stop(self) -> None:
        """Removes containers, ends what is left of them, unmounts, removes directories. A second call does nothing."""
        if self._run.exists():
            self.run("pod", "rm", "--force", "--all", "--time", "0", check=False)
            self.run("rm", "--force", "--all", "--time", "0", check=False)  # what is left ends by cgroup
        cgroups.remove(self.cgroup)
        cgroups.remove_empty(cgroup_parent())
        for place in (self._run, self.directory):
            unmount_below(place)
        for place in (self._run, self._graph):
            if place.exists():
                shutil.rmtree(place)
