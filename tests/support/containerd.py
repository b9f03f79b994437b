"""A private containerd: its own root, state, socket, shims and network namespace, driven by ctr as a node would be."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from support import cgroups
from support.bundle import cgroup_parent, unmount_below
from support.netns import NetworkNamespace
from support.proc import CommandFailed, command, command_line, kill, reap_orphans, wait_for


@dataclass
class Task:
    """A container that was run: its log files grow while it does."""

    id: str
    namespace: str
    stdout: Path
    cgroup: str


class Containerd:
    """A containerd daemon below `directory`, in network namespace `network` (one of its own when None).

    `env` is added to the daemon's environment, which its shims and their runtime inherit. Two of them share nothing
    but the content of paths that are given to both: they stand for two nodes. `extra_config` is appended to
    config.toml (version 2, CRI disabled unless `cri`), `cri_config` to CRI's table; `cri_runtimes` are CRI's runtimes
    by name: the runc-compatible binary, or None for runc; `cri_annotations` are passed on to them, of
    pods and containers, beside the usual ones; with `systemd_cgroup` systemd makes their cgroups. Started by the
    constructor; `stop` removes everything.

    `older`: seconds for which its node has been up longer than this machine, in a time namespace.

    The daemon runs in the machine's own mount namespace (nsenter, not `ip netns exec`), so that its root filesystem
    mounts can be seen from outside as on a real node.
    """

    def __init__(
        self,
        directory: Path,
        *,
        network: NetworkNamespace | None = None,
        env: Mapping[str, str] | None = None,
        cri: bool = False,
        cri_config: Sequence[str] = (),
        cri_runtimes: Mapping[str, Path | None] | None = None,
        cri_annotations: Sequence[str] = (),
        systemd_cgroup: bool = False,
        older: int = 0,
        extra_config: str = "",
        binary: str | Path = "containerd",
        namespace: str = "default",
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.namespace = namespace
        # Short: a unix socket's path has 107 bytes at most, and test directories have long names.
        self._run = Path(tempfile.mkdtemp(prefix=f"rwt-{os.getpid()}-", dir="/run"))
        self.cgroup = f"{cgroup_parent()}/{self._run.name}"
        self.socket = self._run / "c.sock"
        self.log = directory / "containerd.log"
        self.runc_root = self._run / "runc"
        self._tasks: list[Task] = []
        self._own_network = network is None
        self._systemd_cgroup = systemd_cgroup
        self._annotations = cri_annotations
        self._process: subprocess.Popen[bytes] | None = None
        self.network = network or NetworkNamespace()
        try:
            config = directory / "config.toml"
            config.write_text(self._config(cri, cri_config, cri_runtimes or {}) + extra_config)
            clocks = ["unshare", "--time", "--monotonic", older, "--boottime", older, "--fork", "--kill-child", "--"]
            before = map(str, clocks) if older else ()
            self._argv = self.network.argv(*before, binary, "--config", config)
            self._env = {**os.environ, **(env or {}), "TMPDIR": str(self._run)}
            self._start()
        except BaseException as error:
            error.add_note(self._log_tail())
            self.stop()
            raise

    def _start(self) -> None:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._env, start_new_session=True
            )
        wait_for("containerd's answer", self._answers, timeout=30)

    def restart(self) -> None:
        """SIGKILL for the daemon, and a new one: shims and containers live on. Raises CommandFailed, Timeout."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        self.socket.unlink(missing_ok=True)
        self._start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is not None:
            error.add_note(self._log_tail())
        self.stop()

    def _config(self, cri: bool, cri_config: Sequence[str], runtimes: Mapping[str, Path | None]) -> str:
        disabled = ["io.containerd.internal.v1.opt", "io.containerd.snapshotter.v1.btrfs"]
        disabled += [f"io.containerd.snapshotter.v1.{name}" for name in ("aufs", "devmapper", "zfs")]
        if not cri:
            disabled.append("io.containerd.grpc.v1.cri")
        lines = [
            "version = 2",
            f'root = "{self.directory}/root"',
            f'state = "{self._run}/state"',
            f'temp = "{self._run}"',
            f"disabled_plugins = {json.dumps(disabled)}",
            "[grpc]",
            f'address = "{self.socket}"',
            "[debug]",
            'level = "info"',
        ]
        if cri:
            # Without CAP_SYS_RESOURCE an OOM score cannot be lowered; AppArmor needs a kernel that has it.
            lines += [
                '[plugins."io.containerd.grpc.v1.cri"]',
                "disable_apparmor = true",
                "restrict_oom_score_adj = true",
                *cri_config,
            ]
        for name, runtime in runtimes.items():
            table = f'plugins."io.containerd.grpc.v1.cri".containerd.runtimes.{name}'
            lines += [f"[{table}]", 'runtime_type = "io.containerd.runc.v2"']
            more = list(self._annotations)
            lines += [f"pod_annotations = {json.dumps(['rewarm.dev/*', *more])}"]
            lines += [f"container_annotations = {json.dumps(more)}"]
            lines += [f"[{table}.options]", f'Root = "{self.runc_root}"']
            lines += ["SystemdCgroup = true"] if self._systemd_cgroup else []
            lines += [f'BinaryName = "{runtime}"'] if runtime is not None else []
        return "\n".join(lines) + "\n"

    def _answers(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            raise CommandFailed(["containerd"], self._process.returncode, self._log_tail())
        return self.socket.exists() and self.ctr("version", check=False).returncode == 0

    def _log_tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-20:]) if self.log.exists() else ""

    def ctr(
        self, *args: str | Path, timeout: float = 120.0, check: bool = True, namespace: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """One call of ctr against this daemon. Raises CommandFailed if `check` is set."""
        return command(
            *("ctr", "--address", self.socket, "--namespace", namespace or self.namespace, *args),
            timeout=timeout,
            check=check,
        )

    def import_image(self, archive: Path, *, namespace: str | None = None) -> None:
        """Imports and unpacks an archive of `image.pack`, and writes it back: else what is timed next pays for that.

        Raises CommandFailed.
        """
        self.ctr("images", "import", archive, namespace=namespace, timeout=600)
        os.sync()

    def run(
        self,
        reference: str,
        container_id: str,
        args: Sequence[str] = (),
        *,
        runtime: Path | None = None,
        annotations: Mapping[str, str] | None = None,
        env: Mapping[str, str] | None = None,
        network: Path | None = None,
        mounts: Sequence[str] = (),
        flags: Sequence[str] = (),
        namespace: str | None = None,
        timeout: float = 180.0,
    ) -> Task:
        """`ctr run --detach` of an imported image: create and start. Raises CommandFailed with the runtime's words.

        `runtime` is the runc-compatible binary (runc when None); its state root is `runc_root`/NAMESPACE. `network`
        is a namespace's path, the daemon's own when None. `mounts` have ctr's form,
        "type=bind,src=A,dst=B,options=rbind". stdout and stderr go to `Task.stdout`, through the shim's pipes.
        """
        where = namespace or self.namespace
        task = Task(
            container_id, where, self.directory / f"{where}-{container_id}.log", f"{self.cgroup}/{container_id}"
        )
        options: list[str | Path] = ["--detach", "--log-uri", f"file://{task.stdout}", "--cgroup", task.cgroup]
        options += ["--runc-root", self.runc_root, "--fifo-dir", self._run / "fifo"]
        options += ["--with-ns", f"network:{network or self.network.path}"]
        if runtime is not None:
            options += ["--runc-binary", runtime]
        for key, value in (annotations or {}).items():
            options += ["--annotation", f"{key}={value}"]
        for key, value in (env or {}).items():
            options += ["--env", f"{key}={value}"]
        for mount in mounts:
            options += ["--mount", mount]
        self._tasks.append(task)
        self.ctr("run", *options, *flags, reference, container_id, *args, timeout=timeout, namespace=where)
        return task

    def status(self, task: Task) -> str:
        """ "RUNNING", "STOPPED", "CREATED" and so on, or "" when there is no such task."""
        for line in self.ctr("tasks", "list", namespace=task.namespace).stdout.splitlines()[1:]:
            words = line.split()
            if words[0] == task.id:
                return words[2]
        return ""

    def pid(self, task: Task) -> int:
        """The pid of the task's init, as the daemon knows it. Raises KeyError when there is no such task."""
        for line in self.ctr("tasks", "list", namespace=task.namespace).stdout.splitlines()[1:]:
            words = line.split()
            if words[0] == task.id:
                return int(words[1])
        raise KeyError(task.id)

    def info(self, task: Task) -> dict[str, Any]:
        """`ctr containers info`, which holds the OCI specification as "Spec"."""
        answer: dict[str, Any] = json.loads(self.ctr("containers", "info", task.id, namespace=task.namespace).stdout)
        return answer

    def exec(self, task: Task, *args: str, timeout: float = 60.0) -> str:
        """Runs a command in the container; its standard output. Raises CommandFailed."""
        options = ("--exec-id", f"x{secrets.token_hex(4)}", "--fifo-dir", self._run / "fifo")
        return self.ctr("tasks", "exec", *options, task.id, *args, timeout=timeout, namespace=task.namespace).stdout

    def kill(self, task: Task, signal_name: str = "SIGKILL") -> None:
        """Sends a signal to the task's init. Raises CommandFailed."""
        self.ctr("tasks", "kill", "--signal", signal_name, task.id, namespace=task.namespace)

    def wait_stopped(self, task: Task, *, timeout: float = 30.0) -> None:
        """Waits until the daemon has seen the end of the task. Raises Timeout."""
        wait_for(f"end of task {task.id}", lambda: self.status(task) in ("STOPPED", ""), timeout=timeout)

    def delete(self, task: Task) -> int:
        """Deletes a stopped task and its container; the task's exit code. Raises CommandFailed.

        ctr says the code in a warning, and only when it is not 0.
        """
        done = self.ctr("tasks", "delete", task.id, namespace=task.namespace)
        self.ctr("containers", "delete", task.id, namespace=task.namespace)
        self._tasks.remove(task)
        said = re.search(r"non-zero exit code (\d+)", done.stderr)
        return int(said[1]) if said else 0

    def remove(self, task: Task) -> int:
        """Kills, waits and deletes; the exit code."""
        if self.status(task) == "RUNNING":
            self.kill(task)
            self.wait_stopped(task)
        return self.delete(task)

    def shims(self) -> list[int]:
        """Pids of this daemon's shims: they are its alone, since each has its socket's path in its arguments."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                words = command_line(int(entry.name))
                if "containerd-shim" in words and str(self.socket) in words:
                    found.append(int(entry.name))
        return found

    def stop(self) -> None:
        """Removes tasks and containers, ends daemon and shims, unmounts, removes cgroups and directories.

        A second call does nothing.
        """
        if self._process is not None:
            for task in list(self._tasks):
                with contextlib.suppress(CommandFailed, subprocess.TimeoutExpired):  # what is left ends by cgroup below
                    self.remove(task)
            for task in self._tasks:
                self.ctr("tasks", "delete", "--force", task.id, check=False, namespace=task.namespace)
                self.ctr("containers", "delete", task.id, check=False, namespace=task.namespace)
            self._process.terminate()
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        cgroups.remove(self.cgroup)
        cgroups.remove_empty(cgroup_parent())

        def without_shims() -> bool:
            left = self.shims()
            for pid in left:
                kill(pid)
            reap_orphans()
            return not left

        wait_for("end of the shims", without_shims, timeout=10)
        for place in (self._run, self.directory):
            unmount_below(place)
        for place in (self._run, self.directory / "root"):  # log, configuration and the tasks' output stay
            if place.exists():
                shutil.rmtree(place)
        self._tasks.clear()
        if self._own_network:
            self.network.close()
