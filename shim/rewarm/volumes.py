"""What the program has open on its volumes: another pod's are empty, or hold other things.

CRIU opens every file by its name, and a working directory too. Logs, empty files and directories that a new volume has
not are made there for it, as a cold start's program would have made them: by its user's rights, and away again if the
restore fails. The capture says which (`blank`). Of anything else nothing can be made up: other containers may start
cold then, and the capture says why.
"""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from rewarm import blanks
from rewarm.blanks import PLAN, Blank, descended
from rewarm.criu import images, opened
from rewarm.criu.opened import Opened
from rewarm.errors import SnapshotDamaged
from rewarm.oci import mounts, spec, users
from rewarm.oci.record import Undo
from rewarm.oci.spec import Spec
from rewarm.store.manifest import MAX_BLANK

SHM = "/dev/shm"
_Name = tuple[bytes, ...]
"""Of a file on a volume: the components."""
_NAMED = 4
_LISTED = 4096
"""Names of a directory with a log that are looked at."""
_NOT_BELOW = frozenset((b"", b".", b".."))
_DEEPEST, _LONGEST, _MOST = 32, 4096, 1024
"""Components and bytes of a name that is made, and how many are made of a snapshot's, directories on the way included:
names come from containers and images, and each directory on the way takes as much memory as its whole name."""
_SHOWN = 200
"""Bytes of a name in a note."""


class _Room:
    """For names that are made: what they need together is known before any of it is built."""

    def __init__(self) -> None:
        self._taken: set[tuple[bytes, _Name]] = set()

    def take(self, volume: Volume, name: _Name, depth: int = 0) -> bool:
        """Whether there is room for `name` and all directories on the way, but for the `depth` outer ones."""
        if len(name) > _DEEPEST or len(b"/".join(name)) > _LONGEST:
            return False
        new = {(volume.place, name[:end]) for end in range(depth + 1, len(name) + 1)} - self._taken
        if len(self._taken) + len(new) > _MOST:
            return False
        self._taken |= new
        return True


class Volume(NamedTuple):
    """A bind mount of a directory. `place` is where it comes to lie, `destination` what the spec says."""

    destination: str
    place: bytes
    source: str
    read_only: bool


def look(checkpoint: Path, root: str, bundle_spec: Spec) -> tuple[tuple[str, ...], list[str]]:
    """At a capture: names of what may begin empty, and a line for each writable volume with something open that may not
    (one that may only be read is brought with its content: weights, a driver). `root` is the container's root
    filesystem. Nothing where that cannot be told."""
    blank: list[str] = []
    room = _Room()
    notes: dict[str, list[str]] = {}
    with suppress(images.ImageError, OSError):
        for volume, files in _by_volume(checkpoint, root, bundle_spec).items():
            # The container stands still meanwhile, and may have thousands open in one directory: each is read once.
            only_logs = cache(partial(_has_only_logs, volume, _logs(files)))
            for name, them in sorted(files.items()):
                text = os.fsdecode(them[0].name)
                may = len(blank) < MAX_BLANK and _is_utf8(text) and _can_make(volume, them, bundle_spec)
                may = may and (all(file.is_directory or file.is_empty for file in them) or only_logs(name[:-1]))
                if may and room.take(volume, name):
                    blank.append(text)
                elif not volume.read_only:
                    notes.setdefault(volume.destination, []).append(_shown(b"/".join(name)))
    return tuple(blank), [f"volume {where}: {_listed(names)}" for where, names in notes.items()]


