"""What rewarm keeps about one container: the container directory under the state directory.

The record is written before anything is changed that a crash would leave behind, so that whoever comes
next (the guard, `delete`, or the next `create`) can put it right.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Mapping
from contextlib import suppress
from types import MappingProxyType
from typing import Any, NamedTuple

from rewarm import private, processes
from rewarm.errors import OciError
from rewarm.oci import mounts
from rewarm.oci.spec import Spec, write_atomically
from rewarm.plain import plain

RESTORING = "restoring"
RESTORED = "restored"  # warm, not started yet: the tree is stopped
STARTED = "started"
COLD = "cold"
_PHASES = (RESTORING, RESTORED, STARTED, COLD)
_LARGEST = 4 << 20
_ROOM, _FILES = 8 << 20, 1024
"""Bytes and files that a control directory may have: restored.json holds an environment, of up to 6 MiB (execve(2))."""
_SELINUX = "/sys/fs/selinux"
_ID = re.compile(r"[A-Za-z0-9_+,.][A-Za-z0-9_+,.-]*")
_LONGEST_ID = 200  # a file name has 255 bytes, and the names beside the container directory are longer than its own


def escape(root: str) -> str:
    """A runc root as one file name: `-` becomes `\\x2d`, then `/` becomes `-` (the launcher does the same)."""
    return os.path.abspath(root).lstrip("/").replace("-", "\\x2d").replace("/", "-")


def directory(state_dir: str, root: str, container_id: str) -> str:
    return os.path.join(state_dir, "containers", escape(root), container_id)


def find_directory(state_dir: str, root: str, container_id: str) -> str:
    """`directory`, or where the container directory is if its runc root had another name when it was made: one through
    a symlink (/var/run)."""
    exact = directory(state_dir, root, container_id)
    if os.path.lexists(exact):
        return exact
    base = os.path.join(state_dir, "containers")
    with suppress(OSError):
        for name in sorted(os.listdir(base)):
            path = os.path.join(base, name, container_id)
            with suppress(OciError):
                kept = load(path)
                if kept is not None and os.path.realpath(kept.root) == os.path.realpath(root):
                    return path
    return exact


def capture_path(state_dir: str, pid: int, start_time: int) -> str:
    """What the lock of captures of a container is named after: its init, since its runc root has several names where
    there are symlinks (/var/run)."""
    return os.path.join(state_dir, "captures", f"{pid}-{start_time}")


def check_id(container_id: str) -> None:
    """Refuse what runc refuses (`^[\\w+-\\.]+$`): such an id names no container, but perhaps another directory.

    And what runc takes only behind `--`: an id must not be a flag wherever it is passed on.
    """
    if container_id in (".", "..") or not _ID.fullmatch(container_id) or len(container_id) > _LONGEST_ID:
        raise OciError(
            "check container id", repr(container_id[:80]), "rewarm has no part in it", "use letters, digits, - _ + ."
        )


class Undo(NamedTuple):
    """A directory tree that was changed and the layer that turns it back.

    `mounted` says that the root was a mount point: once the engine has unmounted it, there is nothing to turn back.
    """

    root: str
    layer: str
    mounted: bool = False


class Record(NamedTuple):
    """One container: the phase it is in and what has to be undone if that phase is never left."""

    id: str
    root: str
    bundle: str
    phase: str
    systemd_cgroup: bool = False
    pid_file: str = ""
    namespace: str = "default"
    owner_pid: int = 0
    owner_start: int = 0
    init_pid: int = 0
    init_start: int = 0
    snapshot: str = ""
    reason: str = ""
    config_backup: str = ""
    config_written: tuple[str, ...] = ()
    """Digests of what rewarm makes of config.json: any other is not its own to put back."""
    undo: tuple[Undo, ...] = ()
    rootfs: str = ""
    mounts: tuple[str, ...] = ()
    """Mounts below `rootfs` that were there before the restore: the engine's, never to be touched."""
    places: tuple[str, ...] = ()
    """Mount points in the rootfs that were not there before the restore."""
    cgroups: tuple[str, ...] = ()
    """Directories of the container's cgroup that were not there before the restore."""
    ipc: Mapping[str, Any] = MappingProxyType({})
    """System V objects that the restore makes in an IPC namespace that was there before (sysv.py)."""
    stopped: tuple[int, ...] = ()
    request: Mapping[str, str] = MappingProxyType({})

    def owner_lives(self) -> bool:
        return self.owner_pid != 0 and processes.start_time(self.owner_pid) == self.owner_start

    def owned(self) -> Record:
        """The same, of which this process is the owner."""
        return self._replace(owner_pid=os.getpid(), owner_start=processes.start_time(os.getpid()) or 0)


