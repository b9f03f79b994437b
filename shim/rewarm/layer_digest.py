"""What an image's layer holds, as a digest of its metadata: equal on every node that unpacked the same layer.

No file is opened, no more than MOST names are looked at, and 64 times as many read where directories are made to be too
large: the layer is its author's. What depends on who unpacked it is left out: users (id-mapped mounts), the time
and mode of directories (a layer need not name them), and the time of empty files and links (Docker makes some for each
container).
"""

from __future__ import annotations

import os
import stat
from itertools import islice
from typing import NamedTuple

from blake3 import blake3

MOST = 4096
"""Names that are looked at: all of an application's layer as a rule, the upper levels of a distribution's."""
_TOO_LARGE = MOST // 64
"""What a directory costs that has more names than may still be looked at: which of them came would be chance."""
_LONGEST = 4000
"""Bytes of a path below which a directory is entered; PATH_MAX ends it anyway."""
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class LayerDigest(NamedTuple):
    """`names`: how many were looked at."""

    digest: str
    names: int


def layer_digest(layer: str) -> LayerDigest:
    """Of the layer in this directory, breadth first. Raises OSError."""
    state = blake3()
    left, seen = MOST, 0
    top = os.open(layer, _DIRECTORY)
    try:
        directories = [b"."]
        for directory in directories:  # grows meanwhile
            if left <= 0:
                break
            fd = os.open(directory, _DIRECTORY, dir_fd=top)
            try:
                with os.scandir(fd) as found:
                    names = [os.fsencode(entry.name) for entry in islice(found, left + 1)]
                if len(names) > left:
                    state.update(b"%b\0more\0" % directory)
                    left -= _TOO_LARGE
                    continue
                left -= len(names)
                seen += len(names)
                for name in sorted(names):
                    path = b"%b/%b" % (directory, name)
                    status = os.lstat(name, dir_fd=fd)
                    state.update(b"%b\0%b\0" % (path, _told(name, status, fd)))
                    if stat.S_ISDIR(status.st_mode) and len(path) < _LONGEST:
                        directories.append(path)
            finally:
                os.close(fd)
    finally:
        os.close(top)
    return LayerDigest(state.hexdigest(), seen)


def _told(name: bytes, status: os.stat_result, directory: int) -> bytes:
    """No name and no link's target holds a NUL: what is told of one entry can never be read as two."""
    mode = status.st_mode
    if stat.S_ISREG(mode):
        size = status.st_size
        return b"file %o %d %d" % (stat.S_IMODE(mode), size, status.st_mtime_ns // 10**9 if size else 0)
    if stat.S_ISLNK(mode):
        return b"link " + os.readlink(name, dir_fd=directory)
    return b"%o" % stat.S_IFMT(mode)  # a directory; of devices, overlayfs's whiteout is the one that images have
