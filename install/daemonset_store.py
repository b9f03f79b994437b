"""A volume of the pod, at a fixed place on the node: restores run in the node's runtime, which sees no pod's volumes.

The kubelet has mounted the volume on the node already, below the pod's own directory. What it mounted is bound to a
place that outlives the pod. So whatever Kubernetes can mount can be the store: NFS, or a PersistentVolumeClaim of any
driver that mounts file systems.

Standard library only.
"""

from __future__ import annotations

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
        wanted = [(device, root) for device, root, point in mounts(self.own) if point == self.volume]
        if not wanted:
            raise Problem(f"mount the store: the pod has no volume at {self.volume}; give it one")
        found = self._mounted()
        if found == wanted[-1]:
            return
        if found is not None:
            raise Problem(
                f"mount the store: {self.target} of the node has another mount; run there: umount {self.target}"
            )
        sources = [point for device, root, point in self.host.mounts() if (device, root) == wanted[-1]]
        if not sources:
            raise Problem(f"mount the store: the node itself has no mount of what the pod has at {self.volume}")
        script = 'mkdir -p "$2" && mount --bind "$1" "$2"'
        status, _ = self.host.run("sh", "-c", script, "sh", sources[0], self.target, timeout=60)
        if status != 0 or self._mounted() != wanted[-1]:
            raise Problem(f"mount the store: mount --bind {sources[0]} {self.target}: exit status {status}")

    def remove(self) -> None:
        """Unmounts it, if it is mounted. Raises Problem."""
        if self._mounted() is not None:
            status, _ = self.host.run("umount", self.target, timeout=60)
            if status != 0:
                raise Problem(f"unmount the store: umount {self.target}: exit status {status}; tried again later")

    def _mounted(self) -> tuple[str, str] | None:
        return next(((d, r) for d, r, point in reversed(list(self.host.mounts())) if point == self.target), None)
