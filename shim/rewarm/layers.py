"""Rootfs diffs outside of the hook: a capture writes them, a container's own changes are looked for before one is
applied, the content of /dev/shm goes in, a failed restore's changes come out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from rewarm import overlay
from rewarm.errors import RestoreError


class Rights(NamedTuple):
    """Of a container in a directory that it shares (rewarm_hooks.sharing)."""

    may_own: Callable[[int, int | None], bool]
    may_make: Callable[[os.stat_result], bool]
    foreign: bool


def write(path: Path, tree: str | Path, extra: Mapping[str, str]) -> None:
    """Write the layer of a directory tree, with more files: name -> what opens it. A tree in which nothing changed
    gives no layer, and so no hook at the restore. Raises LayerError and OSError."""
    from rewarm_hooks.layer import write_layer

    with path.open("wb") as out:
        stats = write_layer(tree, out, extra=sorted(extra.items()))
    if not stats.entries:
        path.unlink()


def check_own(root: str, layer: str | None) -> None:
    """The container has run before, and has files in its root filesystem that the snapshot, of which `layer` is the
    layer, would replace, or whose content its program would not know of. Raises RestoreError."""
    try:
        upper = overlay.upper_of_mount(root)
        if upper is not None and _has_any(upper):
            _check_own(root, upper, layer)
    except OSError as error:
        cause = f"{error.filename or 'its files'}: {error.strerror or error}"
        raise RestoreError("find the container's own changes in", root, cause, "make a new container") from error


def _check_own(root: str, upper: str, layer: str | None) -> None:
    from rewarm_hooks import own  # containerd's and Docker's new containers do not come here
    from rewarm_hooks.layer import LayerError

    with ExitStack() as stack:
        upper_fd = _open(upper)
        stack.callback(os.close, upper_fd)
        root_fd = _open(root)
        stack.callback(os.close, root_fd)
        file = None if layer is None else stack.enter_context(open(layer, "rb"))
        try:
            own.check(upper_fd, root_fd, overlay.lower_directories("self", root), file)
        except LayerError as error:
            # An engine that copies files in before each start does so into the new one, too.
            advice = "make a new container, or capture one that has these files"
            raise RestoreError("put the snapshot's files into", root, str(error), advice) from error


def apply(layer: str, root: str, undo: str, opened: Iterable[bytes], rights: Rights) -> None:
    """Add what is in the layer file to the directory tree `root`; `undo` becomes the layer that turns it back.

    Containers of one pod share such a tree, and it outlives each of them: what is there already stays, as on a volume,
    and what the container could not have made there itself is not made. But what the program has open, the names
    `opened`, has to be as it was: what an earlier run of the container has left there is replaced. Raises RestoreError,
    also if somebody has that open.
    """
    from rewarm_hooks.layer import LayerError, apply_layer  # few restores come here
    from rewarm_hooks.sharing import Sharing

    fd = _open(root)
    try:
        with open(layer, "rb") as file:
            names = {tuple(name.split(b"/")) for name in opened}
            sharing = Sharing(names, rights.may_own, rights.may_make, foreign=rights.foreign)
            apply_layer(file, fd, undo, sharing=sharing)
    except LayerError as error:
        raise RestoreError("apply layer to", root, str(error)) from error
    finally:
        os.close(fd)


def undo(root: str, layer: str) -> None:
    """Turn `root` back by its undo layer."""
    from rewarm_hooks.layer import LayerError, undo_layer

    fd = _open(root)
    try:
        undo_layer(layer, fd)
    except LayerError as error:
        raise RestoreError("undo changes of", root, str(error), "delete the container and create it anew") from error
    finally:
        os.close(fd)


def _has_any(directory: str) -> bool:
    with os.scandir(directory) as found:
        return next(found, None) is not None


def _open(root: str) -> int:
    try:
        return os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise RestoreError("open directory", root, error.strerror or str(error)) from error
