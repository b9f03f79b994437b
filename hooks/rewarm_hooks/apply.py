"""An OCI image layer -> the root filesystem of a container that is not running yet, and back.

The story: read every header; plan every change against the tree; write the undo file; delete; make; and last the
metadata of directories, since making things in them changes their mtimes. Nothing is touched before
the whole archive has been found good.
"""

from __future__ import annotations

import fcntl
import os
import stat

from . import member as kinds
from . import names, place, plan, regular, tarread, undo
from .errors import LayerError, failed
from .member import LayerStats
from .names import joined
from .plan import ENTRY, OPAQUE, WHITEOUT, Step
from .walk import Walker, remove

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Container
    from typing import BinaryIO

    from .names import Parts

    Path = str | os.PathLike[str]


def apply_layer(
    layer: BinaryIO,
    root_fd: int,
    undo_path: Path | None,
    *,
    shared: Container[Parts] | None = None,
    may_own: Callable[[int, int], bool] | None = None,
) -> LayerStats:
    """Apply a seekable layer to the directory open as `root_fd`, for instance the merged view of an overlay mount.

    undo_path: where the inverse layer goes before the first change; None for none. The file must not exist yet; while
    it exists, the root may be changed. `shared`, if given: others use the directory, too, so that what exists stays
    and is passed over, but the files of `shared`, which are replaced; if others have one open, that is an error.
    `may_own`, if given as well: it is a directory of others, to whom any name may belong. Of the layer only the files
    of `shared` are made, at its top, plain ones of a user and group of which this is true; that one exists is an error.

    Raises LayerError naming the entry. For a bad archive nothing was changed and there is no undo file. If a change
    itself fails (no space, a mount in the way), what was changed is put back and the undo file removed; should that
    fail too, the error says so and the undo file stays. The root must not be in use by others meanwhile. No symbolic
    link is followed, no mount below the root entered, no existing file written to: files are replaced.
    """
    with _walk(root_fd) as walker:
        steps = plan.make(tarread.members(layer), walker, devices=False)
        if shared is not None:
            needed = _with_links(steps, shared)
            if may_own is not None:
                steps = [step for step in steps if step.parts in needed]
                for step in steps:
                    _check_foreign(step, may_own)
            steps = [step for step in steps if _is_to_be_made(step, needed, walker)]
        if undo_path is not None:
            undo.write_undo(steps, root_fd, undo_path)
        try:
            return _carry_out(steps, walker, layer)
        except LayerError as error:
            if undo_path is None:
                raise
            try:
                undo_layer(undo_path, root_fd)
            except LayerError as second:
                raise LayerError(
                    error.entry, f"{error.cause}; putting back what was changed failed too: {second}"
                ) from error
            raise


def undo_layer(undo_path: Path, root_fd: int) -> bool:
    """Put back what `apply_layer` changed, after success or after being killed at any moment, and remove the undo file.

    Returns False if there is no undo file: then nothing was changed. A file that is not complete yet (undo_path +
    ".tmp") is removed. Raises LayerError; the undo file stays then, and the call can be repeated.
    """
    path = os.fspath(undo_path)
    try:
        if os.path.lexists(path + ".tmp"):
            os.unlink(path + ".tmp")
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
    except OSError as error:
        raise failed(path, "opening the undo file", error) from error
    with os.fdopen(fd, "rb", 1 << 16) as layer, _walk(root_fd) as walker:
        steps = plan.make(tarread.members(layer), walker, devices=True)
        _carry_out(steps, walker, layer)
    try:
        os.unlink(path)
        undo.sync_directory(path)
    except OSError as error:
        raise failed(path, "removing the undo file", error) from error
    return True


def _walk(root_fd: int) -> Walker:
    try:
        return Walker(root_fd)
    except OSError as error:
        raise failed("./", "opening the root filesystem", error) from error


