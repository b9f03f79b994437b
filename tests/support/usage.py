"""What a container's memory costs: its memory cgroup's own figures."""

from __future__ import annotations

from dataclasses import dataclass

from support import cgroups
from support.bundle import Bundle


@dataclass(frozen=True)
class Usage:
    """Bytes charged to a memory cgroup: private anonymous memory, and shared memory (tmpfs, memfd, System V)."""

    anonymous: int
    shared: int

    @property
    def total(self) -> int:
        return self.anonymous + self.shared


def of_cgroup(bundle: Bundle) -> Usage:
    """Of the container's memory cgroup, without the page cache of files. Raises FileNotFoundError."""
    for hierarchy in cgroups.hierarchies():
        statistics = hierarchy / bundle.cgroup.lstrip("/") / "memory.stat"
        if statistics.exists():
            found = {key: int(value) for key, value in map(str.split, statistics.read_text().splitlines())}
            # v2 calls it anon; v1 counts the cgroups below only in total_….
            return Usage(
                found["anon"] if "anon" in found else found["total_rss"], found.get("total_shmem", found["shmem"])
            )
    raise FileNotFoundError(f"no memory cgroup of {bundle.cgroup}")


def peak(bundle: Bundle) -> int:
    """The most bytes that were ever charged to the container's memory cgroup, page cache included."""
    for hierarchy in cgroups.hierarchies():
        for name in ("memory.peak", "memory.max_usage_in_bytes"):
            file = hierarchy / bundle.cgroup.lstrip("/") / name
            if file.exists():
                return int(file.read_text())
    raise FileNotFoundError(f"no memory cgroup of {bundle.cgroup}")