def make_directory(path: str, record: Record) -> None:
    """The container directory with its record, and the control directory, to which the container's users may write.

    It appears at once and whole, so that whoever finds it knows what it is. Raises FileExistsError if the
    container has one already, and OSError.
    """
    scratch = f"{path}~{os.getpid()}"  # no container id holds a `~`
    private.make(os.path.dirname(path))
    _discard(scratch)  # of an earlier process with this number
    try:
        os.mkdir(scratch, mode=0o700)
        os.mkdir(control(scratch))
        # Readiness is told by whoever the program runs as; the sticky bit keeps users from each other's files.
        os.chmod(control(scratch), 0o1777)
        save(scratch, record)
        os.rename(scratch, path)
    except OSError as error:
        _discard(scratch)
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise FileExistsError(errno.EEXIST, "is there already", path) from error
        raise


def _discard(path: str) -> None:
    """Remove a directory that no container has had. What is not there is no error; what stays is swept later."""
    if os.path.lexists(path):
        import shutil

        shutil.rmtree(path, ignore_errors=True)


def control(path: str) -> str:
    return os.path.join(path, "control")


def bound_control(path: str, spec: Spec) -> str:
    """The control directory, with a file system of its own: the state directory lies in the node's /run, in which
    engines need room, and the container's users may write. `remove` takes it away. Raises OSError."""
    from rewarm_native import process

    process.mount_tmpfs(control(path), size=_ROOM, inodes=_FILES, mode=0o1777, label=_label(spec))
    return control(path)


def _label(spec: Spec) -> str:
    """What SELinux lets the container's processes write to, where it is on; "" elsewhere, where no file system may have
    one. Of what is no label, runc says so."""
    label = str((spec.get("linux") or {}).get("mountLabel") or "")
    return label if os.path.isdir(_SELINUX) and re.fullmatch(r"[\w.:,-]+", label, re.ASCII) else ""


def save(path: str, record: Record, name: str = "record.json") -> None:
    write_atomically(os.path.join(path, name), json.dumps(plain(record), sort_keys=True).encode())


def load(path: str) -> Record | None:
    """The record in a container directory; None when there is none (a crash before it was written)."""
    name = os.path.join(path, "record.json")
    try:
        with open(name, "rb") as file:
            data = json.loads(file.read(_LARGEST))
        undo = tuple(Undo(**_known(Undo, one)) for one in data.pop("undo"))
        record = Record(**_known(Record, data), undo=undo)
        texts = (record.id, record.root, record.bundle, record.namespace, record.snapshot, record.reason)
        if not all(isinstance(one, str) for one in texts):
            raise ValueError("names that are no text")
        if not isinstance(record.request, Mapping) or not isinstance(record.ipc, Mapping):
            raise ValueError("a request that is none")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise OciError("read record", name, repr(error), "remove the directory if its container is gone") from error
    if record.phase not in _PHASES:
        raise OciError("read record", name, f"unknown phase {record.phase!r}")
    return record


def _known(kind: type[Record] | type[Undo], data: dict[str, Any]) -> dict[str, Any]:
    """Without what a newer rewarm may have written, whose containers outlive it where a node goes back to this one."""
    return {key: tuple(v) if isinstance(v, list) else v for key, v in data.items() if key in kind._fields}


def remove(path: str) -> None:
    """Remove a container directory; what the container's users left in the control directory goes with it.

    CRIU mounts the cgroup hierarchies below its work directory: what a killed one left there goes first.
    """
    if not os.path.isdir(path):
        return
    mounts.unmount_below(path)
    # It goes at once: whoever comes meanwhile finds it whole or not at all. A name with `~` is swept if this is killed.
    if "~" not in os.path.basename(path):
        os.rename(path, f"{path}~{os.getpid()}")
        path = f"{path}~{os.getpid()}"
    top = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        _empty(top)
    finally:
        os.close(top)
    os.rmdir(path)


def _empty(top: int) -> None:
    """Remove everything in an open directory, however deep a container has nested directories in it.

    Neither recursion nor long paths: each directory's own directories are moved up beside it before it goes.
    No symbolic link is followed.
    """
    moved = 0
    while names := os.listdir(top):
        for name in names:
            if not stat.S_ISDIR(os.stat(name, dir_fd=top, follow_symlinks=False).st_mode):
                os.unlink(name, dir_fd=top)
                continue
            fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=top)
            try:
                for inner in os.listdir(fd):
                    if stat.S_ISDIR(os.stat(inner, dir_fd=fd, follow_symlinks=False).st_mode):
                        moved += 1
                        os.rename(inner, f".rewarm-{os.getpid()}-{moved}", src_dir_fd=fd, dst_dir_fd=top)
                    else:
                        os.unlink(inner, dir_fd=fd)
            finally:
                os.close(fd)
            os.rmdir(name, dir_fd=top)
