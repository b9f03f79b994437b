"""Overlay A's upper directory -> layer -> the merged view of overlay B, over one lower directory: the trees are equal.

Then the undo: B is what it was before. On real overlayfs mounts, so it needs root.
"""

from __future__ import annotations

import io
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rewarm_hooks.layer import LayerStats, apply_layer, undo_layer, write_layer
from rewarm_hooks.sparse import joined
from support.changes import CHANGES, base_image, everything, sparse_files
from support.layers import Overlays, difference, picture


@pytest.fixture
def overlays(tmp_path: Path) -> Iterator[Overlays]:
    made = Overlays(tmp_path)
    base_image(made.lower)
    yield made
    made.close()


def captured(upper: Path) -> tuple[bytes, LayerStats]:
    out = io.BytesIO()
    stats = write_layer(upper, out)
    return out.getvalue(), stats


def applied(layer: bytes, root: Path, undo: Path | None) -> LayerStats:
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return apply_layer(io.BytesIO(layer), fd, undo)
    finally:
        os.close(fd)


def undone(undo: Path, root: Path) -> bool:
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return undo_layer(undo, fd)
    finally:
        os.close(fd)


@pytest.mark.parametrize("change", [*CHANGES, everything])
def test_what_changed_in_one_overlay_comes_back_in_another_and_goes_again(
    overlays: Overlays, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    source, target = overlays.new(), overlays.new()
    before = picture(target.merged)
    change(source.merged)
    layer, stats = captured(source.upper)

    seen = applied(layer, target.merged, tmp_path / "undo")
    assert difference(picture(source.merged), picture(target.merged)) == {}
    assert (seen.entries, seen.whiteouts, seen.opaque) == (stats.entries, stats.whiteouts, stats.opaque)
    assert seen.data_bytes == stats.data_bytes
    assert captured(target.upper)[1].entries >= stats.entries

    assert undone(tmp_path / "undo", target.merged)
    assert difference(before, picture(target.merged)) == {}
    assert not (tmp_path / "undo").exists()
    assert not undone(tmp_path / "undo", target.merged)


def test_undo_puts_the_content_back_but_not_the_link_to_a_file_that_the_layer_does_not_mention(
    overlays: Overlays, tmp_path: Path
) -> None:
    source, target = overlays.new(), overlays.new()
    (source.merged / "usr/lib/one").unlink()
    before = picture(target.merged)
    applied(captured(source.upper)[0], target.merged, tmp_path / "undo")
    undone(tmp_path / "undo", target.merged)
    after = picture(target.merged)
    assert difference(before, after).keys() == {b"usr/lib/one", b"usr/lib/two"}
    assert [after[name][:6] for name in (b"usr/lib/one", b"usr/lib/two")] == [before[b"usr/lib/one"][:6]] * 2


def test_holes_stay_holes(overlays: Overlays, tmp_path: Path) -> None:
    source, target = overlays.new(), overlays.new()
    sparse_files(source.merged)
    layer, stats = captured(source.upper)
    applied(layer, target.merged, None)
    assert len(layer) < 2 << 20
    assert stats.data_bytes < 2 << 20
    for name in ("middle", "tail", "all", "many"):
        blocks = [(overlay.upper / "home" / name).stat().st_blocks for overlay in (source, target)]
        assert blocks[0] == blocks[1] < 4000


def test_the_same_upper_directory_gives_the_same_bytes(overlays: Overlays) -> None:
    source = overlays.new()
    everything(source.merged)
    first, second = captured(source.upper)[0], captured(source.upper)[0]
    assert first == second


def test_a_plain_directory_is_a_layer_of_all_that_is_in_it(overlays: Overlays, tmp_path: Path) -> None:
    """The content of a /dev/shm that is a bind mount goes this way."""
    source, target = tmp_path / "shm", tmp_path / "other shm"
    source.mkdir(mode=0o1777)
    source.chmod(0o1777)
    target.mkdir()
    (target / "kept").write_text("not of the layer")
    (source / "sem.x").write_bytes(bytes(32))
    (source / "psm").write_bytes(b"p" * 9000)
    layer, _ = captured(source)
    applied(layer, target, tmp_path / "undo")
    (target / "kept").unlink()
    os.utime(target, ns=(0, source.stat().st_mtime_ns))
    assert difference(picture(source), picture(target)) == {}


def test_a_layer_read_from_and_written_to_files(overlays: Overlays, tmp_path: Path) -> None:
    """Unbuffered ones, which may read and write less than they are asked to."""
    source, target = overlays.new(), overlays.new()
    everything(source.merged)
    with (tmp_path / "layer").open("wb", buffering=0) as out:
        write_layer(source.upper, out)
    fd = os.open(target.merged, os.O_PATH | os.O_DIRECTORY)
    with (tmp_path / "layer").open("rb", buffering=0) as layer:
        apply_layer(layer, fd, tmp_path / "undo")
    os.close(fd)
    assert difference(picture(source.merged), picture(target.merged)) == {}


def test_sockets_are_left_out_and_named(overlays: Overlays, tmp_path: Path) -> None:
    source, target = overlays.new(), overlays.new()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(source.merged / "home/s"))
    (source.merged / "home/after").write_text("x")
    layer, stats = captured(source.upper)
    applied(layer, target.merged, None)
    assert stats.sockets == ["home/s"]
    assert not (target.merged / "home/s").exists()
    assert (target.merged / "home/after").exists()


def test_no_descriptor_is_left_open(overlays: Overlays, tmp_path: Path) -> None:
    source, target = overlays.new(), overlays.new()
    everything(source.merged)
    before = os.listdir("/proc/self/fd")
    applied(captured(source.upper)[0], target.merged, tmp_path / "undo")
    undone(tmp_path / "undo", target.merged)
    assert os.listdir("/proc/self/fd") == before


def test_a_captured_restored_container_can_be_captured_again(overlays: Overlays) -> None:
    source, target, third = overlays.new(), overlays.new(), overlays.new()
    everything(source.merged)
    applied(captured(source.upper)[0], target.merged, None)
    (target.merged / "home/more").write_text("more")
    applied(captured(target.upper)[0], third.merged, None)
    assert difference(picture(target.merged), picture(third.merged)) == {}


def test_a_file_with_too_many_holes_gets_fewer() -> None:
    scattered = [(index * 10_000, 100) for index in range(1000)] + [(50_000_000, 7)]
    few = joined(scattered, 100)
    assert few == [(0, 9_990_100), (50_000_000, 7)]
    assert joined(scattered, 1) == [(0, 50_000_007)]
    assert joined(scattered, 1001) == scattered
