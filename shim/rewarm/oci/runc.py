"""The low-level runtime: where it is, how rewarm calls it, and what it keeps about a container."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from rewarm.errors import OciError
from rewarm.settings import Settings

if TYPE_CHECKING:
    import subprocess

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def find(settings: Settings) -> str:
    """The first of the settings' `runtimes` that PATH holds and that is not rewarm itself."""
    path = os.environ.get("PATH") or DEFAULT_PATH
    launcher = os.environ.get("REWARM_LAUNCHER", "")
    for name in settings.runtimes:
        found = _which(name, path)
        if found and not (launcher and os.path.exists(launcher) and os.path.samefile(found, launcher)):
            return found
    raise OciError(
        "find the low-level runtime",
        ", ".join(settings.runtimes),
        f"none of them is in PATH ({path})",
        "install runc or set `runtimes` in the settings",
    )


def _which(name: str, path: str) -> str:
    """As the launcher looks: relative entries of PATH are passed over, for the working directory is often a bundle."""
    if "/" in name:
        return name if os.access(name, os.X_OK) else ""
    for directory in path.split(":"):
        found = os.path.join(directory, name)
        if directory.startswith("/") and os.path.isfile(found) and os.access(found, os.X_OK):
            return found
    return ""


class Container(NamedTuple):
    """A container as runc's own state file describes it (`<root>/<id>/state.json`, the same from 1.1 to 1.5).

    `pid` is the init process on the host, `start_time` its start in clock ticks since boot (field 22 of
    /proc/PID/stat), which tells it from a later process with the same number.
    """

    root: str
    id: str
    pid: int
    start_time: int
    bundle: str
    rootfs: str
    labels: dict[str, str]
    cgroup_paths: tuple[str, ...]
    created: str

    @property
    def directory(self) -> str:
        return os.path.join(self.root, self.id)

    @property
    def exec_fifo(self) -> str:
        """runc calls a container `created`, not `running`, for as long as this file is there."""
        return os.path.join(self.directory, "exec.fifo")


def exists(root: str, container_id: str) -> bool:
    return os.path.lexists(os.path.join(root, container_id))


def load(root: str, container_id: str) -> Container:
    """Read runc's state of one container; OciError when there is none or it cannot be understood."""
    path = os.path.join(root, container_id, "state.json")
    try:
        with open(path, "rb") as file:
            state: dict[str, Any] = json.load(file)
        config = state["config"]
        labels = dict(label.split("=", 1) for label in config.get("labels") or [] if "=" in label)
        return Container(
            root=root,
            id=str(state["id"]),
            pid=int(state["init_process_pid"]),
            start_time=int(state["init_process_start"]),
            bundle=labels.get("bundle", ""),
            rootfs=str(config["rootfs"]),
            labels=labels,
            cgroup_paths=tuple(sorted(set((state.get("cgroup_paths") or {}).values()))),
            created=str(state.get("created", "")),
        )
    except FileNotFoundError as error:
        raise OciError("look up container", container_id, f"runc has no such container under {root}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise OciError("look up container", container_id, f"{path} cannot be understood ({error!r})") from error


class Runc(NamedTuple):
    """Calls of the low-level runtime on behalf of one root."""

    binary: str
    root: str
    systemd_cgroup: bool = False

    def words(self, *command: str, log: str = "") -> list[str]:
        words = [self.binary, "--root", self.root]
        if self.systemd_cgroup:
            words.append("--systemd-cgroup")
        if log:
            words += ["--log", log, "--log-format", "json"]
        return [*words, *command]

    def run(self, *command: str, timeout: float, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """Run one command to its end with its output captured; the caller judges the exit status."""
        import subprocess  # 8 ms that a restore does without

        words = self.words(*command)
        try:
            return subprocess.run(
                words,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout,
                env=env,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise OciError(f"runc {command[0]}", command[-1], f"it did not end within {timeout:.0f} s") from error

    def status(self, container_id: str, timeout: float = 20) -> str:
        """`created`, `running`, `paused` or `stopped`, as `runc state` says it; "" when there is no container."""
        done = self.run("state", container_id, timeout=timeout)
        if done.returncode != 0:
            return ""
        try:
            return str(json.loads(done.stdout).get("status", ""))
        except (ValueError, AttributeError) as error:
            raise OciError("runc state", container_id, f"its output is not JSON ({error})") from error

    def remove(self, container_id: str, timeout: float = 30) -> None:
        """Kill and delete a container; nothing happens when runc does not know it."""
        if not exists(self.root, container_id):
            return
        done = self.run("delete", "--force", container_id, timeout=timeout)
        if done.returncode != 0 and exists(self.root, container_id):
            raise OciError("delete container", container_id, message(done))


def message(done: subprocess.CompletedProcess[str]) -> str:
    """What a failed call said, in one line."""
    text = " ".join((done.stderr or done.stdout or "").split())
    return text[-600:] or f"exit status {done.returncode}"


def replace_process(binary: str, words: Sequence[str]) -> None:
    """Become the low-level runtime with the caller's own words, as if rewarm were not there."""
    # Python ignores these, and an ignored signal is inherited through exec, up to the container's own process.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    os.execv(binary, [binary, *words])
