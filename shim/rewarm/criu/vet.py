"""A look into CRIU's images before CRIU gets them: what a snapshot may not decide.

Namespaces, mounts, capabilities, users, groups, cgroups, LSM labels and whether there is a seccomp filter come from the
live spec. CRIU takes them out of its images, so images that ask for more than the live spec gives are
refused. A manifest can lie about what its images hold; the images themselves are what is checked here.
What the seccomp filter does is not: the program in the images is taken as it is (docs/decisions/0007).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rewarm.criu import descriptors, images, ipc, namespaces
from rewarm.criu.images import Message
from rewarm.criu.tree import is_dead
from rewarm.errors import Unfit

# images/mnt.proto: file systems that the kernel fills by itself or that CRIU fills from its own images.
_VIRTUAL = {1: "proc", 2: "sysfs", 5: "tmpfs", 6: "devpts", 12: "cgroup", 14: "mqueue", 23: "cgroup2"}
_OVERLAY = 17
_FILTER = 2  # SECCOMP_MODE_FILTER
_TSYNC = 1  # SECCOMP_FILTER_FLAG_TSYNC
# runc makes these itself: masked and read-only paths, and what it mounts below its own mounts.
_BELOW = ("/proc", "/sys", "/dev")
_CAPABILITIES = """
CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE NET_BIND_SERVICE
NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT
SYS_ADMIN SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP
MAC_OVERRIDE MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE
""".split()  # noqa: SIM905


def vet(directory: Path, spec: dict[str, Any], destinations: set[str]) -> None:
    """Check the images in `directory` against the live spec; Unfit names the first thing that asks for too much.

    `destinations` are the live spec's mount points. Raises images.ImageError for an image that is none.
    """
    namespaces.check(directory, spec)
    for path in sorted(directory.glob("mountpoints-*.img")):
        found = [_check_mount(mount, destinations) for mount in images.records(path)]
        # The first is what runc has mounted there; one upon it would be the snapshot's own.
        if found.count("/") > 1:
            raise Unfit("restore snapshot", "mount '/'", f"its images want {found.count('/')} of them")
    _check_cgroups(directory)
    cores = sorted(directory.glob("core-*.img"))
    if not cores:
        raise Unfit("restore snapshot", "checkpoint", "it has no core image, so no process")
    limits = Limits(spec)
    descriptors.check(directory, limits.capabilities())
    ipc.check(directory, limits.may_own, huge="IPC_LOCK" in limits.capabilities())
    followers = _followers(directory)
    for path in cores:
        records = list(images.records(path))
        if records and all(is_dead(core) for core in records):
            continue
        some = False
        for thread in (one for core in records for one in images.messages(core, 5)):
            some = True
            # CRIU takes what is missing here from an image of another name (criu/cr-restore.c: creds-PID.img).
            if 10 not in thread:
                raise Unfit("restore snapshot", path.name, "it has no credentials in it")
            limits.check(thread, path.name, path.name in followers)
        if not some:
            raise Unfit("restore snapshot", path.name, "it has no credentials in it")


def _check_cgroups(directory: Path) -> None:
    """Every cgroup of the tree lies at or below that of its root, which CRIU takes for the new container's."""
    path = directory / "cgroup.img"
    roots: dict[str, str] = {}
    for entry in images.records(path) if path.exists() else ():
        for at, one in enumerate(images.messages(entry, 1)):
            for member in images.messages(one, 2):
                controller, place = images.text(member, 1), images.text(member, 2)
                # The first set is that of the root task: CRIU numbers them as it meets them.
                root = roots.setdefault(controller, place) if at == 0 else roots.get(controller, "")
                _check_cgroup(place, root)
        for controllers in images.messages(entry, 2):
            names = [name.decode("utf-8", "replace") for name in controllers.get(1, []) if isinstance(name, bytes)]
            for top in images.messages(controllers, 2):
                for name in names:
                    _check_cgroup("/" + images.text(top, 1).lstrip("/"), roots.get(name, ""))
                _check_cgroup_names(top)


def _check_cgroup(place: str, root: str) -> None:
    below = place == root or place.startswith(root.rstrip("/") + "/")
    if not root or not below or ".." in place.split("/"):
        raise Unfit(
            "restore snapshot", f"cgroup {place[:200]!r}", f"it is outside of the container's, which was {root[:200]!r}"
        )


def _check_cgroup_names(parent: Message) -> None:
    waiting = [parent]
    while waiting:
        for child in images.messages(waiting.pop(), 2):
            name = images.text(child, 1)
            if ".." in name.split("/") or name.startswith("/"):
                raise Unfit("restore snapshot", f"cgroup {name[:200]!r}", "it is outside of the container's")
            waiting.append(child)


def _followers(directory: Path) -> set[str]:
    """Names of the core images of threads that get the filter of their process's first thread.

    Where all threads have the same filters CRIU (criu/seccomp.c) dumps the first thread's alone, marked TSYNC.
    """
    path = directory / "seccomp.img"
    records = images.records(path) if path.exists() else ()
    flags = [images.number(one, 3) for record in records for one in images.messages(record, 1)]
    found: set[str] = set()
    for process in images.records(directory / "pstree.img"):
        leader = images.number(process, 1)
        core = directory / f"core-{leader}.img"
        for first in images.records(core) if core.exists() else ():
            for thread in images.messages(first, 5):
                last = images.number(thread, 12, len(flags))
                if images.u32(thread, 11) == _FILTER and last < len(flags) and flags[last] & _TSYNC:
                    found.update(f"core-{tid}.img" for tid in images.numbers(process, 5) if tid != leader)
    return found


