"""A container that is started again has the files that it wrote before: a snapshot does not take them from it.

On real overlayfs mounts, so it needs root.
"""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rewarm import layers, overlay
from rewarm.errors import RestoreError
from rewarm_hooks.layer import LayerError, apply_layer, undo_layer, write_layer
from support.changes import CHANGES, base_image, everything, sparse_files
from support.layers import Overlay, Overlays, difference, mount, picture, unmount


@pytest.fixture
def overlays(tmp_path: Path) -> Iterator[Overlays]:
    made = Overlays(tmp_path)
    base_image(made.lower)
    yield made
    made.close()


def layer_of(overlay: Overlay) -> bytes:
    out = io.BytesIO()
    write_layer(overlay.upper, out)
    return out.getvalue()


def applied(layer: bytes, overlay: Overlay, undo: Path) -> None:
    root, upper = (os.open(path, os.O_RDONLY | os.O_DIRECTORY) for path in (overlay.merged, overlay.upper))
    try:
        apply_layer(io.BytesIO(layer), root, undo, upper_fd=upper)
    finally:
        os.close(root)
        os.close(upper)


def undone(overlay: Overlay, undo: Path) -> None:
    root = os.open(overlay.merged, os.O_RDONLY | os.O_DIRECTORY)
    try:
        assert undo_layer(undo, root)
    finally:
        os.close(root)


