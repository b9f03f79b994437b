"""What killed restores and captures have left on this node: the next `create` undoes it, or `doctor --fix`."""

from __future__ import annotations

import os
import re
import time
from contextlib import suppress

from rewarm import processes
from rewarm.errors import OciError, RewarmError
from rewarm.oci import record, runc
from rewarm.recover import forget, guards, left_over, names, recover, remove_scratch

_LONGEST = 5.0
"""Seconds after which nothing more is begun in passing."""
_AGAIN = 60.0
"""Seconds after which what could not be undone is tried again in passing."""
_TRIED = "tried"


def left_overs(state_dir: str, binary: str, *, in_passing: bool = False) -> list[str]:
    """Undo every left-over restore on this node, and forget containers that runc no longer knows.

    Returns a line for each restore that could not be undone. What another process is at, it is left to. `in_passing`:
    somebody waits for something else, and each of them would wait for what hangs, a process in state D or a share.
    """
    _forget_captures(os.path.join(state_dir, "captures"))
    problems = []
    base = os.path.join(state_dir, "containers")
    end = time.monotonic() + _LONGEST
    for root in names(base):
        for name in names(os.path.join(base, root)):
            path = os.path.join(base, root, name)
            try:
                if "~" in name:
                    remove_scratch(path)
                elif in_passing and (time.monotonic() > end or _tried(path)):
                    continue
                elif not recover(path, binary, wait=False):
                    _forget_dead(path)
            except (RewarmError, OSError) as error:
                problems.append(str(error))
    return problems


def _tried(path: str) -> bool:
    """Whether another one has begun to undo it a moment ago, and it is still there; else this one does."""
    try:
        if left_over(path) is None:
            return False
    except OciError:
        return False  # one that cannot be read takes no time, and is named each time
    mark = os.path.join(path, _TRIED)
    with suppress(FileNotFoundError):
        if abs(time.time() - os.stat(mark).st_mtime) < _AGAIN:
            return True
    # It is undone by now, or the state directory is full, which undoing it may mend.
    with suppress(OSError), open(mark, "wb"):
        os.utime(mark)
    return False


def _forget_captures(base: str) -> None:
    """Locks that captures have left which were killed, of containers that are no more."""
    for name in names(base):
        found = re.fullmatch(r"([0-9]{1,10})-([0-9]{1,20})~lock", name)
        if found and processes.start_time(int(found[1])) != int(found[2]):
            with suppress(OSError):  # one that stays is no reason for a cold start
                os.unlink(os.path.join(base, name))


def _forget_dead(path: str) -> None:
    """The directory of a container that ended and was deleted behind rewarm's back, or was never made by runc."""
    kept = record.load(path)
    gone = kept is not None and not kept.owner_lives() and not runc.exists(kept.root, kept.id)
    if gone and not guards(path):
        forget(path)
