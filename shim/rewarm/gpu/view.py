"""Whether all processes of a container see its file systems alike.

Devices are put right in the /dev of the container's root alone, so whoever has another root or other mounts could have
other devices, of a snapshot's choice.
"""

from __future__ import annotations

import os

from rewarm import processes


def other(init: int, rootfs: str = "") -> str:
    """The first process of the tree below `init` (host pid) that has another root than `rootfs`, the bundle's, or than
    init if that is not given, or other mounts than init; "" if there is none. Raises OSError, also if init has ended.
    """
    root, mounts = os.stat(rootfs or f"/proc/{init}/root"), os.readlink(f"/proc/{init}/ns/mnt")
    for pid in processes.tree(init):
        try:
            own, there = os.stat(f"/proc/{pid}/root"), os.readlink(f"/proc/{pid}/ns/mnt")
        except OSError:
            if processes.start_time(pid) is None:
                continue  # it has ended, or is a zombie, which has neither
            raise
        if there != mounts or (own.st_dev, own.st_ino) != (root.st_dev, root.st_ino):
            return f"process {processes.namespace_pid(pid)} ({processes.command(pid)})"
    return ""
