"""Which processes want a signal after a restore: a file PID.signal in the control directory, with its name or number.

A capture reads them while its source is frozen. They are the container's: only regular files are opened, only some
bytes are read, and what is wrong is a note, for a program that cannot be told is no reason to have no snapshot of it.
A restore sends the signal as root: so the process's own user has to want it, or root. Others of the container may not
send it one by themselves.
"""

from __future__ import annotations

import itertools
import os
import re

from rewarm import processes
from rewarm.notify import ENTRIES
from rewarm.oci.spec import CONTROL_DESTINATION
from rewarm.store.manifest import Wanted
from rewarm.store.signals import ALLOWED, MOST, NAMES
from rewarm_hooks.regular import open_regular

_FILE = re.compile(r"([1-9][0-9]{0,6})\.signal")
_LONGEST = 32
_NOTES = 8


def signals(control: str, pids: list[int]) -> tuple[tuple[Wanted, ...], list[str]]:
    """What the processes `pids` (the container's, host numbers) want that handle the signal, and a line for each file
    that says nothing usable, some of them at most. `control` is the control directory on the node; none, none wanted.
    """
    try:
        directory = os.open(control, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return (), []
    notes = []
    found: list[Wanted] = []
    try:
        with os.scandir(directory) as entries:
            names = [entry.name for entry in itertools.islice(entries, ENTRIES + 1)]
        if len(names) > ENTRIES:
            notes.append(f"more than {ENTRIES} names in {CONTROL_DESTINATION}: not all are looked at for signals")
        here: dict[int, int] = {}
        for match in filter(None, map(_FILE.fullmatch, sorted(names[:ENTRIES]))):
            here = here or {processes.namespace_pid(pid): pid for pid in pids}
            try:
                if len(found) == MOST:
                    raise ValueError(f"more than {MOST} processes want one")
                found.append(_wanted(directory, match[0], int(match[1]), here))
            except (OSError, ValueError) as error:
                said = error.strerror if isinstance(error, OSError) else str(error)
                notes.append(f"no signal by {CONTROL_DESTINATION}/{match[0]}: {said}")
    finally:
        os.close(directory)
    return tuple(found), notes if len(notes) <= _NOTES else [*notes[:_NOTES], f"and {len(notes) - _NOTES} more"]


def _wanted(directory: int, name: str, number: int, here: dict[int, int]) -> Wanted:
    if number not in here:
        raise ValueError(f"the container has no process {number}")
    signal = _number(_read(directory, name, _owners(here[number])))
    if not processes.handles(here[number], signal):
        raise ValueError(f"process {number} does not handle signal {signal}")
    return Wanted(number, signal)


def _owners(pid: int) -> set[int]:
    """Who may say what a process wants, by the node's numbers: its effective user, root, and root of the process's user
    namespace."""
    found = processes.user(pid)
    with open(f"/proc/{pid}/uid_map", encoding="ascii") as file:
        roots = [int(outside) for inside, outside, _ in map(str.split, file) if inside == "0"]
    return {0, *roots, *(found or ())[:1]}


def _read(directory: int, name: str, owners: set[int]) -> bytes:
    fd = open_regular(name, os.O_RDONLY, directory)
    try:
        status = os.fstat(fd)
        # Where fs.protected_hardlinks is off, anybody may give another's file a second name.
        if status.st_uid not in owners or status.st_nlink > 1:
            what = "it has several names" if status.st_uid in owners else f"it is user {status.st_uid}'s"
            raise ValueError(f"{what}, and has to be the process's own user's, or root's")
        return os.read(fd, _LONGEST + 1)
    finally:
        os.close(fd)


def _number(data: bytes) -> int:
    text = data.decode("ascii", "replace").strip().removeprefix("SIG")
    number = int(text) if re.fullmatch("[0-9]{1,2}", text) else NAMES.get(text, 0)
    if len(data) > _LONGEST or number not in ALLOWED:
        raise ValueError(f"{text[:_LONGEST]!a} is not one of {', '.join(NAMES)} or 34 to 64")
    return number
