"""Drives an OCI runtime binary as a containerd shim does: pipes for stdio, JSON log, subreaper, exit codes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from support import cgroups
from support.bundle import Bundle, cgroup_parent, unmount_below
from support.proc import (
    CommandFailed,
    Drain,
    Timeout,
    become_subreaper,
    kill,
    reap,
    reap_orphans,
    state_of,
    wait_exit,
)


@dataclass
class Container:
    """One container that a runtime was asked to create or restore; `pid` is None when that failed."""

    id: str
    bundle: Bundle
    stdout: Drain = field(default_factory=Drain)
    stderr: Drain = field(default_factory=Drain)
    pid: int | None = None
    status: int = 0  # exit status of the call that made it
    exit_code: int | None = None  # of its init, once `Runtime.wait_stopped` has returned


class Runtime:
    """An OCI runtime (`binary`) with a state root of its own below `directory`.

    Makes the calling process a subreaper: a container's init becomes its child, and `wait_stopped` reaps it.
    `env` is added to the caller's environment in every call. `cleanup` removes what was made through this object.
    """

    def __init__(
        self,
        directory: Path,
        binary: str | Path = "runc",
        *,
        root: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        become_subreaper()
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.binary = str(binary)
        self.root = root or directory / "root"
        self.env = {**os.environ, **(env or {})}
        self.log = directory / "log.json"
        self.containers: dict[str, Container] = {}
        self._bundles: list[Bundle] = []

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.cleanup()

    def bundle(self, name: str, layers: Sequence[Path], args: Sequence[str], **options: Any) -> Bundle:
        """A `Bundle` below `directory` with these arguments, removed by `cleanup` even if it is never used."""
        made = Bundle(self.directory / "bundles" / name, layers, args, **options)
        self._bundles.append(made)
        return made

    def argv(self, *args: str | Path) -> list[str]:
        """The full command line as the shim builds it: --root, --log and --log-format before the subcommand."""
        words = (self.binary, "--root", self.root, "--log", self.log, "--log-format", "json", *args)
        return [str(word) for word in words]

    def run(
        self,
        *args: str | Path,
        timeout: float = 60.0,
        check: bool = True,
        env: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
    ) -> subprocess.CompletedProcess[str]:
        """A call whose output ends with it: state, kill, delete, exec without --detach, checkpoint, features.

        Raises CommandFailed with the log's errors for a status other than 0 if `check` is set; TimeoutExpired.
        """
        seen = len(self.log_lines())
        argv = self.argv(*args)
        done = subprocess.run(
            argv,
            text=True,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=timeout,
            env={**self.env, **(env or {})},
            pass_fds=pass_fds,
        )
        if check and done.returncode != 0:
            said = [done.stdout, done.stderr, *(str(line) for line in self.log_lines()[seen:])]
            raise CommandFailed(argv, done.returncode, "\n".join(part for part in said if part))
        return done

    def log_lines(self) -> list[dict[str, Any]]:
        """Everything written to --log so far; a line that is not JSON comes as {"level": "text", "msg": line}."""
        if not self.log.exists():
            return []
        lines: list[dict[str, Any]] = []
        for line in self.log.read_text(errors="replace").splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                lines.append({"level": "text", "msg": line})
        return lines

    def last_error(self) -> str:
        """`msg` of the last line of level "error": what the shim, and so `kubectl describe pod`, shows; "" if none."""
        return next((line["msg"] for line in reversed(self.log_lines()) if line.get("level") == "error"), "")

    def create(
        self,
        container_id: str,
        bundle: Bundle,
        *options: str | Path,
        timeout: float = 120.0,
        check: bool = True,
        env: Mapping[str, str] | None = None,
    ) -> Container:
        """`create` with stdout and stderr on pipes drained into memory and stdin /dev/null, as the shim does.

        Raises CommandFailed if `check` is set; else look at `Container.status`. TimeoutExpired: the caller was killed.
        """
        return self._make("create", container_id, bundle, options, timeout, check, env)

    def restore(
        self,
        container_id: str,
        bundle: Bundle,
        image_path: Path,
        *options: str | Path,
        timeout: float = 120.0,
        check: bool = True,
        env: Mapping[str, str] | None = None,
    ) -> Container:
        """`restore --detach --no-subreaper` by hand from CRIU images, with the stdio of `create`."""
        flags = ("--detach", "--no-subreaper", "--image-path", image_path, *options)
        return self._make("restore", container_id, bundle, flags, timeout, check, env)

    def spawn(
        self,
        verb: str,
        container_id: str,
        bundle: Bundle,
        *options: str | Path,
        env: Mapping[str, str] | None = None,
    ) -> tuple[subprocess.Popen[bytes], Container]:
        """Starts create or restore and returns at once; the caller waits (or kills), then calls `settle`."""
        container = self.containers[container_id] = Container(container_id, bundle)
        if bundle not in self._bundles:
            self._bundles.append(bundle)
        pid_file = self._pid_file(container_id)
        pid_file.unlink(missing_ok=True)
        argv = self.argv(verb, "--bundle", bundle.directory, "--pid-file", pid_file, *options, container_id)
        try:
            process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=container.stdout.write_end,
                stderr=container.stderr.write_end,
                env={**self.env, **(env or {})},
            )
        finally:
            container.stdout.started()
            container.stderr.started()
        return process, container

    def settle(self, container: Container) -> None:
        """Reads the pid file of a create or restore that has ended."""
        pid_file = self._pid_file(container.id)
        if pid_file.exists():
            container.pid = int(pid_file.read_text())

    def _pid_file(self, container_id: str) -> Path:
        return self.directory / f"{container_id[:100].replace('/', '_')}.pid"

    def _make(
        self,
        verb: str,
        container_id: str,
        bundle: Bundle,
        options: Sequence[str | Path],
        timeout: float,
        check: bool,
        env: Mapping[str, str] | None,
    ) -> Container:
        seen = len(self.log_lines())
        known = self.containers.get(container_id)
        process, container = self.spawn(verb, container_id, bundle, *options, env=env)
        try:
            container.status = wait_exit(process, timeout)
        except BaseException:
            process.kill()
            process.wait()
            raise
        if container.status == 0:
            self.settle(container)
        elif known is not None and known.exit_code is None:
            self.containers[container_id] = known  # the id was taken: its container goes on
        if check and container.status != 0:
            said = [container.stderr.text(), *(str(line) for line in self.log_lines()[seen:])]
            raise CommandFailed(
                self.argv(verb, container_id), container.status, "\n".join(part for part in said if part)
            )
        return container

    def start(self, container_id: str, *, timeout: float = 60.0) -> None:
        """`start`. Raises CommandFailed."""
        self.run("start", container_id, timeout=timeout)

    def state(self, container_id: str) -> dict[str, Any]:
        """`state`, parsed. Raises CommandFailed."""
        answer: dict[str, Any] = json.loads(self.run("state", container_id).stdout)
        return answer

    def exists(self, container_id: str) -> bool:
        """Whether `state` knows the container."""
        return self.run("state", container_id, check=False).returncode == 0

    def kill(self, container_id: str, signal_name: str = "KILL") -> None:
        """`kill`. Raises CommandFailed."""
        self.run("kill", container_id, signal_name)

    def delete(self, container_id: str, *, force: bool = False) -> None:
        """`delete`. Raises CommandFailed."""
        self.run("delete", *(["--force"] if force else []), container_id)

    def exec(self, container_id: str, *args: str, timeout: float = 60.0) -> str:
        """`exec` in the foreground; returns its standard output. Raises CommandFailed."""
        return self.run("exec", container_id, *args, timeout=timeout).stdout

    def wait_stopped(self, container_id: str, *, timeout: float = 30.0) -> int:
        """Waits for the end of the container's init, reaps it, and returns its exit code (128 + N for signal N).

        Raises Timeout, and ChildProcessError when init is not a child of this process: a runtime that leaves init
        under another parent is broken, since a shim could not learn the exit code either.
        """
        container = self.containers[container_id]
        if container.exit_code is None:
            if container.pid is None:
                raise Timeout(f"container {container_id} was never created")
            container.exit_code = reap(container.pid, timeout=timeout)
        return container.exit_code

    def stop(self, container_id: str) -> int:
        """Kills, reaps and deletes a container; returns the exit code of its init."""
        if state_of(self.state(container_id)["pid"]) not in (None, "Z"):
            self.kill(container_id)
        code = self.wait_stopped(container_id)
        self.delete(container_id)
        return code

    def cleanup(self) -> None:
        """Removes everything made through this object, whatever state it is in; nothing else.

        Containers by id through the runtime itself; then, should that fail, their processes by cgroup; state root,
        cgroups, bundles with their mounts. A failure of the runtime's own delete is raised at the end.
        """
        failures = []
        for container in self.containers.values():
            done = self.run("delete", "--force", container.id, check=False)
            # A create that was refused, for a bad id perhaps, has nothing that could be deleted.
            there = (self.root / container.id).exists() or cgroups.processes(container.bundle.cgroup)
            if done.returncode != 0 and there:
                failures.append(f"delete {container.id}: {done.stderr.strip()} {self.last_error()}")
        for container in self.containers.values():
            if container.pid is not None and container.exit_code is None:
                kill(container.pid)
                with contextlib.suppress(ChildProcessError):  # reaped by someone else, or never our child
                    container.exit_code = reap(container.pid, timeout=10)
            cgroups.remove(container.bundle.cgroup)
        for bundle in self._bundles:
            bundle.close()
        cgroups.remove_empty(cgroup_parent())
        unmount_below(self.root)
        if self.root.exists():
            shutil.rmtree(self.root)
        self.containers.clear()
        self._bundles.clear()
        reap_orphans()
        if failures:
            raise CommandFailed([self.binary, "delete"], 1, "\n".join(failures))


SIGKILLED = 128 + signal.SIGKILL  # exit code of a container that was killed
