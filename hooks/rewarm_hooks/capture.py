"""The upper directory of an overlay mount -> an OCI image layer.

What overlayfs writes into an upper directory (Documentation/filesystems/overlayfs.rst): a deletion is a character
device 0/0, or an empty file with the xattr overlay.whiteout; a directory that hides the lower one of its name has the
xattr overlay.opaque=y; overlay.redirect and overlay.metacopy say that part of an object still lies in a lower
directory. The xattrs are in trusted.* or, for a mount with userxattr, in user.*.
"""

from __future__ import annotations

import os
import stat

from . import dump, names, regular, xattrs
from .errors import LayerError, failed, shown
from .member import LayerStats
from .names import Parts, joined
from .tarwrite import TarWriter
from .walk import Walker, tree

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import BinaryIO

_ELSEWHERE = "part of it lies in a lower directory (overlayfs {}): mount the overlay with {}=off"


def write_layer(
    upper: str | os.PathLike[str], out: BinaryIO, *, extra: Iterable[tuple[str, str | os.PathLike[str]]] = ()
) -> LayerStats:
    """Write overlay upper directory `upper` to `out`, front to back, as a layer; the order is that of the names' bytes.

    A plain directory gives a layer of all that is in it. Content, holes, hard links, owner, mode with setuid bits,
    mtime in ns and xattrs are kept; sockets are left out and named in LayerStats.sockets. Symbolic links are never
    followed. extra: (name in the layer, path of a regular file, links followed) pairs, whose files go into the layer
    with their content and metadata in place of whatever `upper` has there: for instance a deleted file that a process
    still has open.

    Raises LayerError naming the file: a name that begins with `.wh.`, a device node (a restore would have to refuse
    it), an object that redirect_dir or metacopy has split, a file that cannot be read or shrinks meanwhile; OSError
    if `out` fails. What was written by then is of no use. `upper` should be at rest: its container frozen or gone.
    """
    added = {names.parse(os.fsencode(name)): os.fspath(path) for name, path in extra}
    for parts in added:
        names.check_plain(parts[-1], joined(parts))
    stats = LayerStats()
    tar = TarWriter(out, stats)
    try:
        upper_fd = os.open(upper, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise failed(os.fspath(upper), "opening the upper directory", error) from error
    try:
        with Walker(upper_fd) as walker:
            for parts, fd, children in tree(walker, ()):
                _directory(tar, stats, parts, fd)
                for name, status in children:
                    path = (*parts, name)
                    if path not in added:
                        _child(tar, stats, path, fd, status)
                    elif stat.S_ISDIR(status.st_mode):
                        raise LayerError(joined(path), "a file is to take the place of a directory")
    finally:
        os.close(upper_fd)
    for parts, source in sorted(added.items()):
        _extra(tar, joined(parts), source)
    tar.finish()
    return stats


def _directory(tar: TarWriter, stats: LayerStats, parts: Parts, fd: int) -> None:
    attributes = dump.attributes_at(fd, joined(parts))
    if _mark(attributes, b"redirect") is not None:
        raise LayerError(joined(parts), _ELSEWHERE.format("redirect", "redirect_dir"))
    dump.directory(tar, parts, fd, xattrs.carried(attributes))
    if _mark(attributes, b"opaque") == b"y":
        tar.marker(b"/".join((*parts, names.OPAQUE)))
        stats.opaque += 1


def _child(tar: TarWriter, stats: LayerStats, parts: Parts, fd: int, status: os.stat_result) -> None:
    mode = status.st_mode
    path = joined(parts)
    if stat.S_ISDIR(mode):
        names.check_plain(parts[-1], path)  # itself written when the walk comes to it
        return
    if stat.S_ISCHR(mode) and status.st_rdev == 0:
        _whiteout(tar, stats, parts)
        return
    if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
        raise LayerError(
            path, "a device node, which a restore would refuse; remove it, or give the container the device"
        )
    attributes = dump.attributes_in(fd, parts[-1], path)
    if _mark(attributes, b"whiteout") is not None and stat.S_ISREG(mode) and status.st_size == 0:
        _whiteout(tar, stats, parts)
        return
    if _mark(attributes, b"metacopy") is not None:
        raise LayerError(path, _ELSEWHERE.format("metacopy", "metacopy"))
    dump.other(tar, stats, parts, fd, status, xattrs.carried(attributes))


def _whiteout(tar: TarWriter, stats: LayerStats, parts: Parts) -> None:
    names.check_plain(parts[-1], joined(parts))
    tar.marker(b"/".join((*parts[:-1], names.WHITEOUT + parts[-1])))
    stats.whiteouts += 1


def _extra(tar: TarWriter, name: bytes, source: str) -> None:
    try:
        fd = regular.open_regular(source, os.O_RDONLY, follow=True)
    except OSError as error:
        raise failed(name, f"opening {shown(source)} for it", error) from error
    try:
        tar.file(name, fd, xattrs.carried(dump.attributes_at(fd, name)))
    finally:
        os.close(fd)


def _mark(attributes: dict[bytes, bytes], what: bytes) -> bytes | None:
    """The value of overlayfs's own mark `what`, None without it."""
    for prefix in xattrs.OVERLAY:
        if prefix + what in attributes:
            return attributes[prefix + what]
    return None
