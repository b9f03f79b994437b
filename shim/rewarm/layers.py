"""Rootfs diffs outside of the hook: the content of /dev/shm goes in, a failed restore's changes come out."""

from __future__ import annotations

import os

from rewarm.errors import RestoreError


def apply(layer: str, root: str, undo: str) -> None:
    """Add what is in the layer file to the directory tree `root`; `undo` becomes the layer that turns it back.

    Containers of one pod share such a tree, so what is there already is never changed. Raises RestoreError.
    """
    from rewarm_hooks.layer import LayerError, apply_layer  # few restores come here

    fd = _open(root)
    try:
        with open(layer, "rb") as file:
            apply_layer(file, fd, undo, replace=False)
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


def _open(root: str) -> int:
    try:
        return os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise RestoreError("open directory", root, error.strerror or str(error)) from error
