"""The files that processes have open or mapped, by the names at which CRIU opens them again (criu/files-reg.c)."""

from __future__ import annotations

import os
from pathlib import Path

from rewarm.criu import images

_REGULAR = 1  # images/fdinfo.proto: fd_types
_TYPE, _ENTRY, _NAME = 1, 3, 6
"""file_entry, and in it reg_file_entry."""


def below(checkpoint: Path, directory: str) -> set[bytes]:
    """Names relative to `directory`, an absolute path. Raises images.ImageError and OSError."""
    prefix = os.fsencode(directory.strip("/") + "/")
    found = set()
    path = checkpoint / "files.img"
    for record in images.records(path) if path.exists() else ():
        for entry in images.messages(record, _ENTRY) if images.number(record, _TYPE) == _REGULAR else ():
            name = os.fsencode(images.text(entry, _NAME)).lstrip(b"/")
            if name.startswith(prefix):
                found.add(name.removeprefix(prefix))
    return found
