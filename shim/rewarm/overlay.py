"""The overlay that is a container's root filesystem: its upper directory, which has the changes, and its lower ones."""

from __future__ import annotations

import os
import re
from pathlib import Path

from rewarm.errors import CaptureError, RestoreError

_ESCAPE = re.compile(r"\\([0-7]{3})")
_LOWER = re.compile(r"(?:[^:\\]|\\.)+", re.DOTALL)


def upper_directory(pid: int, rootfs: str, read_only: bool) -> Path | None:
    """The upper directory of the overlay that is `/` for `pid`, a container's init; None for a root that cannot change.

    Read from the process's own /proc/PID/mountinfo, so that it is right whatever namespace the engine
    mounts in; the path itself is the node's. With CAP_SYS_ADMIN the container can make any overlay its root, and
    so name any path: only the one that the engine has mounted on `rootfs` counts. `read_only` is the spec's
    `root.readonly`. Raises CaptureError for any other kind of root, whose changes cannot be told from its image.
    """
    kind, device, _, options = _mount(pid, "/")
    if kind == "overlay":
        try:
            engines = os.stat(rootfs).st_dev
        except OSError as error:
            cause = error.strerror or str(error)
            raise CaptureError("find rootfs changes", rootfs, cause, "capture it while it runs") from error
        if device != engines:
            raise CaptureError(
                "find rootfs changes",
                f"process {pid}",
                f"its root is not the overlay that its engine has mounted on {rootfs}",
                "run it without mounts that become its root",
            )
        upper = _upper(options)
        if not upper:
            return None  # only lower directories: nothing can be written
        path = Path(upper)
        if not path.is_absolute() or not path.is_dir():
            raise CaptureError(
                "find rootfs changes",
                upper,
                "the overlay's upper directory is not there",
                "look whether the engine has removed it",
            )
        return path
    if read_only:
        return None
    raise CaptureError(
        "find rootfs changes",
        f"process {pid}",
        f"its root is {kind or 'unknown'}, not an overlay",
        "use an overlay snapshotter, or make the root file system read-only",
    )


def upper_of_mount(rootfs: str) -> str | None:
    """The upper directory of the overlay that is mounted on `rootfs`, as this process sees it; None where that is no
    overlay, a part of one (another's root, for an engine in a container), or one that cannot be written to. Raises
    RestoreError and OSError."""
    kind, device, part, options = _mount("self", rootfs)
    upper = _upper(options) if kind == "overlay" and part == "/" else ""
    if upper and os.stat(rootfs).st_dev != device:
        cause, advice = "the overlay there is hidden by another mount", "take that mount away"
        raise RestoreError("find the container's own changes in", rootfs, cause, advice)
    # Docker and Podman name it relative to a directory of theirs when it has very many layers.
    if upper and not (upper.startswith("/") and os.path.isdir(upper)):
        cause, advice = (
            f"no upper directory {upper!r} is here",
            "make a new container; with fewer layers if it stays so",
        )
        raise RestoreError("find the container's own changes in", rootfs, cause, advice)
    return upper or None


def lower_directories(pid: int | str, target: str) -> list[str]:
    """The lower directories of the overlay that is at `target` for process `pid`, topmost first; none for other mounts.

    Without those that hold data only: they are of no image. Raises OSError.
    """
    kind, _, _, options = _mount(pid, target)
    found = [option.partition("=")[::2] for option in options] if kind == "overlay" else []
    layers = [value for key, value in found if key == "lowerdir+"]
    for key, value in found:
        if key == "lowerdir":
            layers += [re.sub(r"\\(.)", r"\1", one) for one in _LOWER.findall(value.partition("::")[0])]
    # containerd names many layers relative to the directory that has all snapshots (mount_linux.go,
    # compactLowerdirOption), the upper one among them.
    snapshots = os.path.dirname(os.path.dirname(dict(found).get("upperdir", "")))
    if not snapshots.startswith("/") and not all(map(os.path.isabs, layers)):
        return []
    return [os.path.join(snapshots, layer) for layer in layers]


def _upper(options: list[str]) -> str:
    """The option `upperdir`; "" if there is none. A comma or backslash in it may be shown as the mount(2) option was,
    with a backslash before it (Linux 6.18)."""
    upper = dict(option.partition("=")[::2] for option in options).get("upperdir", "")
    return upper if os.path.isdir(upper) else re.sub(r"\\(.)", r"\1", upper)


def _mount(pid: int | str, target: str) -> tuple[str, int, str, list[str]]:
    """File system type, device number, root and superblock options of the topmost mount at `target`, of
    proc_pid_mountinfo(5). All of them are of one line: the process may change its mounts meanwhile."""
    found: tuple[str, int, str, list[str]] = ("", 0, "", [])
    with open(f"/proc/{pid}/mountinfo", encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        for line in file:
            fields, _, rest = line.rstrip("\n").partition(" - ")
            _, _, device, part, place, *_ = fields.split(" ")
            if _unescape(place) == target:
                kind, _, options = rest.split(" ", 2)
                major, _, minor = device.partition(":")
                device_number = os.makedev(int(major), int(minor))
                found = kind, device_number, _unescape(part), [_unescape(option) for option in _split(options)]
    return found


def _split(options: str) -> list[str]:
    # overlayfs writes a comma inside a path as `\\,` and the kernel escapes the backslash.
    return options.replace("\\134,", "\\054").split(",")


def _unescape(text: str) -> str:
    return _ESCAPE.sub(lambda found: chr(int(found[1], 8)), text)
