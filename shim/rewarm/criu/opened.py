"""The files that processes have open or mapped, by the names at which CRIU opens them again (criu/files-reg.c)."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from rewarm.criu import images
from rewarm.criu.encode import integer, magic_of, nested, write_records

_REGULAR = 1  # images/fdinfo.proto: fd_types
_TYPE, _ENTRY = 1, 3
"""file_entry."""
_ID, _FLAGS, _POSITION, _NAME, _SIZE, _EXTERNAL, _MODE, _BUILD_ID = 1, 2, 3, 6, 8, 9, 10, 11
"""Fields of reg_file_entry (images/regfile.proto)."""


class Opened(NamedTuple):
    """A file or directory as it was opened. `name` is absolute; `size` is -1 where CRIU does not compare it: of a file
    that is only appended to."""

    id: int
    name: bytes
    flags: int
    position: int
    size: int
    mode: int

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.mode)

    @property
    def is_writable(self) -> bool:
        """It is a regular file, and open for writing."""
        return stat.S_ISREG(self.mode) and not self.flags & os.O_PATH and bool(self.flags & os.O_ACCMODE)

    @property
    def is_empty(self) -> bool:
        return self.is_writable and self.size == 0

    @property
    def is_output(self) -> bool:
        """It is empty, or written to its end and not read, as logs are."""
        only_written = self.flags & os.O_ACCMODE == os.O_WRONLY and self.size in (-1, self.position)
        return self.is_empty or (self.is_writable and only_written)


def files(checkpoint: Path) -> list[Opened]:
    """Those that CRIU opens by their names: not deleted ones, nor what the caller gives it. Raises images.ImageError
    and OSError."""
    path, remaps = checkpoint / "files.img", checkpoint / "remap-fpath.img"
    deleted = {images.u32(one, 1) for one in images.records(remaps)} if remaps.exists() else set()
    found = []
    for record in images.records(path) if path.exists() else ():
        for entry in images.messages(record, _ENTRY) if images.number(record, _TYPE) == _REGULAR else ():
            if images.number(entry, _EXTERNAL) or images.u32(entry, _ID) in deleted:
                continue
            name = b"/" + os.fsencode(images.text(entry, _NAME)).lstrip(b"/")
            size = images.number(entry, _SIZE, -1)
            flags, position = images.number(entry, _FLAGS), images.number(entry, _POSITION)
            found.append(Opened(images.u32(entry, _ID), name, flags, position, size, images.number(entry, _MODE)))
    return found


def empty(checkpoint: Path, ids: Collection[int]) -> None:
    """Have CRIU take these files as they are, and begin at their beginning. Raises images.ImageError and OSError."""
    path = checkpoint / "files.img"
    records = []
    for record in images.raw_records(path):
        fields = list(record)
        regular = (_TYPE, _REGULAR) in ((number, value) for number, _, value in fields)
        records.append(
            b"".join(
                _emptied(value, ids) if regular and number == _ENTRY and isinstance(value, bytes) else raw
                for number, raw, value in fields
            )
        )
    write_records(path, magic_of(path), records)


def _emptied(entry: bytes, ids: Collection[int]) -> bytes:
    if images.u32(images.decode(entry), _ID) not in ids:
        return nested(_ENTRY, entry)
    kept = [raw for number, raw, _ in images.fields(entry) if number not in (_POSITION, _SIZE, _BUILD_ID)]
    return nested(_ENTRY, b"".join(kept) + integer(_POSITION, 0))


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
