"""Deleted files that a process still uses and that have other names: CRIU's `link_remap.N`.

With `link-remap` CRIU makes a hard link of its own beside such a file for as long as it dumps, writes the
link's name into its images, and (because the source runs on) removes it again at the end of the dump. On
restore the link has to be there. What lies on a tmpfs of the container is in CRIU's own tar; what lies in
the rootfs or in a bind-mounted /dev/shm is rewarm's to carry, so the links are made up again from the
open files of the still frozen processes. They have to be links, not copies: a semaphore that some
processes have mapped and others open by its name must stay one.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from rewarm.criu import images
from rewarm.errors import CaptureError

_LINKED = 0
_REGULAR = 1  # file_entry.type and fd_types.REG in images/fdinfo.proto


class LinkRemap(NamedTuple):
    """`name` is the link's path in the container without the leading `/`; `source` opens the file it stands for."""

    name: str
    source: str


def find(image_directory: Path, pids: Iterable[int]) -> list[LinkRemap]:
    """The link remaps of a dump whose processes (host pids) are still there; CaptureError if one has no open file."""
    path = image_directory / "remap-fpath.img"
    if not path.exists():
        return []
    links = [m for m in images.records(path) if images.number(m, 3) == _LINKED]
    if not links:
        return []
    names: dict[int, str] = {}
    for message in images.records(image_directory / "files.img"):
        for regular in images.messages(message, 3):
            names[images.number(regular, 1)] = images.text(regular, 6)
    opened = _deleted_files(pids)
    found = []
    for link in links:
        deleted, name = names.get(images.number(link, 1), ""), names.get(images.number(link, 2), "")
        source = opened.get("/" + deleted.lstrip("/"))
        if not name or source is None:
            raise CaptureError("carry deleted file", deleted or "?", "no process of the container has it open any more")
        found.append(LinkRemap(name.lstrip("/"), source))
    return found


def by_name_in_upper(links: list[LinkRemap], upper: Path, pid: int) -> list[LinkRemap]:
    """The same links, by the paths in the overlay's upper directory of the files that they stand for.

    An open file of an overlay has another device number than its upper file, so the two are matched in the
    merged tree, the root of process `pid`: the same file there has the same device and inode number.
    """
    wanted: dict[tuple[int, int], list[int]] = {}
    for at, link in enumerate(links):
        status = os.stat(link.source)
        wanted.setdefault((status.st_dev, status.st_ino), []).append(at)
    found = list(links)
    for directory, _, names in os.walk(upper) if links else ():
        for name in names:
            path = os.path.join(directory, name)
            try:
                status = os.lstat(f"/proc/{pid}/root/{os.path.relpath(path, upper)}")
            except OSError:
                continue  # a whiteout, or below a mount of the container
            if stat.S_ISREG(status.st_mode):
                for at in wanted.get((status.st_dev, status.st_ino), ()):
                    found[at] = links[at]._replace(source=path)
    return found


def _deleted_files(pids: Iterable[int]) -> dict[str, str]:
    """Path in the container (without ` (deleted)`) -> a /proc path that opens the file, of files with other names.

    Raises CaptureError for two such files that were opened by the same path: which is which is not to be seen.
    """
    found: dict[str, str] = {}
    identities: dict[str, tuple[int, int]] = {}
    for pid in pids:
        for kind in ("fd", "map_files"):
            directory = f"/proc/{pid}/{kind}"
            try:
                entries = os.listdir(directory)
            except OSError:
                continue  # the process has ended; CRIU dumped it as a zombie without files
            for entry in entries:
                path = f"{directory}/{entry}"
                try:
                    target, status = os.readlink(path), os.stat(path)
                except OSError:
                    continue  # closed meanwhile by CRIU's own clean-up
                # Without any name left it is in CRIU's images, as a ghost file.
                if not target.endswith(" (deleted)") or status.st_nlink == 0:
                    continue
                name = target.removesuffix(" (deleted)")
                found.setdefault(name, path)
                identity = status.st_dev, status.st_ino
                if identities.setdefault(name, identity) != identity:
                    raise CaptureError(
                        "carry deleted file", name, "two open files had this name", "capture it again later"
                    )
    return found