@pytest.mark.parametrize("change", [*CHANGES, everything])
def test_started_again_with_nothing_of_its_own(
    overlays: Overlays, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    source, target = overlays.new(), overlays.new()
    change(source.merged)
    layer = layer_of(source)
    applied(layer, target, tmp_path / "first")
    applied(layer, target, tmp_path / "second")
    assert difference(picture(source.merged), picture(target.merged)) == {}


def program(root: Path) -> None:
    """What the source of the snapshot has done."""
    (root / "etc/motd").write_text("of the snapshot")
    (root / "data").mkdir()
    (root / "data/base").write_bytes(b"1" * 3000)
    os.link(root / "data/base", root / "data/second")
    (root / "data/link").symlink_to("base")
    (root / "data/empty").touch()
    (root / "data/folder").mkdir()
    (root / "etc/unwanted").unlink()
    shutil.rmtree(root / "emptied")
    (root / "emptied").mkdir()
    (root / "emptied/one").write_text("one")
    shutil.rmtree(root / "turned")
    (root / "turned").write_text("a file now")


@pytest.fixture
def layer(overlays: Overlays) -> bytes:
    for name in ("etc", "emptied", "turned"):
        (overlays.lower / name).mkdir(exist_ok=True)
    (overlays.lower / "etc/motd").write_text("of the image")
    (overlays.lower / "etc/unwanted").write_text("of the image")
    (overlays.lower / "emptied/before").write_text("of the image")
    (overlays.lower / "turned/before").write_text("of the image")
    source = overlays.new()
    program(source.merged)
    return layer_of(source)


def grown(root: Path) -> None:
    with (root / "data/base").open("ab") as file:
        file.write(b"more")


def other_bytes(root: Path) -> None:
    with (root / "data/base").open("r+b") as file:
        file.seek(2999)
        file.write(b"2")


def now_empty(root: Path) -> None:
    (root / "data/base").write_bytes(b"")


def other_link(root: Path) -> None:
    (root / "data/link").unlink()
    (root / "data/link").symlink_to("elsewhere")


def made_anew(root: Path) -> None:
    (root / "etc/unwanted").write_text("mine")


def a_directory_made_anew(root: Path) -> None:
    (root / "etc/unwanted/deep").mkdir(parents=True)
    (root / "etc/unwanted/deep/file").write_text("mine")


def in_what_is_emptied(root: Path) -> None:
    (root / "emptied/below").mkdir()
    (root / "emptied/below/two").write_text("mine")


def in_what_becomes_a_file(root: Path) -> None:
    (root / "turned").unlink()
    (root / "turned").mkdir()
    (root / "turned/two").write_text("mine")


def a_file_for_a_link(root: Path) -> None:
    (root / "data/link").unlink()
    (root / "data/link").write_text("mine")


def a_file_for_a_directory(root: Path) -> None:
    (root / "data/folder").rmdir()
    (root / "data/folder").write_text("mine")


def a_link_for_an_empty_file(root: Path) -> None:
    (root / "data/empty").unlink()
    (root / "data/empty").symlink_to("mine")


def closed_to_others(root: Path) -> None:
    (root / "data/base").chmod(0o600)


def given_away(root: Path) -> None:
    os.chown(root / "data/second", 1000, 1000)


@pytest.mark.parametrize(
    ("writes", "entry"),
    [
        (grown, "data/base"),
        (other_bytes, "data/base"),
        (other_link, "data/link"),
        (made_anew, "etc/unwanted"),
        (a_directory_made_anew, "etc/unwanted/deep/file"),
        (in_what_is_emptied, "emptied/below/two"),
        (in_what_becomes_a_file, "turned/two"),
        (a_file_for_a_link, "data/link"),
        (a_file_for_a_directory, "data/folder"),
        (a_link_for_an_empty_file, "data/empty"),
        (closed_to_others, "data/base"),
        (given_away, "data/"),
    ],
)
def test_what_it_has_written_itself_stays(
    overlays: Overlays, layer: bytes, tmp_path: Path, writes: Callable[[Path], None], entry: str
) -> None:
    target = overlays.new()
    applied(layer, target, tmp_path / "first")
    writes(target.merged)
    before = picture(target.merged)
    with pytest.raises(LayerError, match="has written it itself, in an earlier run") as caught:
        applied(layer, target, tmp_path / "second")
    assert caught.value.entry.startswith(entry)
    assert difference(before, picture(target.merged)) == {}
    assert not (tmp_path / "second").exists()


def test_of_a_cold_start_too(overlays: Overlays, layer: bytes, tmp_path: Path) -> None:
    """The container has never been restored: what it has changed of its image is its own."""
    target = overlays.new()
    (target.merged / "etc/motd").write_text("mine")
    with pytest.raises(LayerError, match=r"etc/motd: .* only a new container starts warm"):
        applied(layer, target, tmp_path / "undo")
    assert (target.merged / "etc/motd").read_text() == "mine"


@pytest.mark.parametrize("writes", [now_empty, lambda root: (root / "data/base").unlink()], ids=["emptied", "deleted"])
def test_what_is_not_there_is_not_lost(
    overlays: Overlays, layer: bytes, tmp_path: Path, writes: Callable[[Path], None]
) -> None:
    target = overlays.new()
    applied(layer, target, tmp_path / "first")
    writes(target.merged)
    applied(layer, target, tmp_path / "second")
    assert (target.merged / "data/base").read_bytes() == b"1" * 3000


def test_what_the_snapshot_does_not_touch_stays(overlays: Overlays, layer: bytes, tmp_path: Path) -> None:
    target = overlays.new()
    applied(layer, target, tmp_path / "first")
    (target.merged / "data/mine").write_text("mine")
    (target.merged / "etc/mine").write_text("mine")
    applied(layer, target, tmp_path / "second")
    assert [(target.merged / name).read_text() for name in ("data/mine", "etc/mine")] == ["mine", "mine"]


def test_what_runc_and_engines_make_to_mount_on(overlays: Overlays, layer: bytes, tmp_path: Path) -> None:
    """Before the hook runs, in an upper directory that is new: empty files and directories."""
    target = overlays.new()
    (target.merged / "etc/motd").write_text("")
    (target.merged / "data").mkdir(mode=0o700)
    (target.merged / "data/empty").mkdir()
    applied(layer, target, tmp_path / "undo")
    assert (target.merged / "etc/motd").read_text() == "of the snapshot"


def test_holes(overlays: Overlays, tmp_path: Path) -> None:
    source, target = overlays.new(), overlays.new()
    sparse_files(source.merged)
    made = layer_of(source)
    applied(made, target, tmp_path / "first")
    applied(made, target, tmp_path / "second")
    changed = [path for path in target.upper.rglob("*") if path.is_file() and path.stat().st_size > 1 << 16]
    assert changed
    for number, path in enumerate(changed):
        merged = target.merged / path.relative_to(target.upper)
        kept = merged.read_bytes()
        at = kept.index(bytes(4096))
        with merged.open("r+b") as file:
            file.seek(at + 4095)
            file.write(b"x")
        with pytest.raises(LayerError, match="has written it itself"):
            applied(made, target, tmp_path / f"again{number}")
        merged.write_bytes(kept)


def test_a_failed_restore_leaves_what_was(overlays: Overlays, layer: bytes, tmp_path: Path) -> None:
    """Undone, the upper directory has copies of what the image has: with those the container stays cold, no more."""
    target = overlays.new()
    before = picture(target.merged)
    applied(layer, target, tmp_path / "undo")
    undone(target, tmp_path / "undo")
    assert difference(before, picture(target.merged)) == {}
    with pytest.raises(LayerError, match="has written it itself"):
        applied(layer, target, tmp_path / "again")
    assert difference(before, picture(target.merged)) == {}


def test_the_hook_is_told_the_upper_directory(overlays: Overlays, tmp_path: Path) -> None:
    made = overlays.new()
    assert overlay.upper_of_mount(str(made.merged)) == str(made.upper)
    assert layers.hook("l", str(made.merged), "u")[-2:] == ["--upper", str(made.upper)]
    assert overlay.upper_of_mount(str(tmp_path)) is None
    assert "--upper" not in layers.hook("l", str(tmp_path), "u")


def test_an_overlay_that_nothing_can_be_written_to(tmp_path: Path) -> None:
    for name in ("one", "two", "merged"):
        (tmp_path / name).mkdir()
    mount("overlay", tmp_path / "merged", "overlay", f"lowerdir={tmp_path}/one:{tmp_path}/two")
    try:
        assert overlay.upper_of_mount(str(tmp_path / "merged")) is None
    finally:
        unmount(tmp_path / "merged")


def test_an_upper_directory_that_cannot_be_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Docker names it relative to a directory of its own when there are very many layers."""
    for name in ("lower", "id/diff", "id/work", "merged"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    mount("overlay", tmp_path / "merged", "overlay", "lowerdir=lower,upperdir=id/diff,workdir=id/work")
    try:
        monkeypatch.chdir("/")
        with pytest.raises(RestoreError, match="no upper directory 'id/diff' is here"):
            layers.hook("l", str(tmp_path / "merged"), "u")
    finally:
        unmount(tmp_path / "merged")
