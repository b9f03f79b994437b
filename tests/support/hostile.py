"""A root filesystem with hostile links of its own, and the check that a bad archive does nothing to it or beside it."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest

from rewarm_hooks.layer import LayerError, apply_layer

from .layers import Picture, difference, picture
from .tars import directory, file, header

GOOD = directory(b"./") + file(b"good") + directory(b"made/") + file(b"made/in") + header(b".wh.doomed")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """rootfs and, beside it, what no archive may reach; the image has hostile links of its own."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "passwd").write_text("root:x")
    (tmp_path / "node").mkdir()  # the node's own, where the undo file goes
    root = tmp_path / "rootfs"
    (root / "etc").mkdir(parents=True)
    (root / "dir/sub").mkdir(parents=True)
    (root / "etc/passwd").write_text("image")
    (root / "doomed").write_text("doomed")
    (root / "tmp").symlink_to(outside)
    (root / "dir/up").symlink_to("../..")
    (root / "file-link").symlink_to(outside / "passwd")
    return root


def refused(root: Path, archive: bytes) -> LayerError:
    """Apply `archive`, which must fail with the whole of the surroundings untouched; returns the error."""
    before = surroundings(root)
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with pytest.raises(LayerError) as caught:
            apply_layer(io.BytesIO(archive), fd, root.parent / "node/undo")
    finally:
        os.close(fd)
    assert difference(before, surroundings(root)) == {}
    assert os.listdir(root.parent / "node") == []
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    return caught.value


def surroundings(root: Path) -> Picture:
    """The root and all beside it but for the node's own directory, whose times an undo file changes."""
    return {path: seen for path, seen in picture(root.parent).items() if path != b"node"}