def _check_mount(mount: Message, destinations: set[str]) -> str:
    """Returns where it is mounted."""
    where = os.path.normpath("/" + images.text(mount, 7).lstrip("/"))
    kind = images.u32(mount, 1)
    # What CRIU takes from the caller's map of external mounts: runc makes that from the live spec.
    external = bool(images.number(mount, 13) or images.text(mount, 18))
    known = where == "/" or where in destinations or any(where.startswith(b + "/") or where == b for b in _BELOW)
    if not known:
        raise Unfit(
            "restore snapshot", f"mount {where[:200]!r}", "it is in the snapshot's images, this container has none"
        )
    if external or where == "/" or kind in _VIRTUAL:
        return where
    raise Unfit(
        "restore snapshot", f"mount {where[:200]!r}", f"its images want a file system of kind {kind} mounted there"
    )


class Limits:
    """What the live spec allows a process to be."""

    def __init__(self, spec: dict[str, Any]) -> None:
        process = spec.get("process") or {}
        capabilities = process.get("capabilities") or {}
        self._bounding = capability_mask(capabilities.get("bounding") or [])
        user = process.get("user") or {}
        self._user, self._group = int(user.get("uid", 0)), int(user.get("gid", 0))
        self._groups = {self._group, *map(int, user.get("additionalGids") or [])}
        self._no_new_privileges = bool(process.get("noNewPrivileges"))
        ambient = capability_mask(capabilities.get("ambient") or [])
        # Another user than root has its ambient capabilities, and gets more only by setuid and file capabilities.
        may_gain = self._user == 0 or not self._no_new_privileges
        self._held = self._bounding if may_gain else ambient
        self._filtered = bool((spec.get("linux") or {}).get("seccomp"))
        self._lsm = str(process.get("apparmorProfile") or process.get("selinuxLabel") or "")

    def capabilities(self) -> set[str]:
        """Without CAP_, what a process may have."""
        return {name for at, name in enumerate(_CAPABILITIES) if self._bounding & 1 << at}

    def may_own(self, user: int, group: int) -> bool:
        """Whether something may belong to them that the container's processes make."""
        users = user == self._user or self._may(self._held, "SETUID")
        return users and (group in self._groups or self._may(self._held, "SETGID"))

    def check(self, thread: Message, name: str, follows: bool) -> None:
        """`follows`: the thread gets the seccomp filter of another that is checked as well."""
        if self._filtered and images.u32(thread, 11) != _FILTER and not follows:
            raise Unfit("restore snapshot", name, "a process has no seccomp filter, this container's has")
        for creds in images.messages(thread, 10):
            self._check_capabilities(creds, name)
            self._check_ids(creds, name)
            if self._no_new_privileges and images.u32(creds, 18) != 1:
                raise Unfit("restore snapshot", name, "a process may gain privileges, this container's may not")
            label = images.text(creds, 15)
            if label and label != self._lsm and not (label == "unconfined" and not self._lsm):
                cause = f"a process has LSM label {label[:80]!r}, this container {self._lsm!r}"
                raise Unfit("restore snapshot", name, cause)

    def _check_capabilities(self, creds: Message, name: str) -> None:
        """Inheritable and bounding ones within the live bounding set; what a process holds within what it may hold."""
        for field, allowed in (
            (9, self._bounding),
            (12, self._bounding),
            (10, self._held),
            (11, self._held),
            (19, self._held),
        ):
            words = images.numbers(creds, field)
            if any(word >> 32 for word in words):
                raise images.ImageError(f"{name}: field {field} has more than 32 bits")
            mask = sum(word << 32 * at for at, word in enumerate(words))
            extra = [_capability(at) for at in range(mask.bit_length()) if mask & ~allowed & 1 << at]
            if extra:
                raise Unfit("restore snapshot", name, f"a process has capability {extra[0]}, this container has not")

    def _check_ids(self, creds: Message, name: str) -> None:
        users = {images.u32(creds, field) for field in (1, 3, 5, 7)}
        groups = {images.u32(creds, field) for field in (2, 4, 6, 8)}
        others = set(images.numbers(creds, 14))
        if not self._may(self._held, "SETUID") and users != {self._user}:
            found = max(users - {self._user})
            raise Unfit("restore snapshot", name, f"a process runs as user {found}, this container as {self._user}")
        if not self._may(self._held, "SETGID") and (groups != {self._group} or not others <= self._groups):
            found = max((groups | others) - self._groups, default=max(groups))
            raise Unfit("restore snapshot", name, f"a process has group {found}, this container {self._group}")

    @staticmethod
    def _may(held: int, capability: str) -> bool:
        return bool(held & 1 << _CAPABILITIES.index(capability))


def _capability(number: int) -> str:
    return f"CAP_{_CAPABILITIES[number]}" if number < len(_CAPABILITIES) else f"number {number}"


def capability_mask(names: list[str]) -> int:
    """`["CAP_CHOWN", …]` as the bit mask of capabilities(7); a name that is not known gives no bit."""
    index = {f"CAP_{name}": at for at, name in enumerate(_CAPABILITIES)}
    return sum(1 << index[name] for name in set(names) if name in index)
