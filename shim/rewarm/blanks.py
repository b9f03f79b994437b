"""Files and directories that a restore makes on a volume, as its container's user would have, and takes away again.

The volume is others', who may change it at any time: no link is followed, no mount entered, nothing that is there
touched. What is to be made is written down in the container directory before anything is (PLAN).
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import NamedTuple

from rewarm import briefly
from rewarm.oci import spec
from rewarm.oci.record import Undo
from rewarm.oci.users import User
from rewarm.plain import plain

PLAN = ".volume"
"""How the names of such files end."""
_LONGEST = 3.0
"""Seconds that a volume may take to have things taken away again."""
_DIRECTORY_MODE = 0o755
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_OPEN = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Blank(NamedTuple):
    """What is to be made: its name on the volume, its mode (None for a directory that nobody has open), its numbers in
    the images; the inode once it is made."""

    name: list[str]
    is_directory: bool
    mode: int | None
    ids: list[int]
    inode: int = 0


def make(source: str, path: str, over: threading.Event) -> set[int]:
    """Make what is written down in `path` on the volume `source`; the numbers in the images of what was made. What is
    there by now stays, and what its user may not make is not made. Nothing is made when `over` is set: whoever does
    that calls `take_away`, which may have been before a volume answered. Raises OSError."""
    if over.is_set():
        return set()
    user, lacking, _ = _load(path)
    save(path, user, lacking, begun=True)
    for at, wanted in enumerate(lacking):
        lacking[at] = one = wanted._replace(inode=_make(source, wanted, user))
        if over.is_set():
            with suppress(OSError):
                if one.inode:
                    _take_away(source, one)
            return set()
    # What others have made meanwhile is not to be taken away.
    made = [one for one in lacking if one.inode]
    save(path, user, made, begun=True)
    return {number for one in made for number in one.ids}


def undo(change: Undo) -> None:
    """Undo a plan of `volumes.lay_out`, if the volume is still there. It may be a share that no longer answers: what
    was made there is empty, and stays then. Raises OSError."""
    briefly.run(partial(_undo, change), _LONGEST)


def _undo(change: Undo) -> None:
    if os.path.isdir(change.root) and (not change.mounted or os.path.ismount(change.root)):
        take_away(change.root, change.layer)


def take_away(source: str, path: str) -> None:
    """Undo `make`, also half done: of what it has made, what is still empty and that nobody else has open, as far as
    that can be told. It is others' volume, and the same log may be theirs by now; all of it is where `make` was not
    even begun."""
    with suppress(FileNotFoundError):
        _, lacking, begun = _load(path)
        for one in reversed(lacking if begun else []):
            with suppress(OSError):
                _take_away(source, one)
        os.unlink(path)


def _make(source: str, one: Blank, user: User) -> int:
    """Its inode number; 0 if it was not made. Raises OSError."""
    *_, last = name = tuple(map(os.fsencode, one.name))
    with descended(source, name) as (directory, depth):
        parent = os.fstat(directory)
        if depth + 1 != len(name) or not user.may_make(parent):
            return 0
        try:
            if one.is_directory:
                os.mkdir(last, 0o700, dir_fd=directory)
                fd = os.open(last, _OPEN, dir_fd=directory)
            else:
                fd = os.open(last, _NEW, 0o600, dir_fd=directory)
        except (FileExistsError, NotADirectoryError):
            return 0  # others were faster
        try:
            # One that others have put into its place meanwhile may be somebody's.
            if one.is_directory and os.listdir(fd):
                return 0
            inherited = parent.st_mode & stat.S_ISGID
            os.fchown(fd, user.uid, parent.st_gid if inherited else user.gid)
            os.fchmod(fd, _DIRECTORY_MODE | inherited if one.mode is None else one.mode)
            return os.fstat(fd).st_ino
        finally:
            os.close(fd)


def _take_away(source: str, one: Blank) -> None:
    """Raises OSError for a directory in which something is."""
    from rewarm.store.probe import file_system, is_network  # a restore that succeeds does without
    from rewarm_hooks.regular import open_regular

    *_, last = name = tuple(map(os.fsencode, one.name))
    with descended(source, name) as (directory, depth):
        if depth + 1 != len(name):
            return
        if one.is_directory:
            if one.inode in (0, os.lstat(last, dir_fd=directory).st_ino):
                os.rmdir(last, dir_fd=directory)
            return
        status = os.lstat(last, dir_fd=directory)
        if one.inode not in (0, status.st_ino) or status.st_size:  # 0: whoever made it was killed then
            return
        if is_network(file_system(status.st_dev)):
            return  # another node may have it open, which cannot be seen from here
        fd = open_regular(last, os.O_RDWR, directory, known=status)
        try:
            if not _is_open(fd) and not os.fstat(fd).st_size:
                os.unlink(last, dir_fd=directory)
        finally:
            os.close(fd)


def _is_open(fd: int) -> bool:
    """Whether another process of this node may have the file open: such a one gets no lease (fcntl(2), F_SETLEASE), nor
    does any where there are none, and nothing can be told."""
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except OSError:
        return True
    return False


def save(path: str, user: User, lacking: list[Blank], *, begun: bool = False) -> None:
    who = [user.uid, user.gid, sorted(user.groups), user.privileged]
    plan = {"user": who, "files": list(map(plain, lacking)), "begun": begun}
    spec.write_atomically(path, json.dumps(plan).encode())


def _load(path: str) -> tuple[User, list[Blank], bool]:
    with open(path, "rb") as file:
        plan = json.load(file)
    uid, gid, groups, privileged = plan["user"]
    user = User(uid, gid, frozenset(groups), privileged)
    # A rewarm from before an upgrade does not say whether it has begun.
    return user, [Blank(**one) for one in plan["files"]], plan.get("begun", True)


@contextmanager
def descended(source: str, name: tuple[bytes, ...]) -> Iterator[tuple[int, int]]:
    """The innermost directory on the way to `name` that is there, open, and its depth: no link is followed, and no
    mount entered. Raises OSError."""
    fd = os.open(source, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        device = os.fstat(fd).st_dev
        depth = 0
        for part in name[:-1]:
            try:
                inner = os.open(part, _OPEN, dir_fd=fd)
            except OSError:
                break
            if os.fstat(inner).st_dev != device:
                os.close(inner)
                break
            os.close(fd)
            fd = inner
            depth += 1
        yield fd, depth
    finally:
        os.close(fd)
