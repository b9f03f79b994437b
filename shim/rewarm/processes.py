"""Processes as /proc shows them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

_PF_EXITING = 0x4  # include/linux/sched.h


class Stat(NamedTuple):
    """Of /proc/PID/stat: the state letter, the parent, the start time in clock ticks since boot, and whether it is in
    exit(2), from which nothing comes back."""

    state: str
    parent: int
    start_time: int
    exiting: bool


def stat(pid: int, tid: int | None = None) -> Stat | None:
    """None when the process is gone."""
    path = f"/proc/{pid}/stat" if tid is None else f"/proc/{pid}/task/{tid}/stat"
    try:
        with open(path, encoding="ascii", errors="replace", newline="\n") as file:
            # The command is in parentheses and may hold anything, parentheses included.
            fields = file.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return Stat(fields[0], int(fields[1]), int(fields[19]), bool(int(fields[6]) & _PF_EXITING))


def start_time(pid: int) -> int | None:
    found = stat(pid)
    return None if found is None or found.state in "ZX" else found.start_time


def is_dead(pid: int, start: int) -> bool:
    """Whether a process with this start time has ended, also if its tracer still has to wait for its threads. One of
    which only the first thread has ended, which looks like a zombie then, lives.

    The init of a pid namespace sleeps in exit(2) until all others in there have been waited for, its own threads among
    them (kernel/pid_namespace.c, zap_pid_ns_processes): by a tracer that waits for the init, never.
    """
    found = stat(pid)
    if found is None or found.start_time != start:
        return True
    found_threads = [one for one in (stat(pid, tid) for tid in threads(pid)) if one is not None]
    return all(one.state in "ZX" or one.exiting for one in found_threads)


def children(pid: int) -> list[int]:
    """The living children of all threads of a process (CONFIG_PROC_CHILDREN, which CRIU needs as well)."""
    found: list[int] = []
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except (FileNotFoundError, ProcessLookupError):
        return found
    for thread in threads:
        try:
            with open(f"/proc/{pid}/task/{thread}/children", encoding="ascii") as file:
                found += [int(word) for word in file.read().split()]
        except (FileNotFoundError, ProcessLookupError):
            continue  # the thread has ended since it was listed
    return found


def tree(pid: int) -> list[int]:
    """A process and its descendants, parents before children."""
    found = [pid]
    for one in found:
        found += children(one)
    return found


def running(pid: int) -> str:
    """The first thread of a process or its descendants that no signal has stopped, in words; "" when there is none."""
    for one in tree(pid):
        for tid in threads(one):
            found = stat(one, tid)
            if found is not None and found.state not in "TZX":
                return f"thread {namespace_pid(one, tid)} of process {namespace_pid(one)} is in state {found.state}"
    return ""


def namespace_pid(pid: int, tid: int | None = None) -> int:
    """The number that a process (or thread) has in its own, innermost pid namespace; 0 when it is gone."""
    path = f"/proc/{pid}/status" if tid is None else f"/proc/{pid}/task/{tid}/status"
    try:
        # A command may hold \r, and is not to make lines.
        with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
            for line in file:
                if line.startswith("NSpid:"):
                    return int(line.split()[-1])
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return 0


def traced(pid: int) -> bool:
    """Whether some process (CRIU, a debugger) traces it."""
    try:
        with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace", newline="\n") as file:
            return any(line.startswith("TracerPid:") and line.split()[1] != "0" for line in file)
    except (FileNotFoundError, ProcessLookupError):
        return False


def handles(pid: int, number: int) -> bool:
    """Whether a process catches a signal, or all its threads block it (to wait for it, or to read it from a
    descriptor)."""
    return _has(pid, "SigCgt", number) or (blocks(pid, number) and all(blocks(tid, number) for tid in threads(pid)))


def blocks(tid: int, number: int) -> bool:
    """Whether a thread (a process: its first one) blocks a signal."""
    return _has(tid, "SigBlk", number)


def _has(tid: int, mask: str, number: int) -> bool:
    try:
        with open(f"/proc/{tid}/status", encoding="utf-8", errors="replace", newline="\n") as file:
            return any(line.startswith(f"{mask}:") and int(line.split()[1], 16) >> number - 1 & 1 for line in file)
    except (FileNotFoundError, ProcessLookupError):
        return False


def user(pid: int) -> tuple[int, int] | None:
    """Its effective user and group, by the numbers of the caller's user namespace; None if it has ended."""
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            found = dict(line.split(b":", 1) for line in file if line.startswith((b"Uid:", b"Gid:")))
        return int(found[b"Uid"].split()[1]), int(found[b"Gid"].split()[1])
    except (OSError, KeyError):
        return None


def threads(pid: int) -> list[int]:
    try:
        return sorted(int(name) for name in os.listdir(f"/proc/{pid}/task"))
    except (FileNotFoundError, ProcessLookupError):
        return []


def command(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace", newline="\n") as file:
            return file.read().strip()
    except (FileNotFoundError, ProcessLookupError):
        return "?"


def send(pid: int, number: int) -> bool:
    """Send a signal; False when the process is gone."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def kill_group(leader: int, start: int) -> None:
    """SIGKILL for the process group of a process with this start time; nothing if that is gone."""
    if start_time(leader) == start:
        with suppress(ProcessLookupError):
            os.killpg(leader, signal.SIGKILL)


def in_cgroups(paths: Iterator[str] | tuple[str, ...]) -> set[int]:
    """All processes in the given cgroup directories and below them."""
    found: set[int] = set()
    for path in paths:
        for directory, _, files in os.walk(path):
            if "cgroup.procs" in files:
                try:
                    with open(os.path.join(directory, "cgroup.procs"), encoding="ascii") as file:
                        found.update(int(line) for line in file)
                except OSError:
                    continue  # the cgroup was removed, or is a threaded one whose root lists the same processes
    found.discard(0)
    return found


def kill_all(pids: set[int], deadline: float = 10.0) -> bool:
    """SIGKILL all of them and wait up to `deadline` seconds; True when none is left."""
    end = time.monotonic() + deadline
    left = {pid for pid in pids if send(pid, signal.SIGKILL)}
    while left and time.monotonic() < end:
        left = {pid for pid in left if start_time(pid) is not None}
        if left:
            time.sleep(0.01)
    return not left


def is_own_namespace(namespace: dict[str, object]) -> bool:
    """Whether a namespace of a spec is one that this process is in: containerd names the sandbox's in every case, which
    has the node's network in a pod with `hostNetwork`."""
    path, name = namespace.get("path"), _NAMESPACES.get(str(namespace.get("type")))
    if not path or name is None:
        return False
    try:
        return os.path.samefile(str(path), f"/proc/self/ns/{name}")
    except OSError:
        return False  # runc will say what is wrong with it


_NAMESPACES = {"pid": "pid", "network": "net", "ipc": "ipc", "uts": "uts", "mount": "mnt"}
"""OCI's names and the kernel's. A user namespace is not joined but nested."""
