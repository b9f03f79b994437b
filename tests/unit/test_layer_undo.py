"""The undo file: whatever moment an apply or an undo is stopped at, undoing gives the tree that there was before."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rewarm_hooks.layer import LayerError, apply_layer, undo_layer, write_layer
from support.layers import Overlays, difference, mount, picture, unmount
from support.tars import END, directory, file, header

CALLS = (
    "unlink", "rmdir", "mkdir", "link", "symlink", "mknod", "open", "ftruncate", "write", "fchown", "fchmod", "chown",
    "chmod", "setxattr", "removexattr", "utime", "rename", "fsync",
)  # fmt: skip


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the code under test handles it."""


class Counter:
    """Lets `allowed` system calls through, then stops the program, or fails with an errno from then on."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, allowed: int, code: int = 0, calls: tuple[str, ...] = CALLS
    ) -> None:
        self.left = allowed
        self._code = code
        for name in calls:
            monkeypatch.setattr(os, name, self._wrapped(getattr(os, name)))

    def _wrapped(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if self.left == 0:
                raise OSError(self._code, os.strerror(self._code)) if self._code else Killed
            self.left -= 1
            return real(*args, **options)

        return call


@pytest.fixture
def overlays(tmp_path: Path) -> Iterator[Overlays]:
    made = Overlays(tmp_path)
    for name in ("dir/deep", "opaque/sub", "gone/a/b", "becomes-file/x"):
        (made.lower / name).mkdir(parents=True)
    for name in (
        "file",
        "dir/f",
        "dir/deep/g",
        "opaque/sub/h",
        "opaque/i",
        "gone/a/j",
        "gone/k",
        "becomes-file/l",
        "becomes-dir",
    ):
        (made.lower / name).write_text(name * 10)
    os.link(made.lower / "gone/k", made.lower / "gone/a/linked")
    (made.lower / "link").symlink_to("dir")
    os.setxattr(made.lower / "dir", "user.x", b"1")
    yield made
    made.close()


@pytest.fixture
def layer(overlays: Overlays) -> bytes:
    source = overlays.new().merged
    (source / "file").write_text("changed")
    (source / "dir/deep/g").unlink()
    (source / "dir/new").write_text("new")
    os.link(source / "dir/new", source / "dir/newer")
    shutil.rmtree(source / "opaque")
    (source / "opaque/other").mkdir(parents=True)
    (source / "opaque/i").write_text("other")
    shutil.rmtree(source / "gone")
    shutil.rmtree(source / "becomes-file")
    (source / "becomes-file").write_text("file")
    (source / "becomes-dir").unlink()
    (source / "becomes-dir/in").mkdir(parents=True)
    (source / "link").unlink()
    (source / "link").symlink_to("elsewhere")
    os.mkfifo(source / "pipe")
    os.setxattr(source / "dir", "user.x", b"2")
    out = io.BytesIO()
    write_layer(source.parent / "upper", out)
    return out.getvalue()


def opened(root: Path) -> int:
    return os.open(root, os.O_RDONLY | os.O_DIRECTORY)


def test_killed_at_every_system_call(
    overlays: Overlays, layer: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First the apply is stopped after n calls, then the undo after n calls, then the undo runs to its end."""
    target = overlays.new().merged
    undo = tmp_path / "undo"
    before = picture(target)
    root = opened(target)
    finished = False
    stops = seen_partial = 0
    while not finished:
        with monkeypatch.context() as patch:
            Counter(patch, stops)
            try:
                apply_layer(io.BytesIO(layer), root, undo)
                finished = True
            except Killed:
                pass  # as meant
        seen_partial += undo.exists()
        with monkeypatch.context() as patch:
            Counter(patch, stops)
            with contextlib.suppress(Killed):
                undo_layer(undo, root)
        undo_layer(undo, root)
        assert difference(before, picture(target)) == {}, f"stopped after {stops} calls"
        assert not undo.exists()
        assert not Path(f"{undo}.tmp").exists()
        stops += 1
    os.close(root)
    assert stops > 100
    assert seen_partial > 60


@pytest.mark.parametrize(
    "call", ["write", "mkdir", "link", "symlink", "mknod", "setxattr", "utime", "fchmod", "unlink", "rmdir"]
)
def test_a_change_that_fails_is_put_back_at_once(
    overlays: Overlays, layer: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    target = overlays.new().merged
    before = picture(target)
    root = opened(target)
    real = getattr(os, call)
    with monkeypatch.context() as patch:
        failing = Counter(patch, 0, errno.ENOSPC, (call,))

        def once(*args: Any, **options: Any) -> Any:
            if failing.left == 0:
                failing.left = -1  # only the first fails
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args, **options)

        patch.setattr(os, call, once)
        with pytest.raises(LayerError, match="No space left on device") as caught:
            apply_layer(io.BytesIO(layer), root, tmp_path / "undo")
    os.close(root)
    assert "failed too" not in str(caught.value)
    assert difference(before, picture(target)) == {}
    assert not (tmp_path / "undo").exists()


