"""Opening a file that lies where a container may put others: it is looked at before it is opened.

Opening a device does things, with root's rights and whatever the container's device cgroup says (a watchdog reboots the
node, a tape rewinds), and a container makes one by mknod on any file system of its own that is not mounted nodev.
"""

from __future__ import annotations

import errno
import os
import stat

_LOOK = os.O_PATH | os.O_CLOEXEC
_ALWAYS = os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC  # without waiting: somebody may have a lease on it


def open_regular(
    name: bytes | str,
    access: int,
    directory_fd: int | None = None,
    *,
    known: os.stat_result | None = None,
    follow: bool = False,
) -> int:
    """A descriptor of a regular file, `known` and no other if that is given. `access`: os.O_RDONLY or os.O_RDWR;
    `follow`: also links, as those of /proc are. Raises OSError.

    It is the only one that is left open: kernels before 5.3 give no lease on a file with a second one.
    """
    seen = os.open(name, _LOOK | (0 if follow else os.O_NOFOLLOW), dir_fd=directory_fd)
    try:
        status = os.fstat(seen)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is no regular file")
        if known is not None and (status.st_dev, status.st_ino) != (known.st_dev, known.st_ino):
            raise OSError(errno.ESTALE, "it is another file by now")
        return os.open(f"/proc/self/fd/{seen}", access | _ALWAYS)
    finally:
        os.close(seen)
