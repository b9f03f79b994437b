"""A volume of the pod, at a fixed place on the node: restores run in the node's runtime, which sees no pod's volumes.

The kubelet has mounted the volume on the node already, below the pod's own directory. What it mounted is bound to a
place that outlives the pod. So whatever Kubernetes can mount can be the store: NFS, or a PersistentVolumeClaim of any
driver that mounts file systems.

Standard library only.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from daemonset_host import Host, Problem, mounts


class SharedStore:
    """`volume` is the pod's mount point, `target` the node's; `own` is the pod's list of mounts."""

    def __init__(self, host: Host, volume: Path, target: str, own: Path = Path("/proc/self/mountinfo")) -> None:
        self.host = host
        self.volume = str(volume)
        self.target = target
        self.own = own

    def provide(self) -> None:
        """Binds the volume there, unless it is. Raises Problem, also for another mount in its place."""
        wanted = _at(self.volume, mounts(self.own))
        if wanted is None:
            raise Problem(f"mount the store: the pod has no volume at {self.volume}; give it one")
        found = _at(self.target, self.host.mounts())
        if found == wanted:
            return
        if found is not None:
            raise Problem(
                f"mount the store: {self.target} of the node has another mount; run there: umount {self.target}"
            )
        source = self._source(*wanted)
        script = 'mkdir -p "$2" && mount --bind "$1" "$2"'
        status, _ = self.host.run("sh", "-c", script, "sh", source, self.target, timeout=60)
        if status != 0 or _at(self.target, self.host.mounts()) != wanted:
            raise Problem(
                f"mount the store: mount --bind {source} {self.target}: exit status {status}, or another mount"
            )

    def remove(self) -> None:
        """Unmounts it, if it is the pod's volume. Raises Problem."""
        found = _at(self.target, self.host.mounts())
        if found is not None and found == _at(self.volume, mounts(self.own)):
            status, _ = self.host.run("umount", self.target, timeout=60)
            if status != 0:
                raise Problem(f"unmount the store: umount {self.target}: exit status {status}; tried again later")

    def _source(self, device: str, directory: str) -> str:
        """Where the node has it: as a mount, or below one (a volume that is a directory of the node's own disk)."""
        found = ("", "")
        for each, root, point in self.host.mounts():
            if each == device and len(root) > len(found[0]) and f"{directory}/".startswith(f"{root.rstrip('/')}/"):
                found = root, point
        if not found[0]:
            raise Problem(f"mount the store: the node itself has no mount of what the pod has at {self.volume}")
        return found[1].rstrip("/") + "/" + directory[len(found[0]) :].lstrip("/")


def _at(place: str, all_mounts: Iterable[tuple[str, str, str]]) -> tuple[str, str] | None:
    """Device and root of what is mounted there, on top of all else that is."""
    found = None
    for device, root, point in all_mounts:
        if point == place:
            found = device, root
    return found
