"""Taking files into one snapshot's workspace: a large one as a pack of its own, the small ones together in one."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from blake3 import blake3

from rewarm.errors import StoreError

from . import files
from .manifest import LARGE, MAX_SHARED, FileEntry

# What link(2) says where the file may not or cannot have another name: then it is copied.
_NO_LINK = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOENT)


class NewPack(NamedTuple):
    """A pack in the workspace, on disk."""

    path: Path
    digest: str
    size: int
    mtime_ns: int


class FileWriter:
    """The files of one snapshot. `report` gets the bytes taken in; `packs` are those to move to their places."""

    def __init__(self, directory: Path, report: Callable[[int], None]) -> None:
        self.packs: dict[str, NewPack] = {}
        self._directory = directory
        self._report = report
        self._small: list[FileEntry] = []
        self._large: list[FileEntry] = []
        self._shared = blake3()
        self._shared_size = 0

    def add(self, name: str, path: str | Path) -> None:
        """See SnapshotWriter.add_file. Raises StoreError."""
        try:
            fd = files.open_plain(path)
        except files.NotRegular:
            raise StoreError("add file", str(path), "is not a regular file") from None
        except OSError as error:
            raise StoreError("add file", str(path), error.strerror or str(error)) from None
        try:
            before = os.fstat(fd)
            if before.st_size < LARGE:
                entry = self._add_small(name, path, fd, before.st_size)
                self._small.append(entry)
            else:
                self._large.append(self._add_large(name, path, fd, before.st_size))
            after = os.fstat(fd)
        finally:
            os.close(fd)
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise _changed(path)

    def _add_small(self, name: str, path: str | Path, fd: int, size: int) -> FileEntry:
        try:
            data = files.read_up_to(fd, size + 1)
        except OSError as error:
            raise StoreError("read", str(path), error.strerror or str(error)) from None
        if len(data) != size:
            raise _changed(path)
        return self._add_small_bytes(name, data)

    def add_bytes(self, name: str, data: bytes) -> None:
        """A file from memory. Raises StoreError."""
        if len(data) < LARGE:
            self._small.append(self._add_small_bytes(name, data))
        else:
            path = self._directory / f"bytes{len(self._large)}"
            write_file(path, data)
            self.add(name, path)

    def _add_small_bytes(self, name: str, data: bytes) -> FileEntry:
        size = len(data)
        if self._shared_size + size > MAX_SHARED:
            raise StoreError("add file", name, f"the snapshot's small files have more than {MAX_SHARED} bytes")
        digest = blake3(data).hexdigest()
        self._append(self._directory / "shared", data)
        # The pack's digest is known, and put in, when all small files are there.
        entry = FileEntry(name=name, size=size, digest=digest, pack="", offset=self._shared_size)
        self._shared.update(data)
        self._shared_size += size
        self._report(size)
        return entry

    def _append(self, path: Path, data: bytes) -> None:
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o400)
            try:
                files.write_all(fd, data)
            finally:
                os.close(fd)
        except OSError as error:
            raise files.store_error("write", path, error) from None

    def _add_large(self, name: str, path: str | Path, fd: int, size: int) -> FileEntry:
        target = self._directory / f"large{len(self._large)}"
        hasher = files.threaded_hasher()
        linked = self._link(fd, target)
        out = -1 if linked else create(target)

        def take(piece: memoryview) -> None:
            hasher.update(piece)
            if out >= 0:
                try:
                    files.write_all(out, piece)
                except OSError as error:
                    raise files.store_error("write", target, error) from None
            self._report(len(piece))

        try:
            files.read_range(fd, 0, size, take)
            if linked:
                os.fchmod(fd, 0o400)
            kept = fd if linked else out
            os.fsync(kept)
            status = os.fstat(kept)
        except files.Short:
            raise _changed(path) from None
        except OSError as error:
            raise files.store_error("write", target, error) from None
        finally:
            if out >= 0:
                os.close(out)
        digest = hasher.hexdigest()
        self.packs[digest] = NewPack(target, digest, size, status.st_mtime_ns)
        return FileEntry(name=name, size=size, digest=digest, pack=digest, offset=0)

    def _link(self, fd: int, target: Path) -> bool:
        """Give the open file another name; False where that cannot be done."""
        directory = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # By descriptor, so that what is hashed is what is linked. Python follows the magic link
            # (AT_SYMLINK_FOLLOW) only if a directory descriptor is given.
            os.link(f"/proc/self/fd/{fd}", target.name, dst_dir_fd=directory, follow_symlinks=True)
        except OSError as error:
            if error.errno in _NO_LINK:
                return False
            raise files.store_error("link", target, error) from None
        finally:
            os.close(directory)
        return True

    def finish(self) -> list[FileEntry]:
        """All entries, with the shared pack's digest; the shared pack goes to disk."""
        if not self._small:
            return list(self._large)
        path = self._directory / "shared"
        digest = self._shared.hexdigest()
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                os.fsync(fd)
                status = os.fstat(fd)
            finally:
                os.close(fd)
        except OSError as error:
            raise files.store_error("write", path, error) from None
        self.packs[digest] = NewPack(path, digest, self._shared_size, status.st_mtime_ns)
        # An empty file with the shared pack's own digest (all small files are empty) must say offset 0, and does.
        return self._large + [entry._replace(pack=digest) for entry in self._small]


def create(target: Path) -> int:
    """A new file of the workspace, for writing; the caller closes it. Raises StoreError."""
    try:
        return os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o400)
    except OSError as error:
        raise files.store_error("create", target, error) from None


def write_file(path: Path, data: bytes) -> None:
    """A new file of the workspace, on disk when this returns. Raises StoreError."""
    fd = create(path)
    try:
        files.write_all(fd, data)
        os.fsync(fd)
    except OSError as error:
        raise files.store_error("write", path, error) from None
    finally:
        os.close(fd)


def check_unchanged(pack: NewPack) -> None:
    """Raises StoreError if the pack is not as it was when it was hashed: somebody still has it open."""
    try:
        status = pack.path.lstat()
    except OSError as error:
        raise files.store_error("read", pack.path, error) from None
    if (status.st_size, status.st_mtime_ns) != (pack.size, pack.mtime_ns):
        raise _changed(pack.path)


def _changed(path: str | Path) -> StoreError:
    return StoreError("add file", str(path), "changed while it was captured", "capture again")
