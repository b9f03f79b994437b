"""The lines of a CRIU log that say why it failed, and what it would have removed had it ended by itself."""

from __future__ import annotations

import mmap
import os
import re

_CONTEXT = 5
_MOST_YARDS = 16
_TAIL = 2 << 20
_WILL_MOUNT = rb"^\(\d+\.\d+\) mnt: \t\tWill mount \d+ @ (/tmp/\.criu\.mntns\.[A-Za-z0-9]{6})/"
# Debian's CRIU asks for a higher RLIMIT_NOFILE and goes on without; the line only misleads.
_HARMLESS = ("RLIMIT_NOFILE",)


def excerpt(path: str) -> list[str]:
    """The first real error with the five lines before it, and the last error line; [] without a log."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL))
            lines = [line.rstrip() for line in file]
    except OSError:
        return []
    errors = [at for at, line in enumerate(lines) if " Error (" in line and not any(h in line for h in _HARMLESS)]
    if not errors:
        return lines[-_CONTEXT:]
    first = errors[0]
    return [*lines[max(0, first - _CONTEXT) : first + 1], *(lines[at] for at in errors[1:4])]


def cause(path: str) -> str:
    """The first real error as one short phrase, without CRIU's time stamp; "" when the log has none."""
    for line in excerpt(path):
        if " Error (" in line:
            return _plain(line.partition("Error ")[2].split("): ", 1)[-1].strip())
    return ""


def _plain(text: str) -> str:
    """CRIU's words, but where they hide what has happened."""
    taken = re.match(r"Can't fork for (\d+): File exists", text)
    return f"process id {taken[1]} is taken in the pid namespace that the container shares" if taken else text


def mount_yards(path: str) -> set[str]:
    """The directory in /tmp below which CRIU mounted the container's tree, by the log of a restore; none if that says
    none. A few more where the log has been made to name others: it holds paths out of the images, as they are.

    CRIU makes it by mkdtemp(3) in the host's mount namespace (mount.c, create_mnt_roots) and removes it unless it
    is killed.
    """
    found: set[str] = set()
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as text:
            for match in re.finditer(_WILL_MOUNT, text, re.MULTILINE):
                found.add(os.fsdecode(match[1]))
                if len(found) == _MOST_YARDS:
                    break
    except (OSError, ValueError):  # there is none, or it is empty
        return set()
    return found
