"""The device nodes in a restored container's /dev: those of the live spec, not those of the snapshot.

CRIU restores the tmpfs /dev with the nodes that the source had, so its /dev/nvidia0 lies where this container was
given /dev/nvidia3, and a snapshot, which is hostile input, may hold any other. Works through /proc/PID/root of the
restored, stopped init. The file system there is hostile too: every directory is opened from the one above it, never
through a symbolic link, never out of /dev and never into a mount below it (what is mounted was checked against the
live spec). A mount is told by its id, not by its file system: /dev may be bind-mounted into itself.

Source: runc 1.1 to 1.5, libcontainer/rootfs_linux.go and specconv, for what `runc create` makes of `linux.devices`.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from rewarm.errors import RestoreError
from rewarm_hooks.errors import shown
from rewarm_hooks.gpu_visible import MAJOR

_TYPES = {"c": stat.S_IFCHR, "u": stat.S_IFCHR, "b": stat.S_IFBLK, "p": stat.S_IFIFO}
_DEFAULT_MODE = 0o666  # specconv, when the spec has no fileMode
_OWN_LINKS = ("ptmx",)  # runc makes it a link into /dev/pts, whatever the spec says
_MAJORS, _MINORS = 1 << 12, 1 << 20  # linux/kdev_t.h
_IDS = (1 << 32) - 1  # the last one means "leave it" to chown(2)
_DEPTH = 32
_ENTRIES = 1 << 16
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_LOOK = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


class _Node(NamedTuple):
    """A device of the live spec. parts: its path below /dev;  kind: S_IFCHR, S_IFBLK or S_IFIFO;  device: dev_t, 0 for
    a FIFO;  mode: permission bits.
    """

    parts: tuple[str, ...]
    kind: int
    device: int
    mode: int
    uid: int
    gid: int

    def __str__(self) -> str:
        return shown("/dev/" + "/".join(self.parts))


def put_right(pid: int, spec: dict[str, Any], proc_devices: str | None = None) -> list[str]:
    """Make /dev of the stopped process `pid` (host pid) agree with `linux.devices` of `spec`.

    Every device of the spec is there afterwards, with its type, numbers, mode and owner. Gone is every block device,
    and every character device of the NVIDIA driver, that the spec does not give. Other files are left alone, and so is
    what is mounted in /dev. proc_devices: the text of /proc/devices, read from there if None.
    Returns one line for each change. Raises RestoreError; some changes may have been made then.
    """
    wanted = _wanted(spec)
    with _dev(pid, spec) as dev:
        changes = [line for node in wanted if (line := _make(dev, node))]
        return changes + _sweep(dev, wanted, _nvidia_majors(proc_devices))


def _wanted(spec: dict[str, Any]) -> list[_Node]:
    linux = spec.get("linux")
    devices = linux.get("devices") if isinstance(linux, dict) else None
    found: dict[tuple[str, ...], _Node] = {}
    for entry in devices if isinstance(devices, list) else []:
        try:
            node = _node(entry)
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            raise RestoreError("make device", shown(str(entry)), "its entry in the spec is malformed") from error
        if node.parts not in [(name,) for name in _OWN_LINKS]:
            found[node.parts] = node
    return list(found.values())


def _node(entry: dict[str, Any]) -> _Node:
    path = entry["path"]
    parts = tuple(part for part in path.split("/") if part)
    if not path.startswith("/") or len(parts) < 2 or parts[0] != "dev" or {".", ".."} & set(parts):
        raise RestoreError("make device", shown(path), "it is not below /dev", "take it out of the container's devices")
    if b"\0" in os.fsencode(path):
        raise ValueError
    kind = _TYPES[entry["type"]]
    device = 0
    if kind != stat.S_IFIFO:
        device = os.makedev(_number(entry["major"], _MAJORS), _number(entry["minor"], _MINORS))
    mode = entry.get("fileMode")
    # Docker writes the type's bits into fileMode as well.
    bits = _DEFAULT_MODE if mode is None else stat.S_IMODE(_number(mode, 1 << 32))
    return _Node(parts[1:], kind, device, bits, _number(entry.get("uid"), _IDS), _number(entry.get("gid"), _IDS))


def _number(value: object, end: int) -> int:
    number = 0 if value is None else value
    if type(number) is not int or not 0 <= number < end:
        raise ValueError
    return number


@contextmanager
def _dev(pid: int, spec: dict[str, Any]) -> Iterator[int]:
    """The container's /dev, open."""
    for mount in spec.get("mounts") or []:
        options = mount.get("options") or []
        if os.path.normpath(str(mount.get("destination", ""))) == "/dev" and (
            mount.get("type") in ("bind", "devtmpfs") or "bind" in options or "rbind" in options
        ):
            raise _of_the_node(f"it is a mount of {shown(str(mount.get('source', '')))}")
    with (
        _opened(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, None, "container's root") as root,
        _opened("dev", _DIRECTORY, root, "/dev of the container") as dev,
    ):
        own, host = os.fstat(dev), os.stat("/dev")
        if (own.st_dev, own.st_ino) == (host.st_dev, host.st_ino):
            raise _of_the_node("it is the node's own")
        yield dev


