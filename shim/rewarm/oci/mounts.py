"""Mounts of this mount namespace: which lie below a directory, and how to take them away.

`runc restore` bind-mounts the rootfs at `<runc root>/<id>/criu-root` and the spec's bind mounts below the
rootfs while it runs, and CRIU mounts every cgroup hierarchy below its work directory. A killed runc or CRIU
leaves them there. Whoever then removes the directories around them, as `runc delete` does, removes the
content of the container's rootfs and volumes (seen with runc 1.1.5). So mounts go first.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator

from rewarm.errors import OciError
from rewarm.oci.spec import OWN_DESTINATIONS, Spec, mounts, rootfs

_DETACH, _NO_FOLLOW = 2, 8  # umount2(2)
_ESCAPED = re.compile(rb"\\([0-7]{3})")
_ROUNDS = 8
_MOST_LINKS = 40
"""As the kernel's own limit (ELOOP)."""


def below(directory: str) -> list[str]:
    """Mount points strictly below `directory` (a path without symbolic links), the newest first."""
    prefix = directory.rstrip("/") + "/"
    with open("/proc/self/mountinfo", "rb") as file:
        targets = [os.fsdecode(_ESCAPED.sub(_unescape, line.split(b" ", 5)[4])) for line in file]
    # A mount whose mount point was removed in another namespace cannot be named any more.
    return [t for t in reversed(targets) if t.startswith(prefix) and not t.endswith("//deleted")]


def unmount_below(directory: str, keep: Collection[str] = ()) -> None:
    """Detach every mount strictly below `directory` but those at `keep`. Raises OciError if one stays."""
    directory = os.path.realpath(directory)
    _detach(lambda: [target for target in below(directory) if target not in keep])


def unmount(directory: str) -> None:
    """Detach the mount at `directory`, a real path, and all below it. Raises OciError if one stays."""
    parent, inside = os.path.dirname(directory), f"{directory}/"
    _detach(lambda: [target for target in below(parent) if f"{target}/".startswith(inside)])


def _detach(mounted: Callable[[], list[str]]) -> None:
    left = mounted()
    if not left:
        return
    import ctypes  # a restore that goes well does without

    libc = ctypes.CDLL(None, use_errno=True)
    cause = ""
    for _ in range(_ROUNDS):  # several mounts may lie on one another
        for target in left:
            # Detached, not unmounted: a process in another mount namespace may hold it busy for a moment.
            if libc.umount2(os.fsencode(target), _DETACH | _NO_FOLLOW) != 0:
                cause = os.strerror(ctypes.get_errno())
        left = mounted()
        if not left:
            return
    raise OciError("unmount", left[0], cause or "it is still mounted", f"run `umount -l {left[0]}`")


def _unescape(found: re.Match[bytes]) -> bytes:
    return bytes([int(found[1], 8)])


def destinations(bundle: str, spec: Spec) -> set[str]:
    """Where the mounts of a spec, and rewarm's own, come to lie in the container."""
    wanted = [*(destination for destination, _ in mounts(spec)), *OWN_DESTINATIONS]
    root = rootfs(bundle, spec)
    return {resolved(root, destination) for destination in wanted}


def resolved(root: str, destination: str) -> str:
    """Where a mount point lies in the container: runc follows symbolic links on its way, within the rootfs (`/var/run`
    is one in most images, and Kubernetes mounts its tokens below it). "" where they lead in a circle."""
    found = "/"
    left = _names(destination)
    links = 0
    while left:
        name = left.pop()
        if name == "..":
            found = os.path.dirname(found)
            continue
        path = os.path.join(found, name)
        try:
            target = os.readlink(root + path)
        except OSError:
            found = path
            continue
        links += 1
        if links > _MOST_LINKS:
            return ""
        left += _names(target)
        found = "/" if target.startswith("/") else found
    return found


def _names(path: str) -> list[str]:
    """The last one first."""
    return [name for name in reversed(path.split("/")) if name not in ("", ".")]


def new_places(root: str, destinations: Iterable[str]) -> Iterator[str]:
    """Everything on the way to a mount point, and that itself, that runc will have to make in the rootfs."""
    for destination in destinations:
        path = root
        for name in os.path.normpath("/" + destination).split("/")[1:]:
            path = os.path.join(path, name)
            if os.path.islink(path):
                break  # runc follows it inside the rootfs; what is behind it is left to stay
            if not os.path.lexists(path):
                yield path