def test_a_full_filesystem(tmp_path: Path) -> None:
    """For real: the layer does not fit, and its space is given back."""
    small = tmp_path / "small"
    small.mkdir()
    mount("none", small, "tmpfs", "size=2m")
    try:
        (small / "kept").write_bytes(b"k" * 4096)
        before = picture(small)
        root = opened(small)
        archive = (
            directory(b"./")
            + file(b"kept", b"other")
            + file(b"a", b"a" * (1 << 20))
            + file(b"b", b"b" * (4 << 20))
            + END
        )
        with pytest.raises(LayerError, match=r"b: .*No space left on device"):
            apply_layer(io.BytesIO(archive), root, tmp_path / "undo")
        os.close(root)
        assert difference(before, picture(small)) == {}
    finally:
        unmount(small)


def test_a_full_filesystem_under_the_undo_file_changes_nothing(
    overlays: Overlays, layer: bytes, tmp_path: Path
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mount("none", small, "tmpfs", "size=4k")
    target = overlays.new().merged
    before = picture(target)
    root = opened(target)
    try:
        with pytest.raises(LayerError, match="undo: writing the undo file: No space left on device"):
            apply_layer(io.BytesIO(layer), root, small / "undo")
        assert os.listdir(small) == []
    finally:
        os.close(root)
        unmount(small)
    assert difference(before, picture(target)) == {}


def test_a_failing_put_back_says_so_and_keeps_the_undo_file(
    overlays: Overlays, layer: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = overlays.new().merged
    before = picture(target)
    root = opened(target)
    with monkeypatch.context() as patch:
        Counter(patch, 0, errno.EIO, ("utime",))
        with pytest.raises(LayerError, match="putting back what was changed failed too"):
            apply_layer(io.BytesIO(layer), root, tmp_path / "undo")
    assert undo_layer(tmp_path / "undo", root)
    os.close(root)
    assert difference(before, picture(target)) == {}


def test_an_undo_file_in_the_way_is_not_replaced(overlays: Overlays, layer: bytes, tmp_path: Path) -> None:
    target = overlays.new().merged
    root = opened(target)
    apply_layer(io.BytesIO(layer), root, tmp_path / "undo")
    kept, after = (tmp_path / "undo").read_bytes(), picture(target)
    with pytest.raises(LayerError, match="was not undone"):
        apply_layer(io.BytesIO(layer), root, tmp_path / "undo")
    os.close(root)
    assert (tmp_path / "undo").read_bytes() == kept
    assert difference(after, picture(target)) == {}


def test_a_second_layer_over_the_first_is_undone_to_the_first(overlays: Overlays, layer: bytes, tmp_path: Path) -> None:
    target = overlays.new().merged
    root = opened(target)
    before = picture(target)
    apply_layer(io.BytesIO(layer), root, tmp_path / "undo")
    first = picture(target)
    apply_layer(io.BytesIO(layer), root, tmp_path / "undo-2")
    assert difference(first, picture(target)) == {}
    undo_layer(tmp_path / "undo-2", root)
    assert difference(first, picture(target)) == {}
    undo_layer(tmp_path / "undo", root)
    os.close(root)
    assert difference(before, picture(target)) == {}


def test_a_whole_root_that_is_opaque(tmp_path: Path) -> None:
    target = tmp_path / "root"
    (target / "old/deep").mkdir(parents=True)
    (target / "old/deep/file").write_text("old")
    before = picture(target)
    root = opened(target)
    apply_layer(io.BytesIO(directory(b"./") + header(b".wh..wh..opq") + file(b"new") + END), root, tmp_path / "undo")
    assert os.listdir(target) == ["new"]
    undo_layer(tmp_path / "undo", root)
    os.close(root)
    assert difference(before, picture(target)) == {}


def test_the_undo_file_is_private_and_no_link_is_followed_to_it(
    overlays: Overlays, layer: bytes, tmp_path: Path
) -> None:
    root = opened(overlays.new().merged)
    (tmp_path / "victim").write_text("victim")
    (tmp_path / "undo.tmp").symlink_to(tmp_path / "victim")
    with pytest.raises(LayerError, match="undo"):
        apply_layer(io.BytesIO(layer), root, tmp_path / "undo")
    assert (tmp_path / "victim").read_text() == "victim"
    (tmp_path / "undo.tmp").unlink()
    apply_layer(io.BytesIO(layer), root, tmp_path / "undo")
    assert (tmp_path / "undo").stat().st_mode & 0o7777 == 0o600
    os.close(root)


def test_a_damaged_undo_file_changes_nothing(overlays: Overlays, layer: bytes, tmp_path: Path) -> None:
    target = overlays.new().merged
    root = opened(target)
    apply_layer(io.BytesIO(layer), root, tmp_path / "undo")
    after = picture(target)
    whole = (tmp_path / "undo").read_bytes()
    (tmp_path / "undo").write_bytes(whole[:-600])
    with pytest.raises(LayerError, match="truncated"):
        undo_layer(tmp_path / "undo", root)
    os.close(root)
    assert difference(after, picture(target)) == {}
