"""An OCI image layer -> the root filesystem of a container that is not running yet, and back.

The story: read every header; plan every change against the tree; write the undo file; delete; make; and last the
metadata of directories, since making things in them changes their mtimes. Nothing is touched before
the whole archive has been found good.
"""

from __future__ import annotations

import os

from . import member as kinds
from . import names, place, plan, tarread, undo
from .errors import LayerError, failed
from .member import LayerStats
from .names import joined
from .plan import ENTRY, OPAQUE, WHITEOUT, Step
from .walk import Walker, remove

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import BinaryIO

    from .sharing import Sharing

    Path = str | os.PathLike[str]


def apply_layer(
    layer: BinaryIO,
    root_fd: int,
    undo_path: Path | None,
    *,
    sharing: Sharing | None = None,
) -> LayerStats:
    """Apply a seekable layer to the directory open as `root_fd`, for instance the merged view of an overlay mount.

    undo_path: where the inverse layer goes before the first change; None for none. The file must not exist yet; while
    it exists, the root may be changed. `sharing`, if given: others use the directory, too.

    Raises LayerError naming the entry. For a bad archive nothing was changed and there is no undo file. If a change
    itself fails (no space, a mount in the way), what was changed is put back and the undo file removed; should that
    fail too, the error says so and the undo file stays. The root must not be in use by others meanwhile. No symbolic
    link is followed, no mount below the root entered, no existing file written to: files are replaced.
    """
    with _walk(root_fd) as walker:
        steps = plan.make(tarread.members(layer), walker, devices=False)
        if sharing is not None:
            steps = sharing.of(steps, walker)
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
