"""The cgroup that a container will have, worked out before runc makes it.

runc writes its own record of a restored container (state.json) at the end of the restore, so before that nothing
but the spec says in which cgroup CRIU and the processes that it makes are. runc puts CRIU itself there first.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from rewarm import processes
from rewarm.errors import OciError

_TIMEOUT = 10.0
_UNLIMITED = 1 << 62  # v1 says so by the largest number that it can
_CONTAINER = re.compile(r"(?:.*[-:])?([0-9a-f]{64})(?:\.scope)?")


def expected(spec: dict[str, Any], container_id: str, systemd: bool) -> list[str]:
    """The directories of the container's cgroup on every mounted hierarchy, whether or not they are there.

    As runc 1.1 to 1.5 does it: an absolute path is taken from the hierarchy's mount, a relative one from the
    caller's own cgroup (its parent, on the v2 hierarchy), `slice:prefix:name` for systemd.
    """
    found = [mount + place for mount, _, place in _places(spec, container_id, systemd)]
    # A hierarchy's root holds the whole machine: it is never a container's own.
    return [directory for directory in found if not os.path.ismount(directory)]


def unified(spec: dict[str, Any], container_id: str, systemd: bool) -> str:
    """The container's cgroup where the v2 hierarchy is the only one, as a path below its root; else ""."""
    found = list(_places(spec, container_id, systemd))
    return found[0][2] if [version for _, version, _ in found] == [2] and found[0][2] != "/" else ""


def _places(spec: dict[str, Any], container_id: str, systemd: bool) -> Iterator[tuple[str, int, str]]:
    """Mount point and version of every hierarchy, and the container's path on it."""
    wanted = str((spec.get("linux") or {}).get("cgroupsPath") or "")
    path = _of_systemd(wanted, container_id) if systemd else wanted or container_id
    for mount, version, controllers in _hierarchies():
        if path.startswith("/"):
            base = "/"
        else:
            own = _own(version, controllers)
            base = os.path.dirname(own) if version == 2 else own
        # The path is normalised as an absolute one, so `..` cannot lead above the hierarchy.
        yield mount, version, os.path.normpath(os.path.join("/", base, path))


def container(path: str) -> str:
    """The id of the container whose cgroup this is or is in, "" for none.

    By what containerd, CRI-O, Podman and Docker call it: `ID`, `PREFIX-ID`, `PREFIX-ID.scope`. A container may have
    made cgroups of its own below, and be below others that are called so: with the cgroupfs driver Podman has the
    containers of a pod in one with the pod's id.
    """
    found = [match[1] for name in path.split("/") if (match := _CONTAINER.fullmatch(name))]
    return found[-1] if found else ""


