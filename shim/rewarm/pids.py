"""The process ids of a container in a pid namespace that it shares (`shareProcessNamespace`).

A restore needs the very numbers that the source had. The containers of a pod that start first have the lowest, now a
few more, now a few less. So one that may be captured begins higher up, at a place that its snapshot's name chooses, and
what it had is free in another pod.
"""

from __future__ import annotations

import zlib

from rewarm import processes
from rewarm.oci.spec import Spec, joined

_FIRST, _ROOM, _PLACES = 2048, 1024, 28
"""All below 32768, beyond which a node may have none (kernel.pid_max)."""


def begin(spec: Spec, snapshot: str) -> None:
    """Choose the place of a container that is about to start from nothing. Nothing happens where it shares none, or the
    node's. Raises OSError."""
    path = joined(spec, "pid")
    if not path or processes.is_own_namespace({"type": "pid", "path": path}):
        return
    from rewarm_native import process

    process.set_last_pid(path, first(snapshot) - 1)


def first(snapshot: str) -> int:
    """The lowest number of the place."""
    return _FIRST + zlib.crc32(snapshot.encode()) % _PLACES * _ROOM
