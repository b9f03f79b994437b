"""The node's own raw copies of packs, so that a second restore does not touch the store's share.

    v1/<aa>/<digest>   a pack's raw layout: each chunk uncompressed at its raw_offset
    v1/tmp/<digest>    one that is being fetched, already as long as it will be: its length is reserved
    v1/locks/<digest>  locked by who fetches it; unlinked by its holder
    v1/room            locked while room is made; never unlinked

Nothing here is precious: what is read is verified against the snapshot's own digests, and a copy that is wrong, gone or
cut off by a crash is dropped and read from the store. So nothing is synced to disk, and every error only makes the
restore slower. The design (entries that appear by rename, locks that their holder's death drops, least recently used
goes first) is that of osbuild's fscache.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from rewarm import private

from .entries import is_digest
from .files import NotRegular, close, open_plain
from .probe import file_system, is_network

DEFAULT = Path("/var/lib/rewarm/cache")
_PATIENCE = 2.0
"""Seconds to wait for another process that makes room, which takes it milliseconds."""


class Busy(Exception):
    """Another process or thread is fetching this pack."""


class Fetch:
    """One pack on its way into the cache; its lock is held until `commit` or `abandon`."""

    def __init__(self, cache: PackCache, digest: str, lock: int, fd: int) -> None:
        self._cache, self._digest, self._lock, self._fd = cache, digest, lock, fd

    def write(self, data: memoryview, offset: int) -> None:
        """Keep these raw bytes. Failing is not an error: the pack is then not cached."""
        if self._fd < 0:
            return
        try:
            while data:
                count = os.pwrite(self._fd, data, offset)
                data, offset = data[count:], offset + count
        except OSError as error:
            self._cache.give_up("write to", error)
            self.abandon()

    def commit(self) -> None:
        """The pack is whole: others may have it."""
        if self._fd < 0:
            return
        try:
            target = self._cache.path(self._digest)
            target.parent.mkdir(mode=0o700, exist_ok=True)
            os.rename(self._cache.temporary(self._digest), target)
        except OSError as error:
            self._cache.give_up("add to", error)
        self.abandon()

    def abandon(self) -> None:
        """Leave nothing behind; after `commit` it does nothing."""
        if self._fd >= 0:
            _unlink(self._cache.temporary(self._digest))
            close(self._fd)
            self._fd = -1
            _release(self._lock, self._cache.lock_path(self._digest))


class PackCache:
    """A cache of at most `limit` bytes in a directory, shared by any number of processes. No method raises OSError."""

    def __init__(self, directory: Path, limit: int) -> None:
        self.directory, self.limit = directory, limit
        self._top = directory / "v1"
        self.fault = ""
        """Why nothing more is fetched into it; "" while it works."""

    def path(self, digest: str) -> Path:
        """Where a pack's copy lies, whether or not it is there."""
        return self._top / digest[:2] / digest

    def temporary(self, digest: str) -> Path:
        """Where a pack's copy grows."""
        return self._top / "tmp" / digest

    def lock_path(self, digest: str) -> Path:
        """The lock of who fetches a pack."""
        return self._top / "locks" / digest

    def give_up(self, operation: str, error: OSError) -> None:
        """Fetch nothing more into the cache."""
        self.fault = self.fault or f"{operation} cache {self.directory}: {error.strerror or error}"

    def holds(self, digest: str, size: int) -> bool:
        """Whether there is a copy with `size` raw bytes."""
        try:
            found = os.stat(self.path(digest), follow_symlinks=False)
        except OSError:
            return False
        return stat.S_ISREG(found.st_mode) and found.st_size == size

    def open(self, digest: str, size: int) -> int:
        """A descriptor of the copy, which counts as its last use; -1 if there is none of `size` raw bytes."""
        try:
            fd = open_plain(self.path(digest))
        except FileNotFoundError:
            return -1
        except (OSError, NotRegular):
            self.drop(digest)
            return -1
        try:
            whole = os.fstat(fd).st_size == size
        except OSError:
            whole = False
        if not whole:
            close(fd)
            self.drop(digest)
            return -1
        with suppress(OSError):  # a cache on a read-only mount serves as well
            os.utime(fd)
        return fd

    def drop(self, digest: str) -> None:
        """Forget a copy that is not what it should be."""
        _unlink(self.path(digest))

    def begin(self, digest: str, size: int, keep: Collection[str] = ()) -> Fetch | None:
        """Begin to fetch a pack of `size` raw bytes; None if it is there by now or cannot be kept.

        Copies of the packs in `keep` are not evicted for it: a snapshot that is larger than the cache would otherwise
        drive out its own packs, each before its next use. Raises Busy.
        """
        if self.fault or size > self.limit:
            return None
        try:
            # Root deletes by what it finds there, so nobody else may put anything there, whatever umask the engine has.
            for directory in (self.directory, self._top, self._top / "tmp", self._top / "locks"):
                private.make(str(directory))
            lock = _try_lock(self.lock_path(digest))
        except OSError as error:
            self.give_up("use", error)
            return None
        if lock is None:
            raise Busy
        fd = -1
        try:
            if not self.holds(digest, size):
                fd = self._reserve(digest, size, keep)
        except OSError as error:
            self.give_up("use", error)
        finally:
            if fd < 0:
                _release(lock, self.lock_path(digest))
        return Fetch(self, digest, lock, fd) if fd >= 0 else None

    def progress(self, digest: str) -> int:
        """A number that grows while another fetches this pack; -1 if nobody seems to."""
        try:
            return os.stat(self.temporary(digest)).st_blocks
        except OSError:
            return -1

    def _reserve(self, digest: str, size: int, keep: Collection[str]) -> int:
        """A new temporary file of `size` bytes, or -1 if there is no room for it. Raises OSError."""
        room = self._lock_room()
        if room < 0:
            return -1
        try:
            _unlink(self.temporary(digest))  # of a dead process, since its lock is ours
            self.drop(digest)  # of a wrong size, which would count against the limit
            if not self._make_room(size, keep):
                return -1
            fd = os.open(self.temporary(digest), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                os.ftruncate(fd, size)
            except OSError:
                os.close(fd)
                raise
            return fd
        finally:
            os.close(room)

    def _lock_room(self) -> int:
        deadline = time.monotonic() + _PATIENCE
        fd = os.open(self._top / "room", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return fd
            except BlockingIOError:
                if time.monotonic() > deadline:
                    os.close(fd)
                    # Whoever holds it that long hangs: not every pack is to wait for it.
                    self.give_up("lock", OSError(errno.EBUSY, "another process holds its room"))
                    return -1
            time.sleep(0.005)

    def _make_room(self, size: int, keep: Collection[str]) -> bool:
        """Evict until `size` more bytes fit under the limit and on the file system. Needs the lock. Raises OSError."""
        used = self._fetching()
        entries = []
        for path in self._entries():
            try:
                found = path.lstat()
            except OSError:
                continue  # dropped by another process just now
            used += found.st_size
            if path.name not in keep:
                entries.append((found.st_mtime_ns, found.st_size, path))
        entries.sort(reverse=True)
        space = os.statvfs(self._top)
        free = space.f_bavail * space.f_frsize
        while used + size > self.limit or free < size:
            if not entries:
                return False
            _, freed, path = entries.pop()
            _unlink(path)
            used -= freed
            free += freed
        return True

    def _fetching(self) -> int:
        """Bytes reserved by those who fetch. What a dead process left is removed."""
        used = 0
        for name in os.listdir(self._top / "tmp"):
            path = self._top / "tmp" / name
            lock = _try_lock(self.lock_path(name)) if is_digest(name) else None
            if lock is not None:
                _unlink(path)
                _release(lock, self.lock_path(name))
                continue
            try:
                used += path.lstat().st_size
            except OSError:
                continue  # finished just now
        return used

    def _entries(self) -> Iterator[Path]:
        for prefix in os.listdir(self._top):
            directory = self._top / prefix
            if len(prefix) == 2 and stat.S_ISDIR(directory.lstat().st_mode):
                yield from (directory / name for name in os.listdir(directory) if is_digest(name))


class CacheSettings(Protocol):
    """What the node's settings say about the cache."""

    @property
    def cache(self) -> str:
        """auto, off, or an absolute path."""

    @property
    def cache_size(self) -> int:
        """Bytes."""


def cache_for(settings: CacheSettings, store: object) -> PackCache | None:
    """The cache that the settings want for this store; auto is one for a store whose data comes from elsewhere."""
    if settings.cache == "off" or settings.cache_size <= 0:
        return None
    if settings.cache != "auto":
        return PackCache(Path(settings.cache), settings.cache_size)
    root = getattr(store, "root", None)
    if isinstance(root, Path):
        try:
            if not is_network(file_system(root.stat().st_dev)):
                return None
        except OSError:
            return None  # opening the store says what is wrong with it
    return PackCache(DEFAULT, settings.cache_size)


def _try_lock(path: Path) -> int | None:
    """The lock of a file that its holder unlinks, or None if another has it. Raises OSError."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The file may have been unlinked between the two calls: the lock of a file without a name is none.
            if os.path.samestat(os.fstat(fd), os.stat(path, follow_symlinks=False)):
                return fd
        except BlockingIOError:
            os.close(fd)
            return None
        except FileNotFoundError:
            pass
        except OSError as error:
            os.close(fd)
            raise OSError(error.errno or errno.EIO, error.strerror) from None
        os.close(fd)


def _release(lock: int, path: Path) -> None:
    _unlink(path)
    close(lock)


def _unlink(path: Path) -> None:
    with suppress(OSError):  # gone already, or the cache cannot be written, which only who adds to it must know
        os.unlink(path)
