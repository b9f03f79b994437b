"""The DaemonSet's image, built by Podman, and its container, run with what the manifest gives the pod."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from support import rootfs
from support.bare_node import BareNode
from support.podman import Podman
from support.proc import Timeout, command, wait_for

REPOSITORY = Path(__file__).parents[2]
BASE = "localhost/rewarm.test/slim:1"
IMAGE = "localhost/rewarm.test/node:1"


@dataclass
class RunningPod:
    """A container of the image."""

    image: NodeImage
    name: str
    process: subprocess.Popen[bytes]
    _log: Path
    _probe: list[str]

    def log(self) -> str:
        return self._log.read_text()

    def ready(self) -> bool:
        """What the kubelet's readiness probe says."""
        return self.image.run("exec", self.name, *self._probe, check=False).returncode == 0

    def wait_for(self, text: str, *, timeout: float = 60.0, times: int = 1) -> None:
        """Until the log has it. Raises AssertionError with the log."""
        self.wait_until(lambda: self.log().count(text) >= times, f"{text!r} in the log", timeout=timeout)

    def wait_until(self, probe: Callable[[], bool], what: str, *, timeout: float = 60.0) -> None:
        """Raises AssertionError with the log."""
        try:
            wait_for(what, lambda: probe() or self.process.poll() is not None, timeout=timeout, interval=0.1)
        except Timeout as error:
            raise AssertionError(f"{error}\n{self.log()}") from None
        assert probe(), f"{what}: it ended with status {self.process.poll()}\n{self.log()}"

    def stop(self) -> int:
        """SIGTERM, as the kubelet does; its exit status. Podman passes the signal on."""
        self.process.terminate()
        return self.process.wait(30)

    def kill(self, machine: BareNode) -> None:
        """SIGKILL for the pod and for whatever it runs on the node, as when its memory is out."""
        machine.kill_strangers()
        self.image.run("kill", "--signal=KILL", self.name)
        self.process.wait(30)
        machine.kill_strangers()

    def __enter__(self) -> RunningPod:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.process.poll() is None:
            self.stop()


class NodeImage(Podman):
    """A Podman that has runc as its runtime, and builds the image from Debian packed here."""

    def _write_runtime(self) -> Path:
        found = shutil.which("runc")
        assert found, "runc is not installed"
        return Path(found)

    def _base(self) -> tuple[Path, str]:
        return rootfs.layer("slim"), BASE

    def build(self) -> str:
        """Builds it from this checkout; what podman said. Raises CommandFailed.

        What this machine needs to reach its mirrors (apt's and pip's configuration, certificates) goes with it.
        """
        wanted = ("Acquire::http", "Acquire::https", "Acquire::Check-Valid-Until")
        lines = [line for line in command("apt-config", "dump").stdout.splitlines() if line.startswith(wanted)]
        apt = self.directory / "apt.conf"
        apt.write_text("\n".join(lines) + "\n")
        volumes = [(apt, "/etc/apt/apt.conf.d/99test")]
        volumes += [(path, str(path)) for path in map(Path, ("/etc/pip.conf", "/etc/ssl/certs")) if path.exists()]
        words: list[str | Path] = ["build", "--layers=false", "--isolation", "chroot", "--network", "host"]
        for source, target in volumes:
            words += ["--volume", f"{source}:{target}:ro"]
        words += ["--build-arg", f"BASE={BASE}", "-f", REPOSITORY / "install/Containerfile", "-t", IMAGE, REPOSITORY]
        return self.run(*words, timeout=280).stdout

    def first_container(self) -> None:
        """Makes the cgroups that all containers of this Podman are in."""
        self.run("run", "--rm", "--cgroup-parent", self.cgroup, "--network", "none", "--entrypoint", "true", IMAGE)

    def start(
        self, pod: dict[str, Any], *more: str, env: dict[str, str], volumes: dict[str, Path], name: str
    ) -> RunningPod:
        """The pod's one container, as a kubelet would start it: security context, arguments, and `more` arguments.

        `volumes` are directories by mount point, beside those of the pod that are an emptyDir.
        """
        (container,) = pod["containers"]
        given = container["securityContext"]
        words = ["run", "--rm", "--name", name, "--cgroup-parent", self.cgroup, "--network", "host"]
        words += ["--pid=host"] if pod["hostPID"] else []
        words += ["--read-only", "--read-only-tmpfs=false"] if given["readOnlyRootFilesystem"] else []
        words += [] if given.get("allowPrivilegeEscalation", True) else ["--security-opt=no-new-privileges"]
        if given["privileged"]:  # Podman takes no list of capabilities beside it
            words += ["--privileged"]
        else:
            words += [f"--cap-drop={each}" for each in given["capabilities"]["drop"]]
            words += [f"--cap-add={each}" for each in given["capabilities"]["add"]]
        words += [f"--security-opt=seccomp={given['seccompProfile']['type'].lower()}"]
        words += [f"--user={given['runAsUser']}:{given['runAsGroup']}"]
        empty = {each["name"] for each in pod["volumes"] if "emptyDir" in each}
        for mount in container["volumeMounts"]:
            if mount["name"] in empty:
                words += ["--tmpfs", f"{mount['mountPath']}:rw,size=1m"]
        for target, source in volumes.items():
            words += ["--volume", f"{source}:{target}:ro"]
        for key, value in env.items():
            words += ["--env", f"{key}={value}"]
        log = self.directory / f"{name}.log"
        with log.open("w") as out:
            process = subprocess.Popen(
                self._words(*words, IMAGE, *container["args"], *more),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=self._environment(),
            )
        return RunningPod(self, name, process, log, container["readinessProbe"]["exec"]["command"])
