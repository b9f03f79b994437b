"""A kernel as the driver has compiled it, kept on this node for the next restore: while the driver compiles, copies of
all threads stand still.

Not the driver's own cache: who is killed while he writes there may leave what the next one stumbles over. A file here
comes into being as a whole, and its bytes are compared with their digest before the driver sees them.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress

from blake3 import blake3

from rewarm import private

_DIGEST = 32
_MOST = 4 << 20
"""Bytes of a file; a kernel has some 20 KB."""


def place(state_dir: str, version: int, capability: tuple[int, int], text: str) -> str:
    """Where it is kept: by what it was made of, by which driver (its CUDA version) and for which kind of GPU (compute
    capability)."""
    name = f"{blake3(text.encode()).hexdigest()[:32]}-{version}-{capability[0]}.{capability[1]}"
    return os.path.join(state_dir, "kernels", name)


def find(path: str) -> bytes | None:
    """The kernel; None if none is kept, if it is damaged, or if others than this user can have made it."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        kind = os.fstat(fd)
        if not (stat.S_ISREG(kind.st_mode) and _is_private(kind) and _is_private(os.stat(os.path.dirname(path)))):
            return None
        data = os.pread(fd, _MOST, 0)
    except OSError:
        return None
    finally:
        os.close(fd)
    code = data[_DIGEST:]
    return code if code and blake3(code).digest() == data[:_DIGEST] else None


def _is_private(kind: os.stat_result) -> bool:
    return kind.st_uid == os.geteuid() and not kind.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def keep(path: str, code: bytes) -> None:
    """Keep it, if that is possible: one that is damaged makes room."""
    with suppress(OSError):
        private.make(os.path.dirname(path))
        # Without a name until it is whole: nothing is left of one that is killed.
        with open(os.open(os.path.dirname(path), os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600), "wb") as file:
            file.write(blake3(code).digest() + code)
            file.flush()
            if find(path) is None:
                forget(path)
            # With a descriptor, which an absolute path does not need, it is linkat(2): link(2) follows no symlink.
            os.link(f"/proc/self/fd/{file.fileno()}", path, src_dir_fd=file.fileno(), follow_symlinks=True)


def forget(path: str) -> None:
    """Have it compiled anew the next time."""
    with suppress(OSError):
        os.unlink(path)
