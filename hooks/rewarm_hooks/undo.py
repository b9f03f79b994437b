"""The inverse of a layer: applied, it puts a root filesystem back to what it was before the layer was.

It is itself a layer: for each thing that the layer changes, replaces or deletes the original with all below it, a
whiteout for each thing that is new, and the metadata of every directory on the way, whose mtimes the changes disturb.
It holds whatever part of the layer was applied: putting back what was not yet changed changes nothing, and it can be
applied twice.

Not put back: access times, inode numbers, the hard link between a changed file and one that the layer does not
mention, and sockets in the root filesystem (a layer has no form for them).
"""

from __future__ import annotations

import os
import stat

from . import dump, names, xattrs
from .errors import LayerError, failed
from .member import DIRECTORY, LayerStats
from .names import Parts, joined
from .plan import ENTRY, OPAQUE
from .tarwrite import TarWriter
from .walk import Walker, tree

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from .plan import Step


def write_undo(steps: Iterable[Step], root_fd: int, undo: str | os.PathLike[str]) -> None:
    """Write the inverse of `steps` to file `undo` (mode 0600): complete and on disk under that name, or not there at
    all.

    Refuses to replace a file `undo`: it holds the originals of a change that was not undone. Raises LayerError.
    """
    path = os.fspath(undo)
    if os.path.lexists(path):
        raise LayerError(path, "it exists: an earlier change of this root filesystem was not undone")
    partial = path + ".tmp"
    try:
        fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise failed(partial, "making the undo file", error) from error
    try:
        with os.fdopen(fd, "wb", 1 << 16) as out:
            with Walker(root_fd) as walker:
                _Inverse(TarWriter(out, stats := LayerStats()), stats, walker).write(steps)
            out.flush()
            os.fsync(out.fileno())
        os.rename(partial, path)
        sync_directory(path)
    except BaseException as error:
        if os.path.lexists(partial):
            os.unlink(partial)
        if isinstance(error, OSError):
            raise failed(path, "writing the undo file", error) from error
        raise


def sync_directory(path: str) -> None:
    """Make the coming or going of `path` in its directory durable."""
    fd = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class _Inverse:
    def __init__(self, tar: TarWriter, stats: LayerStats, walker: Walker) -> None:
        self._tar = tar
        self._stats = stats
        self._walker = walker
        self._written: set[Parts] = set()

    def write(self, steps: Iterable[Step]) -> None:
        for step in steps:
            if not step.fresh:  # else its directory is put back as a whole
                self._step(step)
        self._tar.finish()

    def _step(self, step: Step) -> None:
        parts = step.parts
        if step.found is None:
            if step.what == ENTRY:
                self._directories(parts[:-1])
                names.check_plain(parts[-1], joined(parts))
                self._tar.marker(b"/".join((*parts[:-1], names.WHITEOUT + parts[-1])))
            return
        if not step.over_directory:
            if step.what != OPAQUE:
                self._directories(parts[:-1])
                self._other(parts, step.found)
        elif step.what == ENTRY and step.member.kind == DIRECTORY:
            self._directories(parts)
        else:
            if step.what == OPAQUE:  # what the layer puts in has to go
                self._tar.marker(b"/".join((*parts, names.OPAQUE)))
            self._all(parts)

    def _directories(self, parts: Parts) -> None:
        """The metadata of directory `parts` and of those above it, each once."""
        for depth in range(len(parts) + 1):
            if parts[:depth] not in self._written:
                self._directory(parts[:depth], self._walker.directory(parts[:depth]))

    def _directory(self, parts: Parts, fd: int) -> None:
        self._written.add(parts)
        dump.directory(self._tar, parts, fd, xattrs.carried(dump.attributes_at(fd, joined(parts))))

    def _other(self, parts: Parts, status: os.stat_result) -> None:
        fd = self._walker.directory(parts[:-1])
        attributes = xattrs.carried(dump.attributes_in(fd, parts[-1], joined(parts)))
        dump.other(self._tar, self._stats, parts, fd, status, attributes)

    def _all(self, top: Parts) -> None:
        """Directory `top` and everything in it."""
        self._directories(top[:-1])
        for parts, fd, children in tree(self._walker, top):
            if parts not in self._written:
                self._directory(parts, fd)
            for name, status in children:
                if not stat.S_ISDIR(status.st_mode):
                    attributes = xattrs.carried(dump.attributes_in(fd, name, joined((*parts, name))))
                    dump.other(self._tar, self._stats, (*parts, name), fd, status, attributes)