def _of_the_node(cause: str) -> RestoreError:
    return RestoreError("put devices right in", "/dev of the container", cause, "give the container a /dev of its own")


@contextmanager
def _opened(name: str, flags: int, at: int | None, shown_as: str) -> Iterator[int]:
    try:
        fd = os.open(name, flags, dir_fd=at)
    except OSError as error:
        raise _failed("open", shown_as, error) from error
    try:
        yield fd
    finally:
        os.close(fd)


def _make(dev: int, node: _Node) -> str:
    """Make the node agree; what was done, or "" if it agreed."""
    with _parent(dev, node) as directory:
        name = node.parts[-1]
        try:
            found = os.stat(name, dir_fd=directory, follow_symlinks=False)
        except FileNotFoundError:
            found = None
        except OSError as error:
            raise _failed("look at", str(node), error) from error
        if found is not None:
            if _agrees(found, node):
                return ""
            if _mounted(directory, name, str(node)):
                return _covered(found, node)
            if stat.S_ISDIR(found.st_mode):
                raise RestoreError("make device", str(node), "the snapshot has a directory in its place")
        _replace(directory, name, node)
    return (
        f"{node} is {_numbers(node.kind, node.device)}, {'it was ' + _described(found) if found else 'it was missing'}"
    )


@contextmanager
def _parent(dev: int, node: _Node) -> Iterator[int]:
    """The directory that the node belongs in, made if it is missing."""
    directory = os.dup(dev)
    try:
        for name in node.parts[:-1]:
            try:
                below = _step(directory, name)
            except OSError as error:
                raise _failed("open the directory of", str(node), error) from error
            os.close(directory)
            directory = below
            if _mount_id(directory) != _mount_id(dev):
                raise RestoreError("make device", str(node), "something is mounted on the way to it")
        yield directory
    finally:
        os.close(directory)


def _step(directory: int, name: str) -> int:
    try:
        os.mkdir(name, dir_fd=directory)
    except FileExistsError:
        return os.open(name, _DIRECTORY, dir_fd=directory)
    made = os.open(name, _DIRECTORY, dir_fd=directory)
    os.fchmod(made, 0o755)  # as runc makes it, whatever the umask
    return made


def _agrees(found: os.stat_result, node: _Node) -> bool:
    return (
        _same_device(found, node)
        and stat.S_IMODE(found.st_mode) == node.mode
        and (found.st_uid, found.st_gid) == (node.uid, node.gid)
    )


def _same_device(found: os.stat_result, node: _Node) -> bool:
    return stat.S_IFMT(found.st_mode) == node.kind and found.st_rdev == node.device


def _covered(found: os.stat_result, node: _Node) -> str:
    """What is mounted at the node's place is the node itself (a bind mount of the host's), or not what was given."""
    # runc mounts the terminal there.
    if _same_device(found, node) or node.parts == ("console",):
        return ""
    raise RestoreError("make device", str(node), f"a mount is in its place: {_described(found)}")


def _replace(directory: int, name: str, node: _Node) -> None:
    """Put the node there in one step. Not through the name: chmod has no form that follows no link."""
    temporary = f".rewarm-{os.urandom(8).hex()}"
    try:
        os.mknod(temporary, node.kind | 0o600, node.device, dir_fd=directory)
        try:
            fd = os.open(temporary, _LOOK, dir_fd=directory)
            try:
                if not _same_device(os.fstat(fd), node):
                    raise RestoreError("make device", str(node), "somebody replaced it at once")
                os.chown(f"/proc/self/fd/{fd}", node.uid, node.gid)
                os.chmod(f"/proc/self/fd/{fd}", node.mode)
            finally:
                os.close(fd)
            os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary, dir_fd=directory)
            raise
    except OSError as error:
        raise _failed("make device", str(node), error) from error