def _is_utf8(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _shown(name: bytes) -> str:
    return os.fsdecode(name if len(name) <= _SHOWN else name[:_SHOWN] + b"...")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    named = ", ".join(name if name.isprintable() else repr(name) for name in names[:_NAMED])
    return (
        f"{named}{more} must be on a new container's as now, else it starts cold: the program has it open, and only "
        "logs, empty files and directories are made anew, on volumes that it may write to, "
        f"{_DEEPEST} levels deep and {_MOST} in all at most"
    )


def lay_out(blank: Collection[str], checkpoint: Path, directory: str, root: str, bundle_spec: Spec) -> list[Undo]:
    """Find which of `blank` the volumes lack, and write them down in the container directory. Nothing on a volume is
    changed yet: what `make_blank` will do is returned with how it is undone.

    Raises SnapshotDamaged and OSError.
    """
    found: list[Undo] = []
    room = _Room()
    user = users.of(bundle_spec)
    try:
        for volume, files in _by_volume(checkpoint, root, bundle_spec).items() if blank else ():
            source = os.path.realpath(volume.source)
            wanted = {
                name: them
                for name, them in files.items()
                if os.fsdecode(them[0].name) in blank and _can_make(volume, them, bundle_spec)
            }
            if lacking := _lacking(volume, source, wanted, room):
                path = os.path.join(directory, f"{len(found)}{PLAN}")
                blanks.save(path, user, lacking)
                found.append(Undo(source, path, os.path.ismount(source)))
    except images.ImageError as error:
        raise SnapshotDamaged("read images of snapshot", "files.img", str(error), "capture it again") from error
    return found


def make_blank(undo: Iterable[Undo], checkpoint: Path, over: threading.Event) -> None:
    """Make what `lay_out` has found, until `over` is set, and have CRIU take it as it is. What is there by now stays,
    as does what the container's user may not make: CRIU says so then. Raises OSError."""
    plans = [change for change in undo if change.layer.endswith(PLAN)]
    if ids := {made for change in plans for made in blanks.make(change.root, change.layer, over)}:
        opened.empty(checkpoint, ids)


def _lacking(volume: Volume, source: str, wanted: dict[_Name, list[Opened]], room: _Room) -> list[Blank]:
    """Those that are not there, with the directories on their way, outer ones first, as far as there is room."""
    found: dict[_Name, Blank] = {}
    for name, files in wanted.items():
        if len(name) > _DEEPEST:
            continue
        with descended(source, name) as (fd, depth):
            try:
                os.lstat(name[depth], dir_fd=fd)
                continue  # it is there, or another thing in its way
            except FileNotFoundError:
                pass
            except OSError:
                continue  # it can have no such name
        if not room.take(volume, name, depth):
            continue
        for end in range(depth + 1, len(name)):
            found.setdefault(name[:end], Blank(list(map(os.fsdecode, name[:end])), True, None, []))
        mode, ids = stat.S_IMODE(files[0].mode), [file.id for file in files]
        found[name] = Blank(list(map(os.fsdecode, name)), files[0].is_directory, mode, ids)
    return [found[name] for name in sorted(found)]


def _by_volume(checkpoint: Path, root: str, bundle_spec: Spec) -> dict[Volume, dict[_Name, list[Opened]]]:
    """What is open on each volume, by its name there."""
    path = checkpoint / "files.img"
    volumes = list(_volumes(root, bundle_spec))
    content = path.read_bytes() if volumes and path.exists() else b""
    # Most containers have nothing open there, and decoding takes many times as long as a look.
    if not any(volume.place.lstrip(b"/") + b"/" in content for volume in volumes):
        return {}
    destinations = [*(destination for destination, _ in spec.mounts(bundle_spec)), *spec.OWN_DESTINATIONS]
    places = [os.fsencode(mounts.resolved(root, destination)) + b"/" for destination in destinations]
    found: dict[Volume, dict[_Name, list[Opened]]] = {}
    for file in opened.files(checkpoint):
        place = max((place for place in places if file.name.startswith(place)), key=len, default=b"")
        name = tuple(file.name.removeprefix(place).split(b"/", _DEEPEST))
        for volume in volumes:
            if volume.place + b"/" == place and not _NOT_BELOW.intersection(name):
                found.setdefault(volume, {}).setdefault(name, []).append(file)
    return found


def _volumes(root: str, bundle_spec: Spec) -> Iterator[Volume]:
    for mount in bundle_spec.get("mounts") or []:
        destination = os.path.normpath(str(mount.get("destination", "")))
        source = str(mount.get("source", ""))
        # rewarm's own, and /dev/shm, whose content the snapshot carries.
        if destination in (*spec.OWN_DESTINATIONS, SHM) or not spec.is_bind(mount) or not os.path.isdir(source):
            continue
        place = os.fsencode(mounts.resolved(root, destination))
        if place.strip(b"/"):
            yield Volume(destination, place, source, spec.is_read_only(mount))


def _logs(files: dict[_Name, list[Opened]]) -> dict[_Name, set[bytes]]:
    """The names of logs that are open, by their directories."""
    found: dict[_Name, set[bytes]] = {}
    for (*directory, last), them in files.items():
        if all(one.is_output for one in them):
            found.setdefault(tuple(directory), set()).add(last)
    return found


def _has_only_logs(volume: Volume, logs: dict[_Name, set[bytes]], directory: _Name) -> bool:
    """Beside other files what looks like a log may be a journal (Redis has such, and databases), which is worth nothing
    without them."""
    known = logs.get(directory, set())
    lengths = {len(log) for log in known}
    with descended(volume.source, (*directory, b"")) as (fd, depth):
        if depth != len(directory):
            return False
        with os.scandir(fd) as entries:
            found = list(islice(entries, _LISTED + 1))
        names = [(os.fsencode(entry.name), entry) for entry in found]
        # Rotated ones have its name and more.
        others = [entry for name, entry in names if not any(name[:length] in known for length in lengths)]
        return len(found) <= _LISTED and not any(entry.is_file(follow_symlinks=False) for entry in others)


def _can_make(volume: Volume, files: list[Opened], bundle_spec: Spec) -> bool:
    """All that is open under one name. In a user namespace nothing tells whose a file on the volume has to be: it may
    be mounted with a map of its own."""
    if volume.read_only or spec.has_users(bundle_spec):
        return False
    return all(
        not file.mode & (stat.S_ISUID if file.is_directory else 0o7000) and (file.is_directory or file.is_output)
        for file in files
    )
