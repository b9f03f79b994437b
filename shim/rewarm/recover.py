"""Puts right what a restore left behind: after a failure, after a deadline, and after rewarm was killed.

There is one way back, and it goes by the record, so that it is the same whoever walks it: the failing
`create` itself, the guard that outlived it, `delete`, or the next `create`.

    python -m rewarm.recover CONTAINER_DIRECTORY      (run by the guard)
"""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rewarm import layers, processes, settings
from rewarm.errors import OciError, RestoreError, RewarmError
from rewarm.oci import record, runc, spec
from rewarm.oci.record import Record
from rewarm.settings import Settings


@contextmanager
def locked(path: str) -> Iterator[None]:
    """One at a time per container directory: the guard and the next `create` may come at once."""
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    fd = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def forget(path: str) -> None:
    """Remove a container directory and its lock."""
    record.remove(path)
    if os.path.lexists(f"{path}.lock"):
        os.unlink(f"{path}.lock")


def undo(kept: Record, low_level: runc.Runc) -> None:
    """Undo a restore: kill its processes, delete it from runc, put the file trees and config.json back.

    Every step is tried even when one before it failed; the first failure is raised at the end. Doing it
    twice does no harm.
    """
    failures: list[RewarmError] = []
    for step in (_kill, _restore_trees, _restore_config):
        try:
            step(kept, low_level)
        except RewarmError as error:
            failures.append(error)
        except OSError as error:
            failures.append(RestoreError("undo restore", kept.id, str(error)))
    if failures:
        raise failures[0]


def _kill(kept: Record, low_level: runc.Runc) -> None:
    if runc.exists(kept.root, kept.id):
        try:
            cgroups = runc.load(kept.root, kept.id).cgroup_paths
        except OciError:
            cgroups = ()  # runc was killed before it wrote its state; `delete --force` removes the empty directory
        low_level.remove(kept.id)
        if not processes.kill_all(processes.in_cgroups(cgroups)):
            raise RestoreError("undo restore", kept.id, "processes do not die", "look for D state in `ps`")
    if kept.pid_file and os.path.exists(kept.pid_file):
        os.unlink(kept.pid_file)


def _restore_trees(kept: Record, low_level: runc.Runc) -> None:
    for change in reversed(kept.undo):
        if not os.path.exists(change.layer) or not os.path.isdir(change.root):
            continue  # nothing was changed yet, or the engine has removed the tree already
        layers.undo(change.root, change.layer)
        os.unlink(change.layer)


def _restore_config(kept: Record, low_level: runc.Runc) -> None:
    if kept.config_backup and os.path.exists(kept.config_backup) and os.path.isdir(kept.bundle):
        with open(kept.config_backup, "rb") as file:
            data = file.read()
        spec.write_atomically(os.path.join(kept.bundle, "config.json"), data)


def left_over(path: str) -> Record | None:
    """The record of a restore whose rewarm is no more; None for everything else."""
    kept = record.load(path)
    return kept if kept is not None and kept.phase == record.RESTORING and not kept.owner_lives() else None


def sweep(state_dir: str, binary: str) -> list[str]:
    """Undo every left-over restore on this node; returns a line for each that could not be undone."""
    problems = []
    base = os.path.join(state_dir, "containers")
    for root in _names(base):
        for name in _names(os.path.join(base, root)):
            path = os.path.join(base, root, name)
            if not os.path.isdir(path):
                continue
            try:
                recover(path, binary)
            except (RewarmError, OSError) as error:
                problems.append(str(error))
    return problems


def recover(path: str, binary: str) -> bool:
    """Undo one left-over restore and remove its directory; False when there is none."""
    if left_over(path) is None:
        return False
    with locked(path):
        kept = left_over(path)
        if kept is None:
            return False  # somebody else was faster
        undo(kept, runc.Runc(binary, kept.root, kept.systemd_cgroup))
        forget(path)
    return True


def _names(directory: str) -> list[str]:
    try:
        return sorted(os.listdir(directory))
    except FileNotFoundError:
        return []


def main(words: list[str]) -> int:
    try:
        configured = settings.load()
    except RewarmError:
        configured = Settings()
    try:
        recover(words[0], runc.find(configured))
    except (RewarmError, OSError) as error:
        # The guard's standard error is the container's: the state directory is where an operator looks.
        with open(f"{words[0]}/recover.log", "a", encoding="utf-8") as log:
            log.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
