"""A volume of the pod, at a fixed place on the node: restores run in the node's runtime, which sees no pod's volumes.

The kubelet has mounted the volume on the node already, below the pod's own directory. What it mounted is bound to a
place that outlives the pod. So whatever Kubernetes can mount can be the store: NFS, or a PersistentVolumeClaim of any
driver that mounts file systems.

Standard library only.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from daemonset_host import Host, Mount, Problem, mounts

NOTE = "/run/rewarm-store"
"""On the node: the mount that was made. Another volume, or the same one mounted anew by its driver, has another device:
without the note the old mount would seem to be somebody's. It ends with the mounts when the node is booted."""


class SharedStore:
    """`volume` is the pod's mount point, `target` the node's; `own` is the pod's list of mounts."""

    def __init__(
        self, host: Host, volume: Path, target: str, own: Path = Path("/proc/self/mountinfo"), note: str = NOTE
    ) -> None:
        self.host = host
        self.note = note
        self.volume = str(volume)
        self.target = target
        self.own = own

    def provide(self) -> None:
        """Binds the volume there, unless it is, in place of one that was bound before. Raises Problem, also for another
        mount in its place."""
        wanted = _at(self.volume, mounts(self.own))
        if wanted is None:
            raise Problem(f"mount the store: the pod has no volume at {self.volume}; give it one")
        found = _at(self.target, self.host.mounts())
        while found is not None and not _same(found, wanted):
            if not self._noted(found):
                raise Problem(
                    f"mount the store: {self.target} of the node has another mount; run there: umount {self.target}"
                )
            self._unmount("--lazy")  # its server may be gone
            found = _at(self.target, self.host.mounts())
        if found is None:
            source = self._source(wanted)
            script = 'mkdir -p "$2" && mount --bind "$1" "$2"'
            status, _ = self.host.run("sh", "-c", script, "sh", source, self.target, timeout=60)
            found = _at(self.target, self.host.mounts())
            if status != 0 or found is None or not _same(found, wanted):
                raise Problem(
                    f"mount the store: mount --bind {source} {self.target}: exit status {status}, or another mount"
                )
        if not self._noted(found):
            self.host.write(self.note, _words(found))

    def remove(self) -> None:
        """Unmounts it, if it is the pod's volume or was bound before. Raises Problem."""
        found = _at(self.target, self.host.mounts())
        volume = _at(self.volume, mounts(self.own))
        if found is not None and (self._noted(found) or (volume is not None and _same(found, volume))):
            self._unmount()
        self.host.run("rm", "-f", self.note, timeout=30)

    def _noted(self, found: Mount) -> bool:
        return self.host.read(self.note) == _words(found)

    def _unmount(self, *options: str) -> None:
        status, _ = self.host.run("umount", *options, self.target, timeout=60)
        if status != 0:
            raise Problem(f"unmount the store: umount {self.target}: exit status {status}; tried again later")

    def _source(self, wanted: Mount) -> str:
        """Where the node has it: as a mount, or below one (a volume that is a directory of the node's own disk)."""
        found = ("", "")
        directory = wanted.root
        for one in self.host.mounts():
            above = f"{directory}/".startswith(f"{one.root.rstrip('/')}/")
            if one.device == wanted.device and len(one.root) > len(found[0]) and above:
                found = one.root, one.point
        if not found[0]:
            raise Problem(f"mount the store: the node itself has no mount of what the pod has at {self.volume}")
        return found[1].rstrip("/") + "/" + directory[len(found[0]) :].lstrip("/")


def _at(place: str, all_mounts: Iterable[Mount]) -> Mount | None:
    """What is mounted there, on top of all else that is."""
    found = None
    for one in all_mounts:
        if one.point == place:
            found = one
    return found


def _same(one: Mount, other: Mount) -> bool:
    """Of the pod's mounts and the node's, which have other numbers and places."""
    return (one.device, one.root) == (other.device, other.root)


def _words(mount: Mount) -> bytes:
    return f"{mount.number} {mount.device} {mount.root}\n".encode(errors="surrogateescape")
