"""What the storage under a file is like: in memory already, on the network, faster with O_DIRECT or without.

Nothing of it can be known beforehand. O_DIRECT wins on some NVMe drives and parallel file systems and is several times
slower than the page cache where the data is there already, so it is measured in the very restore that reads.
"""

from __future__ import annotations

import os
import threading
import time

PAGE = 4096

_NETWORK = (
    "9p afs beegfs beegfs_nodev ceph cifs coda davfs fuse fuseblk gfs gfs2 glusterfs gpfs lustre ncpfs nfs nfs4 "
    "ocfs2 orangefs panfs pvfs2 quobyte smb3 smbfs vboxsf virtiofs wekafs"
)
NETWORK = frozenset(_NETWORK.split())
"""File system types whose data comes over a network or from a process of unknown speed."""
IN_MEMORY = frozenset({"tmpfs", "ramfs", "devtmpfs"})

TRIAL = 64 << 20
"""Bytes read by each way before the two are compared: enough to fill every stream's queue, little of a restore."""
CLEARLY = 1.15
"""How many times faster O_DIRECT has to be. It leaves nothing in the page cache, so the next restore of the node would
be cold again, and a difference smaller than this is within what storage varies from second to second."""


def file_system(device: int) -> str:
    """The type ("ext4", "fuse.bindfs") of the mounted file system with this st_dev; "" if it cannot be found out.

    statfs(2) would give a number, but Python has no call for it. btrfs and overlay give files device numbers of their
    own, which no mount has; "" is then right too: neither is a network file system.
    """
    wanted = f"{os.major(device)}:{os.minor(device)}"
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape", newline="\n") as lines:
            for line in lines:
                before, separator, after = line.partition(" - ")
                if separator and before.split(" ")[2] == wanted:
                    return after.split(" ", 1)[0]
    except (OSError, IndexError):
        pass  # without /proc nothing is known, which is what "" says
    return ""


def is_network(kind: str) -> bool:
    """Whether a file system of this type is a network or FUSE one."""
    return kind in NETWORK or kind.partition(".")[0] == "fuse"


def resident(fd: int, offset: int) -> bool | None:
    """Whether the page at `offset` is in the page cache; None if nobody can say.

    Not asked by preadv2(2) with RWF_NOWAIT: that one starts the read (Linux 5.9 and newer), and a fast device has done
    it before the call looks, so that cold data seems warm.
    """
    from rewarm_native import page_cache  # a restore without chunks does without

    try:
        return page_cache.is_cached(fd, offset)
    except OSError:
        return None


def open_direct(fd: int) -> int:
    """A second descriptor of an open file that bypasses the page cache; -1 if the file system has none."""
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return -1  # buffered reads work everywhere; an error that matters shows there again


class Way:
    """By which way cold data of one storage is read: buffered until both were tried, then what was faster.

    The trial goes by turns of TRIAL bytes in which all streams use the same way, and each turn is timed as a whole:
    streams that used both at once would share the device unequally, since a buffered one has more requests in flight,
    and say nothing about what either reaches alone. Thread-safe.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._turn = 0
        self._began = 0.0
        self._bytes = 0
        self._rates = [0.0, 0.0]
        self.direct = False
        """What is used now."""
        self.settled = False

    def take(self) -> int:
        """The turn that a unit read now belongs to; to be given to `done`."""
        if not self.settled and not self._began:
            with self._lock:
                self._began = self._began or time.monotonic()
        return self._turn

    def done(self, turn: int, count: int) -> None:
        """`count` bytes were read from the storage in this turn."""
        if self.settled or turn != self._turn:
            return  # begun before the turn changed: it would count for the wrong way
        with self._lock:
            if turn != self._turn:
                return
            self._bytes += count
            if self._bytes < TRIAL:
                return
            now = time.monotonic()
            self._rates[int(self.direct)] = self._bytes / max(now - self._began, 1e-9)
            self._turn, self._bytes, self._began = turn + 1, 0, now
            if turn == 0:
                self.direct = True
            else:
                self.direct = self._rates[1] >= CLEARLY * self._rates[0]
                self.settled = True

    def refuse(self) -> None:
        """O_DIRECT does not work here."""
        with self._lock:
            self._turn += 1
            self.direct, self.settled = False, True
