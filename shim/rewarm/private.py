"""Directories that only root may look into, whatever umask the engine calls with."""

from __future__ import annotations

import errno
import os
import stat


def make(path: str) -> None:
    """Make `path` and what is missing above it, mode 0700 each (`os.makedirs` gives its mode to the last one alone).

    Raises OSError; PermissionError also for one that is there and that others than its user may write to:
    what root acts on lies in it.
    """
    missing = []
    while not os.path.isdir(path):
        missing.append(path)
        path = os.path.dirname(path)
    for one in reversed(missing):
        try:
            os.mkdir(one, 0o700)
            os.chmod(one, 0o700)
        except FileExistsError:
            continue  # another process was faster
    for one in missing[:1] or [path]:
        status = os.stat(one)
        if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise PermissionError(errno.EPERM, "others may write to it; remove it or give it to root alone", one)
