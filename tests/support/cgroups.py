"""Control groups that tests make: their directories on every mounted hierarchy, and their removal."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from support.proc import kill, wait_for


def hierarchies() -> list[Path]:
    """Mount points of all cgroup hierarchies: each v1 controller, the hybrid's unified one, or the one v2 tree."""
    found = []
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _source, target, kind, *_rest = line.split(" ")
        if kind in ("cgroup", "cgroup2"):
            found.append(Path(target))
    return found


def directories(path: str) -> Iterator[Path]:
    """Directories of the cgroup `path` ("/a/b") and below it on all hierarchies, children before parents."""
    for hierarchy in hierarchies():
        # os.walk passes over what its owner removes meanwhile.
        for directory, _below, _files in os.walk(hierarchy / path.lstrip("/"), topdown=False):
            yield Path(directory)


def processes(path: str) -> set[int]:
    """Pids in the cgroup `path` and below it on any hierarchy."""
    found: set[int] = set()
    for directory in directories(path):
        with _removed_meanwhile():
            found |= {int(word) for word in (directory / "cgroup.procs").read_text().split()}
    return found


@contextlib.contextmanager
def _removed_meanwhile() -> Iterator[None]:
    """Passes over a cgroup that its owner removes: before open(2) (ENOENT), or before read(2) or write(2) (ENODEV)."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENODEV):
            raise


def remove(path: str, *, timeout: float = 10.0) -> None:
    """Kills what is left in the cgroup `path` and removes its directories on all hierarchies.

    Frozen members (v1 freezer, v2 cgroup.freeze) are thawed first: a frozen process does not die of SIGKILL.
    A cgroup that is not there is no error. Raises Timeout when a process does not die.
    """
    for directory in directories(path):
        for name, value in (("freezer.state", "THAWED"), ("cgroup.freeze", "0")):
            if (directory / name).exists():
                with _removed_meanwhile():
                    (directory / name).write_text(value)

    def empty() -> bool:
        left = processes(path)
        for pid in left:
            kill(pid)
        return not left

    wait_for(f"end of the processes in cgroup {path}", empty, timeout=timeout)

    def removed() -> bool:
        left = False
        for directory in list(directories(path)):
            try:
                directory.rmdir()
            except FileNotFoundError:
                continue  # its owner was faster
            except OSError:
                left = True  # a dying process holds it for a moment after it left cgroup.procs
        return not left

    wait_for(f"removal of cgroup {path}", removed, timeout=timeout)


def remove_empty(path: str) -> None:
    """Removes the directories of the cgroup `path` that hold neither processes nor children; others stay."""
    for hierarchy in hierarchies():
        with contextlib.suppress(OSError):  # absent, or still in use by its other children
            (hierarchy / path.lstrip("/")).rmdir()
