"""What a test could leave on the machine: mounts, network namespaces, cgroups, processes. Compared before and after."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from support import cgroups
from support.proc import command_line, descendants, reap_orphans, state_of, wait_for


@dataclass(frozen=True)
class Leftovers:
    """Names of things of the whole machine; processes only below this one, which must be a subreaper to see orphans.

    Left out: the mount of /run/netns itself, which the first `ip netns add` on a machine makes for good; what
    belongs to another test run that is going on, told by the pid in its names and in pytest's lock file; and cgroups
    below one that had processes before the first test, but this process's own: other programs make some as they run.
    """

    mounts: frozenset[str]
    namespaces: frozenset[str]
    cgroups: frozenset[str]
    processes: frozenset[str]

    @staticmethod
    def now() -> Leftovers:
        """Takes the present state; reaps orphans first."""
        reap_orphans()
        mounts = (line.split(" ")[4] for line in Path("/proc/self/mountinfo").read_text().splitlines())
        names = Path("/run/netns")
        alive = (pid for pid in descendants(os.getpid()) if state_of(pid) is not None)
        return Leftovers(
            _own(target for target in mounts if target != "/run/netns"),
            _own(item.name for item in names.iterdir()) if names.is_dir() else frozenset(),
            _own(str(path) for path in cgroups.directories("/") if not _of_others(path)),
            frozenset(f"{pid} {state_of(pid)} {command_line(pid)}".strip() for pid in alive),
        )

    def added(self) -> list[str]:
        """What is there now and was not when this was taken, one line each."""
        now = Leftovers.now()
        pairs = (
            ("mount", now.mounts - self.mounts),
            ("netns", now.namespaces - self.namespaces),
            ("cgroup", now.cgroups - self.cgroups),
            ("process", _later(now.processes, self.processes)),
        )
        return [f"{kind} {item}" for kind, items in pairs for item in sorted(items)]

    def check(self, *, timeout: float = 5.0) -> None:
        """Raises AssertionError with everything added that does not go away within `timeout` seconds."""
        added: list[str] = []

        def probe() -> bool:
            added[:] = self.added()
            return not added

        try:
            wait_for("nothing left behind", probe, timeout=timeout, interval=0.1)
        except Exception as error:
            raise AssertionError("left behind:\n" + "\n".join(added)) from error


def _busy() -> frozenset[Path]:
    """The uppermost cgroups that hold processes of somebody's, on each hierarchy."""
    found = set()
    for hierarchy in cgroups.hierarchies():
        for path, _, names in os.walk(hierarchy):
            parts = Path(path).relative_to(hierarchy).parts
            with contextlib.suppress(OSError):  # removed by its owner meanwhile
                if parts and "cgroup.procs" in names and Path(path, "cgroup.procs").read_text():
                    found.add(hierarchy / parts[0])
    return frozenset(found)


def _below_own() -> frozenset[str]:
    words = (line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines())
    return frozenset(path for _, _, path in words if path != "/")


_BUSY = _busy()
_OWN = _below_own()


def _of_others(path: Path) -> bool:
    if not any(top in path.parents for top in _BUSY):
        return False
    return not any(f"{own}/" in str(path) for own in _OWN)


def _own(names: Iterable[str]) -> frozenset[str]:
    return frozenset(name for name in names if not _of_another_run(name))


def _of_another_run(name: str) -> bool:
    """Whether a path or name belongs to a test run other than this one that is alive, or to another of its workers."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker and "/libpod_parent" in name:
        return True  # Podman's cgroup, in which it may run for any of the workers
    owner = re.search(r"\b(?:rewarm-test|rwt)-(\d+)", name)
    if owner is not None:
        pid = int(owner[1])
        return pid != os.getpid() and state_of(pid) is not None
    base = re.match(r"(.*/pytest-of-[^/]+/pytest-\d+)(?:/popen-(gw\d+))?(/|$)", name)
    if base is None:
        return False
    try:
        pid = int(Path(base[1], ".lock").read_text())
    except (FileNotFoundError, ValueError):  # no lock, or one that is just being written: a run that has ended
        return False
    if pid != (os.getppid() if worker else os.getpid()):
        return state_of(pid) is not None
    return base[2] not in (None, worker)


def _later(now: frozenset[str], before: frozenset[str]) -> set[str]:
    """Processes of `now` whose pid was not in use before: their state letter changes while they live."""
    pids = {entry.split(" ", 1)[0] for entry in before}
    return {entry for entry in now if entry.split(" ", 1)[0] not in pids}