def _with_links(steps: list[Step], needed: Container[Parts]) -> set[Parts]:
    """What is needed, by all its names: a hard link to another's file would be another file than the program had."""
    first = {step.parts: names.parse(step.member.link) for step in steps if step.member.kind == kinds.LINK}
    wanted = {first.get(step.parts, step.parts) for step in steps if step.parts in needed}
    return {step.parts for step in steps if first.get(step.parts, step.parts) in wanted}


def _is_to_be_made(step: Step, needed: Container[Parts], walker: Walker) -> bool:
    """Whether a step among others' files is to be taken. Raises LayerError."""
    if step.what != ENTRY:
        raise LayerError(joined(step.parts), "it is to be deleted, and may be in use by others")
    if step.found is None:
        return True
    if step.parts not in needed:
        return False  # a directory as well: its mode is not the snapshot's to say
    try:
        left = stat.S_ISREG(step.found.st_mode) and not _is_open(step.parts, walker, step.found)
    except OSError as error:
        raise failed(joined(step.parts), "looking whether it is in use", error) from error
    if not left:
        raise LayerError(joined(step.parts), "it is there already, and in use by others")
    return True


def _check_foreign(step: Step, may_own: Callable[[int, int], bool]) -> None:
    """Whether the container's own processes could have made this one. Raises LayerError."""
    member = step.member
    if step.what != ENTRY or member.kind not in (kinds.FILE, kinds.LINK) or len(step.parts) != 1:
        raise LayerError(joined(step.parts), "no file at the top of a directory that is not the container's own")
    if step.found is not None:
        raise LayerError(joined(step.parts), "it is there already, in a directory that is not the container's own")
    if member.kind == kinds.FILE and (not may_own(member.uid, member.gid) or member.mode & ~0o777 or member.xattrs):
        raise LayerError(joined(step.parts), "it has an owner, mode or xattr that the container could not give it")


def _is_open(parts: Parts, walker: Walker, found: os.stat_result) -> bool:
    """Whether another process has the file `found` open or mapped: such a one gets no lease (fcntl(2), F_SETLEASE).

    Kernels without IMA do not count who only reads.
    """
    fd = regular.open_regular(parts[-1], os.O_RDWR, walker.directory(parts[:-1]), known=found)
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _carry_out(steps: list[Step], walker: Walker, layer: BinaryIO) -> LayerStats:
    stats = LayerStats()
    with _walk(walker.directory(())) as sources:  # where hard links come from: two directories have to be open at once
        for step in steps:
            if step.what != ENTRY:
                _delete(step, walker, stats)
        for step in steps:
            if step.what == ENTRY:
                _make(step, walker, sources, layer)
                stats.entries += 1
                stats.data_bytes += sum(extent[1] for extent in step.member.extents)
    for step in steps:
        if step.what == ENTRY and step.member.kind == kinds.DIRECTORY:
            place.metadata(step.member, walker.directory(step.parts, step.member.name))
    return stats


def _delete(step: Step, walker: Walker, stats: LayerStats) -> None:
    try:
        if step.what == WHITEOUT:
            stats.whiteouts += 1
            if step.found is not None:
                remove(walker, step.parts)
        elif step.what == OPAQUE:
            stats.opaque += 1
            if step.over_directory:
                remove(walker, step.parts, keep_top=True)
    except OSError as error:
        raise failed(joined(step.parts), "deleting it", error) from error


def _make(step: Step, walker: Walker, sources: Walker, layer: BinaryIO) -> None:
    member = step.member
    parts = step.parts
    if member.kind == kinds.DIRECTORY and step.over_directory:
        return
    try:
        if step.found is not None:
            remove(walker, parts)
        fd = walker.directory(parts[:-1], member.name)
        if member.kind == kinds.DIRECTORY:
            os.mkdir(parts[-1], 0o700, dir_fd=fd)
        elif member.kind == kinds.LINK:
            target = names.parse(member.link)
            source = sources.directory(target[:-1], member.name)
            os.link(target[-1], parts[-1], src_dir_fd=source, dst_dir_fd=fd, follow_symlinks=False)
        else:
            place.make(member, fd, layer)
    except OSError as error:
        raise failed(member.name, "putting it in its place", error) from error