def containers(pid: int) -> set[str]:
    """The ids of the containers in whose cgroups a process is, on any hierarchy. Raises OSError when it is gone."""
    with open(f"/proc/{pid}/cgroup", encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        return {container(line.rstrip("\n").split(":", 2)[2]) for line in file} - {""}


def take(directories: Iterable[str], pids: Collection[int]) -> None:
    """See to it that processes are in these cgroups or below, which is where the container's limits are.

    CRIU puts a tree where its images say. On the v2 hierarchy that was seen to be the source's cgroup, so
    there the processes are moved; on v1, where runc has CRIU begin at the container's, one that is elsewhere
    was put there by images that say so, and is refused. Raises OciError.
    """
    for directory in directories:
        if not os.path.isdir(directory):
            continue  # a hierarchy that runc makes no cgroup on
        outside = set(pids) - processes.in_cgroups((directory,))
        if outside and os.path.exists(os.path.join(directory, "cgroup.controllers")):
            for pid in outside:
                try:
                    with open(os.path.join(directory, "cgroup.procs"), "w", encoding="ascii") as file:
                        file.write(str(pid))
                except OSError as error:
                    raise OciError("move process", str(pid), f"into {directory}: {error.strerror}") from error
            outside = set(pids) - processes.in_cgroups((directory,))
        if outside:
            raise OciError("check cgroup of process", str(min(outside)), f"it is not in {directory}")


def kill(directories: Iterable[str], timeout: float = _TIMEOUT) -> None:
    """SIGKILL every process in these cgroups and below, until none is left. OciError after `timeout` seconds."""
    directories = tuple(directories)
    end = time.monotonic() + timeout
    while True:
        left = [pid for pid in processes.in_cgroups(directories) if processes.start_time(pid) is not None]
        if not left:
            return
        if time.monotonic() > end:
            raise OciError("kill processes", str(left[0]), "it does not die", "look for state D in `ps`")
        for pid in left:
            processes.send(pid, signal.SIGKILL)
        time.sleep(0.005)


def remove(directories: Iterable[str], timeout: float = _TIMEOUT) -> None:
    """Remove these cgroups and those below, empty of processes. OciError if one stays for `timeout` seconds."""
    end = time.monotonic() + timeout
    while True:
        failed: OSError | None = None
        for directory in directories:
            for path in _bottom_up(directory):
                try:
                    os.rmdir(path)
                except FileNotFoundError:
                    continue  # its owner was faster
                except OSError as error:
                    failed = error  # a dying process holds it for a moment after it left cgroup.procs
        if failed is None:
            return
        if time.monotonic() > end:
            raise OciError("remove cgroup", str(failed.filename), failed.strerror or str(failed))
        time.sleep(0.01)


def own() -> list[str]:
    """The directories of this process's own cgroup, where memory may be accounted."""
    return [
        mount + _own(version, names) for mount, version, names in _hierarchies() if version == 2 or "memory" in names
    ]


def memory_rooms(directories: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Bytes that may still be charged to each of these cgroups, and those above, that has a limit, before the OOM
    killer comes (memory.max; v1: memory.limit_in_bytes), and which it is. Page cache counts as free.
    """
    for directory in directories:
        while directory not in ("/", ""):
            found = _memory_room(directory)
            if found is not None:
                yield max(0, found), directory
            if os.path.ismount(directory):
                break
            directory = os.path.dirname(directory)


def _memory_room(directory: str) -> int | None:
    for limit, usage, prefix in (
        ("memory.max", "memory.current", ""),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    ):
        try:
            most = _word(directory, limit)
            if most == "max" or int(most) >= _UNLIMITED:
                return None
            with open(os.path.join(directory, "memory.stat"), encoding="ascii") as file:
                stat = dict(line.split() for line in file)
            cache = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
            return int(most) - int(_word(directory, usage)) + cache
        except (OSError, ValueError):
            continue  # not of this version, not of this controller, or gone
    return None


def _word(directory: str, name: str) -> str:
    with open(os.path.join(directory, name), encoding="ascii") as file:
        return file.read().strip()


def _bottom_up(directory: str) -> Iterator[str]:
    for path, _, _ in os.walk(directory, topdown=False):
        yield path


def _of_systemd(wanted: str, container_id: str) -> str:
    """`system-x.slice:runc:id` -> `/system.slice/system-x.slice/runc-id.scope`, as systemd nests slices."""
    parts = wanted.split(":")
    slice_name, prefix, name = parts if len(parts) == 3 else ("system.slice", "runc", container_id)
    words = (slice_name or "system.slice").removesuffix(".slice").split("-")
    nested = [f"{'-'.join(words[: at + 1])}.slice" for at in range(len(words)) if words != ["", ""]]
    unit = name if name.endswith(".slice") else f"{prefix}-{name}.scope" if prefix else f"{name}.scope"
    return "/" + "/".join([*nested, unit])


def _hierarchies() -> list[tuple[str, int, frozenset[str]]]:
    """(mount point, cgroup version, controllers with `name=…`) of every mounted hierarchy."""
    found = []
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        for line in file:
            head, _, tail = line.rstrip("\n").partition(" - ")
            words = tail.split(" ")
            if words[0] in ("cgroup", "cgroup2"):
                found.append((head.split(" ")[4], 2 if words[0] == "cgroup2" else 1, frozenset(words[-1].split(","))))
    return found


def _own(version: int, controllers: frozenset[str]) -> str:
    """This process's cgroup on one hierarchy."""
    with open("/proc/self/cgroup", encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        for line in file:
            number, names, path = line.rstrip("\n").split(":", 2)
            if (number == "0" and version == 2) or (version == 1 and names and set(names.split(",")) <= controllers):
                return path
    return "/"
