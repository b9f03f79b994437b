"""A /dev/shm that the engine mounts into the container: CRIU takes no part in it, and others use it, too.

A pod's has what its containers have there, and goes with the snapshot. The node's own (`hostIPC`, `--ipc=host`) has
what any program of the node has: of that a snapshot has only the files that the container's processes have open, and
a restore makes only those, where there are none.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from rewarm import layers
from rewarm.criu import opened, vet
from rewarm.errors import CaptureError, RestoreError
from rewarm.oci import spec, users
from rewarm.oci.record import Undo
from rewarm.oci.spec import Spec

if TYPE_CHECKING:
    from rewarm.criu.remaps import LinkRemap

FILE = "devshm-checkpoint.tar"
SHM = "/dev/shm"
_TRIES, _PAUSE = 20, 0.005


def is_nodes(directory: str) -> bool:
    """Whether it is the node's own, by whatever path: `hostPath` can name it by any."""
    try:
        return os.path.samefile(directory, SHM)
    except OSError:
        return False  # the node has none


def write(path: Path, checkpoint: Path, tree: str, links: Iterable[LinkRemap], pids: Iterable[int]) -> None:
    """Write what the snapshot has of `tree`, the node's path of a container's /dev/shm, to `path`; `links` are those
    that CRIU expects there. Raises CaptureError and LayerError."""
    extra = {link.name.removeprefix(SHM[1:] + "/"): link.source for link in links}
    if is_nodes(tree):
        _write_open(path, checkpoint, tree, extra, pids)
        return
    from rewarm_hooks.layer import LayerError

    for _ in range(_TRIES):
        try:
            # Other containers of the pod, which are not frozen, may make and delete files meanwhile.
            layers.write(path, tree, extra)
            return
        except LayerError:
            time.sleep(_PAUSE)
    layers.write(path, tree, extra)


def _write_open(path: Path, checkpoint: Path, tree: str, extra: dict[str, str], pids: Iterable[int]) -> None:
    """Of files that are open all names, read by the processes' own descriptors: by a name it may be another by now."""
    files = _open_files(pids, os.stat(tree).st_dev)
    for name in os.listdir(tree):
        with suppress(FileNotFoundError):  # it was another program's, which has removed it by now
            status = os.lstat(os.path.join(tree, name))
            if stat.S_ISREG(status.st_mode) and (status.st_dev, status.st_ino) in files:
                extra.setdefault(name, files[status.st_dev, status.st_ino])
    for name in map(os.fsdecode, sorted(opened.below(checkpoint, SHM))):
        if name not in extra:
            cause = f"it is open, and of the node's own {SHM} only files at its top are carried"
            raise CaptureError("carry file", f"{SHM}/{name}", cause, f"give the container a {SHM} of its own")
    nothing = path.with_name("nothing")
    nothing.mkdir()
    layers.write(path, nothing, extra)
    nothing.rmdir()


def _open_files(pids: Iterable[int], device: int) -> dict[tuple[int, int], str]:
    """Device and inode -> a path that opens it, of the regular files that processes have open or mapped."""
    found: dict[tuple[int, int], str] = {}
    for directory in (f"/proc/{pid}/{kind}" for pid in pids for kind in ("fd", "map_files")):
        try:
            entries = os.listdir(directory)
        except OSError:
            continue  # the process has ended
        for path in (f"{directory}/{entry}" for entry in entries):
            try:
                status = os.stat(path)
            except OSError:
                continue
            if status.st_dev == device and stat.S_ISREG(status.st_mode):
                found.setdefault((status.st_dev, status.st_ino), path)
    return found


def own(bundle_spec: Spec) -> str:
    """The node's path of a container's bind-mounted /dev/shm, "" if it has none that it may write to: what it can only
    read is not the container's, and a secret of the node perhaps."""
    mount = spec.bind_at(bundle_spec, SHM)
    return "" if mount is None or spec.is_read_only(mount) else str(mount.get("source", ""))


def change(bundle_spec: Spec, snapshot: str, directory: str) -> Undo:
    """Where a snapshot's goes, with what will undo it below `directory`. Raises RestoreError if it has no place."""
    shm = own(bundle_spec)
    if not shm:
        cause = "the snapshot carries one, this container has no such mount that it may write to"
        raise RestoreError(f"restore {SHM}", snapshot, cause, "capture a container that is mounted like this one")
    shm = os.path.realpath(shm)
    return Undo(shm, os.path.join(directory, "devshm.undo"), os.path.ismount(shm))


def apply(layer: str, checkpoint: str, there: Undo, bundle_spec: Spec) -> None:
    """Add what is in the layer file. Raises RestoreError, images.ImageError and OSError."""
    needed = opened.below(Path(checkpoint), SHM)
    limits = vet.Limits(bundle_spec)

    def may_own(uid: int, gid: int | None) -> bool:
        known = users.inside(bundle_spec, uid, users.owner(bundle_spec)[1] if gid is None else gid)
        return known is not None and limits.may_own(*known)

    rights = layers.Rights(may_own, users.of(bundle_spec).may_make, is_nodes(there.root))
    layers.apply(layer, there.root, there.layer, needed, rights)
