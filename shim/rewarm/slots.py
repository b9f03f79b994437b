"""How many restores of this node may read ahead at once: each counts on a share of the memory that is free then, and
pods that are created together all see the same."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress

from rewarm import private

COUNT = 16


def take(state_dir: str) -> bool:
    """Take one of COUNT slots until this process ends; False if all are taken, or none can be had."""
    directory = os.path.join(state_dir, "read-ahead")
    try:
        private.make(directory)
        for number in range(COUNT):
            fd = os.open(f"{directory}/{number}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            with suppress(BlockingIOError):
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True  # the descriptor stays open: its end is the process's
            os.close(fd)
    except OSError:
        pass
    return False
