"""Checks of the kernel and of what this process may do with it."""

from __future__ import annotations

import os
import threading

from rewarm import node as facts
from rewarm.checks import FAILED, OK, WARNING, Check, Node

# Numbers of linux/capability.h: what CRIU, ptrace, overlay whiteouts and foreign network namespaces need.
_CAPABILITIES = {
    "CAP_CHOWN": 0,
    "CAP_DAC_OVERRIDE": 1,
    "CAP_NET_ADMIN": 12,
    "CAP_SYS_PTRACE": 19,
    "CAP_SYS_ADMIN": 21,
    "CAP_MKNOD": 27,
}
# CRIU reads the limits of a process of another user (prlimit) only with this one.
_SYS_RESOURCE = 24


def rights(node: Node) -> Check:
    if os.geteuid() != 0:
        return Check("rights", FAILED, f"user {os.geteuid()}", "run it as root: only root can capture and restore")
    effective = int(_status("CapEff"), 16)
    missing = [name for name, bit in _CAPABILITIES.items() if not effective >> bit & 1]
    if missing:
        step = "run it on the node itself, or in a privileged container"
        return Check("rights", FAILED, f"root without {', '.join(missing)}", step)
    if not effective >> _SYS_RESOURCE & 1:
        found = "root without CAP_SYS_RESOURCE: containers whose user is not root cannot be captured"
        return Check("rights", WARNING, found, "run it on the node itself, or in a privileged container")
    return Check("rights", OK, "root with the capabilities that CRIU needs")


def _status(key: str) -> str:
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        for line in file:
            if line.startswith(f"{key}:"):
                return line.partition(":")[2].strip()
    return "0"


def features(node: Node) -> Check:
    """What CRIU and rewarm use of the kernel and a configuration can leave out; `criu check` looks at the rest."""
    missing = []
    if not os.path.exists(f"/proc/self/task/{threading.get_native_id()}/children"):
        missing.append("/proc/PID/task/TID/children (CONFIG_PROC_CHILDREN)")
    if not os.path.exists("/proc/self/map_files"):
        missing.append("/proc/PID/map_files (CONFIG_CHECKPOINT_RESTORE)")
    if "errno" not in _words("/proc/sys/kernel/seccomp/actions_avail"):
        missing.append("seccomp filters (CONFIG_SECCOMP_FILTER)")
    missing += [f"{kind} namespaces" for kind in ("pid", "mnt", "net", "ipc", "uts") if not _has_namespace(kind)]
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError:
        missing.append("pidfd_open (Linux 5.3)")
    if not _can_force_writes():
        missing.append("writes to read-only memory by /proc/PID/mem (boot parameter proc_mem.force_override)")
    if missing:
        return Check(
            "kernel", FAILED, f"Linux {facts.kernel()} without {', '.join(missing)}", "boot a kernel that has it"
        )
    if not _has_namespace("time"):
        found = (
            f"Linux {facts.kernel()} without time namespaces: in containers restored here CLOCK_MONOTONIC may go back"
        )
        return Check("kernel", WARNING, found, "boot Linux 5.6 or newer with CONFIG_TIME_NS")
    return Check("kernel", OK, f"Linux {facts.kernel()}, {facts.architecture()}")


def _can_force_writes() -> bool:
    """Whether memory that its process may only read can be filled; kernels since 6.12 can be told to refuse it.

    Found out by writing a byte of this process's own program over itself.
    """
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as lines:
        address = next((int(line.partition("-")[0], 16) for line in lines if " r--p " in line and "/" in line), None)
    if address is None:
        return True
    fd = os.open("/proc/self/mem", os.O_RDWR | os.O_CLOEXEC)
    try:
        return os.pwrite(fd, os.pread(fd, 1, address), address) == 1
    except OSError:
        return False
    finally:
        os.close(fd)


def _has_namespace(kind: str) -> bool:
    return os.path.exists(f"/proc/self/ns/{kind}")


def _words(path: str) -> list[str]:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read().split()
    except FileNotFoundError:
        return []


def overlay(node: Node) -> Check:
    if "overlay" in _words("/proc/filesystems"):
        return Check("overlay", OK, "the kernel has overlayfs")
    # Loading it may be left to the first mount, so that its absence is not yet a failure.
    step = "run: modprobe overlay; without it only containers with a read-only root can be captured"
    return Check("overlay", WARNING, "overlayfs is not in /proc/filesystems", step)


def cgroups(node: Node) -> Check:
    """The mode, and the freezer: a container is held still by it while it is captured."""
    if facts.cgroup_version() == 2:
        # The unified hierarchy has had cgroup.freeze since Linux 5.2, in any configuration.
        if facts.version_tuple(facts.kernel()) >= (5, 2, 0):
            return Check("cgroups", OK, "v2, with freezer")
        return Check("cgroups", FAILED, f"v2 of Linux {facts.kernel()}, without freezer", "boot Linux 5.2 or newer")
    mounts = _cgroup_mounts()
    mode = "v1 (hybrid)" if any(kind == "cgroup2" for kind, _, _ in mounts) else "v1"
    freezer = [place for kind, place, options in mounts if kind == "cgroup" and "freezer" in options]
    if freezer:
        return Check("cgroups", OK, f"{mode}, with freezer at {freezer[0]}")
    found = f"{mode}, without freezer" if mounts else "none is mounted"
    step = "mount the freezer hierarchy, or boot with systemd.unified_cgroup_hierarchy=1"
    return Check("cgroups", FAILED, found, step)


def _cgroup_mounts() -> list[tuple[str, str, list[str]]]:
    """(type, mount point, options) of every mounted hierarchy."""
    with open("/proc/self/mounts", encoding="utf-8", errors="surrogateescape") as file:
        lines = [line.split(" ") for line in file]
    return [(line[2], line[1], line[3].split(",")) for line in lines if line[2] in ("cgroup", "cgroup2")]