def _sweep(dev: int, wanted: list[_Node], nvidia: frozenset[int]) -> list[str]:
    """Remove the devices that the spec gives under no name."""
    given = {(node.kind, node.device) for node in wanted}
    mount = _mount_id(dev)
    changes: list[str] = []
    left = _ENTRIES

    def sweep(directory: int, path: str, depth: int) -> None:
        nonlocal left
        for name in os.listdir(directory):
            left -= 1
            if left < 0 or depth > _DEPTH:
                raise RestoreError(
                    "look through",
                    "/dev of the container",
                    f"it has more than {_ENTRIES} entries, or is deeper than {_DEPTH}",
                    "capture the container again",
                )
            try:
                found = os.stat(name, dir_fd=directory, follow_symlinks=False)
            except FileNotFoundError:
                continue  # a mount whose file system answers nothing, or a name that has gone
            if stat.S_ISDIR(found.st_mode):
                below = os.open(name, _DIRECTORY, dir_fd=directory)
                try:
                    if _mount_id(below) == mount:
                        sweep(below, f"{path}/{name}", depth + 1)
                finally:
                    os.close(below)
            elif _foreign(found, name, given, nvidia) and not _mounted(directory, name, f"{path}/{name}"):
                os.unlink(name, dir_fd=directory)
                changes.append(f"{shown(f'{path}/{name}')} is removed, it was {_described(found)}")

    try:
        sweep(dev, "/dev", 0)
    except OSError as error:
        raise _failed("look through", "/dev of the container", error) from error
    return changes


def _foreign(found: os.stat_result, name: str, given: set[tuple[int, int]], nvidia: frozenset[int]) -> bool:
    kind = stat.S_IFMT(found.st_mode)
    if (kind, found.st_rdev) in given:
        return False
    # By name too: the major of nvidia-uvm is another on every node, so the source's is some other driver's here.
    own = os.major(found.st_rdev) in nvidia or name.startswith("nvidia")
    return kind == stat.S_IFBLK or (kind == stat.S_IFCHR and own)


def _mounted(directory: int, name: str, path: str) -> bool:
    """Whether something is mounted on `name`: a rename or unlink from here would undo the mount."""
    with _opened(name, _LOOK, directory, shown(path)) as fd:
        return _mount_id(fd) != _mount_id(directory)


def _mount_id(fd: int) -> int:
    """The mount that an open file is on (proc(5), fdinfo)."""
    with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("mnt_id:"))


def _nvidia_majors(proc_devices: str | None) -> frozenset[int]:
    """The character majors of all of the driver's modules: nvidia, nvidia-uvm, nvidia-caps, nvidia-nvswitch, ..."""
    if proc_devices is None:
        with open("/proc/devices", encoding="utf-8", errors="replace") as file:
            proc_devices = file.read()
    lines = [line.split() for line in proc_devices.partition("Block devices:")[0].splitlines()]
    named = {int(line[0]) for line in lines if len(line) == 2 and line[1].startswith("nvidia") and line[0].isdecimal()}
    return frozenset({MAJOR, *named})


def _described(found: os.stat_result) -> str:
    kind = stat.S_IFMT(found.st_mode)
    if kind in (stat.S_IFCHR, stat.S_IFBLK):
        mode = f"{stat.S_IMODE(found.st_mode):04o}"
        return f"{_numbers(kind, found.st_rdev)} with mode {mode} of {found.st_uid}:{found.st_gid}"
    return {stat.S_IFLNK: "a symbolic link", stat.S_IFDIR: "a directory", stat.S_IFIFO: "a FIFO"}.get(kind, "a file")


def _numbers(kind: int, device: int) -> str:
    if kind == stat.S_IFIFO:
        return "a FIFO"
    return f"{'b' if kind == stat.S_IFBLK else 'c'} {os.major(device)}:{os.minor(device)}"


def _failed(operation: str, name: str, error: OSError) -> RestoreError:
    return RestoreError(operation, name, error.strerror or str(error), "look at what the snapshot has in /dev")
