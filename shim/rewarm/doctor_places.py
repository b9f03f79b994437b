"""Checks of the directories: the store, work and state, and what killed restores and captures left in them."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator

from rewarm import recover, scratch, sweep
from rewarm.checks import FAILED, OK, WARNING, Check, Node
from rewarm.errors import RewarmError
from rewarm.oci import runc
from rewarm.store.directory import DirectoryStore

LEAST_FREE = 2 << 30
"""Bytes: less does not hold the snapshot of even a small model server."""


def store(node: Node) -> Check:
    root = str(DirectoryStore(node.settings.store).root)
    parent = os.path.dirname(root)
    if not os.path.lexists(root) and os.path.isdir(real_parent(root)):
        if not os.path.isdir(parent):
            step = f"run: mkdir -p {parent}; a capture makes the store, not its parents"
            return Check("store", FAILED, f"{root} is not there, nor is {parent}", step)
        return _free("store", parent, f"{root} is not there yet: the first capture makes it")
    count = len(DirectoryStore(node.settings.store).list())
    found = f"{root}, {count} snapshot{'s' * (count != 1)}"
    loose = writable_by_others(root)
    if loose:
        step = f"run: chown 0:0 {root} && chmod 700 {root}; who writes snapshots decides what containers run"
        return Check("store", WARNING, f"{found}, but {loose}", step)
    problem = cannot_write(root)
    if problem:
        step = "mount it writable if this node is to capture; restores work without"
        return Check("store", WARNING, f"{found}, but it cannot be written: {problem}", step)
    return _free("store", root, found)


def work_directory(node: Node) -> Check:
    work = node.settings.work_dir
    there = real_parent(work)
    problem = cannot_write(there)
    if problem:
        return Check(
            "work directory", FAILED, f"{there} cannot be written: {problem}", "set `work_dir` in the settings"
        )
    beside = real_parent(str(DirectoryStore(node.settings.store).root))
    if os.stat(there).st_dev != os.stat(beside).st_dev:
        step = "set `work_dir` to a directory on the store's file system, where captures link instead of copying"
        return Check("work directory", WARNING, f"{work}, not on the file system of the store", step)
    return _free("work directory", there, f"{work}, on the file system of the store")


def state_directory(node: Node) -> Check:
    path = node.settings.state_dir
    there = real_parent(path)
    if there != path and os.path.lexists(path):
        return Check("state directory", FAILED, f"{path} is not a directory", "remove it, or set `state_dir`")
    loose = writable_by_others(path) if there == path else ""
    if loose:
        return Check("state directory", FAILED, f"{path}: {loose}", f"run: chown 0:0 {path} && chmod 700 {path}")
    problem = cannot_write(there)
    if problem:
        step = "set `state_dir` in the settings to a directory on a tmpfs"
        return Check("state directory", FAILED, f"{there} cannot be written: {problem}", step)
    return Check("state directory", OK, path if there == path else f"{path} (made when it is needed)")


def left_overs(node: Node) -> Check:
    """What only a SIGKILL or a crash leaves: half-restored containers, half-captured memory."""
    found = []
    for path in _container_directories(node.settings.state_dir):
        try:
            kept = recover.left_over(path)
        except RewarmError as error:
            return Check("left-overs", WARNING, f"{error.object}: {error.cause}", error.next_step or "remove it")
        if kept is not None:
            found.append(f"restore of {kept.id} (runc root {kept.root})")
    found += [f"capture files {path}" for path in scratch.dead(node.settings.work_dir)]
    if found:
        more = f" and {len(found) - 4} more" if len(found) > 4 else ""
        step = "run: rewarm doctor --fix (a create or delete of the same container id undoes its restore, too)"
        return Check("left-overs", WARNING, "; ".join(found[:4]) + more, step)
    return Check("left-overs", OK, "none")


def undo_left_overs(node: Node) -> list[str]:
    """Undo them; a line for each that stays. Raises OciError when there is no low-level runtime to undo with."""
    problems = sweep.left_overs(node.settings.state_dir, runc.find(node.settings))
    for path in scratch.dead(node.settings.work_dir):
        try:
            scratch.remove_dead(path)
        except OSError as error:
            problems.append(f"remove {path}: {error.strerror or error}")
    return problems


def _container_directories(state_dir: str) -> Iterator[str]:
    base = os.path.join(state_dir, "containers")
    for root in _directories(base):
        yield from _directories(root)


def _directories(path: str) -> list[str]:
    try:
        with os.scandir(path) as entries:
            return sorted(entry.path for entry in entries if entry.is_dir(follow_symlinks=False))
    except (FileNotFoundError, NotADirectoryError):
        return []  # nothing was ever kept there


def real_parent(path: str) -> str:
    """The nearest directory at or above `path` that is there."""
    while not os.path.isdir(path):
        path = os.path.dirname(path)
    return path


def cannot_write(directory: str) -> str:
    """Why a file cannot be made there, by making one that has no name; "" when it can."""
    try:
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def writable_by_others(directory: str) -> str:
    """Why others than root can put something there; "" when they cannot."""
    status = os.stat(directory)
    if status.st_uid != 0:
        return f"it belongs to user {status.st_uid}"
    if status.st_mode & 0o022:
        return f"others than root may write it (mode {stat.S_IMODE(status.st_mode):04o})"
    return ""


def _free(name: str, directory: str, found: str) -> Check:
    status = os.statvfs(directory)
    free = status.f_bavail * status.f_frsize
    text = f"{found}, {free / (1 << 30):.1f} GiB free"
    if free < LEAST_FREE:
        step = f"free space under {directory}: a capture needs as much as the container's memory and files"
        return Check(name, WARNING, text, step)
    return Check(name, OK, text)
