"""Overlay mounts and pictures of directory trees, for the tests of the rootfs diff. Needs root."""

from __future__ import annotations

import ctypes
import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)
_MNT_DETACH = 2

Picture = dict[bytes, tuple[object, ...]]


def mount(source: str, target: Path, kind: str, options: str) -> None:
    """mount(2); raises OSError."""
    if _libc.mount(source.encode(), os.fsencode(target), kind.encode(), 0, options.encode()) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"mount {kind} on {target}: {os.strerror(code)}")


def unmount(target: Path) -> None:
    """umount2(2) with MNT_DETACH; raises OSError."""
    if _libc.umount2(os.fsencode(target), _MNT_DETACH) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"umount {target}: {os.strerror(code)}")


@dataclass(frozen=True)
class Overlay:
    """One overlay mount: the merged view and its upper directory."""

    merged: Path
    upper: Path


class Overlays:
    """Makes overlay mounts in `directory`, over a lower directory `lower` that they share; `close` unmounts them."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.lower = directory / "lower"
        self.lower.mkdir()
        self._mounted: list[Path] = []

    def new(self, options: str = "") -> Overlay:
        base = self._directory / f"overlay-{len(self._mounted)}"
        overlay = Overlay(base / "merged", base / "upper")
        for path in (overlay.merged, overlay.upper, base / "work"):
            path.mkdir(parents=True)
        # an upper directory's own metadata is the root's: an engine gives it that of the layer below
        status = self.lower.stat()
        overlay.upper.chmod(stat.S_IMODE(status.st_mode))
        os.chown(overlay.upper, status.st_uid, status.st_gid)
        os.utime(overlay.upper, ns=(status.st_mtime_ns, status.st_mtime_ns))
        layers = f"lowerdir={self.lower},upperdir={overlay.upper},workdir={base / 'work'}"
        mount("overlay", overlay.merged, "overlay", layers + options)
        self._mounted.append(overlay.merged)
        return overlay

    def close(self) -> None:
        while self._mounted:
            unmount(self._mounted.pop())


def picture(root: Path) -> Picture:
    """All that a layer is to keep of a tree, by path: kind, metadata, content, links, and which names are one file."""
    found: Picture = {}
    names: dict[tuple[int, int], list[bytes]] = {}
    base = os.fsencode(root)
    pending = [b""]
    while pending:
        path = pending.pop()
        full = base + b"/" + path
        status = os.lstat(full)
        mode = status.st_mode
        content: object = None
        if stat.S_ISDIR(mode):
            pending += [path + b"/" + name if path else name for name in os.listdir(full)]
        elif stat.S_ISREG(mode):
            content = (status.st_size, _digest(full))
            if status.st_nlink > 1:
                names.setdefault((status.st_dev, status.st_ino), []).append(path)
        elif stat.S_ISLNK(mode):
            content = os.readlink(full)
        else:
            content = status.st_rdev
        attributes = tuple(
            (name, os.getxattr(full, name, follow_symlinks=False)) for name in os.listxattr(full, follow_symlinks=False)
        )
        found[path] = (oct(mode), status.st_uid, status.st_gid, status.st_mtime_ns, content, tuple(sorted(attributes)))
    for group in names.values():
        for path in group:
            found[path] = (*found[path], tuple(sorted(group)))
    return found


def difference(left: Picture, right: Picture) -> dict[bytes, tuple[object, object]]:
    """What differs: path -> (left, right); {} for equal trees, and readable where an assertion prints it."""
    return {
        path: (left.get(path), right.get(path))
        for path in sorted(left.keys() | right.keys())
        if left.get(path) != right.get(path)
    }


def _digest(path: bytes) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
