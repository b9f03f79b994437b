"""A container that is started again has the files that it wrote before: a snapshot does not take them from it.

On real overlayfs mounts, so it needs root.
"""

from __future__ import annotations

import io
import os
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rewarm import layers, overlay
from rewarm.errors import RestoreError
from rewarm_hooks import alike, own
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


def check(layer: bytes, made: Overlay) -> None:
    root, upper = (os.open(path, os.O_RDONLY | os.O_DIRECTORY) for path in (made.merged, made.upper))
    try:
        own.check(upper, root, overlay.lower_directories("self", str(made.merged)), io.BytesIO(layer))
    finally:
        os.close(root)
        os.close(upper)


def applied(layer: bytes, overlay: Overlay, undo: Path) -> None:
    check(layer, overlay)
    root = os.open(overlay.merged, os.O_RDONLY | os.O_DIRECTORY)
    try:
        apply_layer(io.BytesIO(layer), root, undo)
    finally:
        os.close(root)


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
def image(overlays: Overlays) -> Path:
    for name in ("etc", "emptied", "turned"):
        (overlays.lower / name).mkdir(exist_ok=True)
    (overlays.lower / "etc/motd").write_text("of the image")
    (overlays.lower / "etc/unwanted").write_text("of the image")
    (overlays.lower / "emptied/before").write_text("of the image")
    (overlays.lower / "turned/before").write_text("of the image")
    return overlays.lower


@pytest.fixture
def layer(overlays: Overlays, image: Path) -> bytes:
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


def marked(root: Path) -> None:
    os.setxattr(root / "data/base", "user.mine", b"mine")


def beside_what_the_snapshot_has(root: Path) -> None:
    """The program of the snapshot would not read it, and perhaps write over it."""
    (root / "data/dump").write_text("mine")


def a_file_of_the_image(root: Path) -> None:
    (root / "etc/other").write_text("mine")


def a_new_link(root: Path) -> None:
    (root / "etc/current").symlink_to("mine")


def deleted_what_the_snapshot_makes(root: Path) -> None:
    """One of the image, so that there is a trace of it."""
    (root / "etc/motd").unlink()


def deleted_with_its_directory(root: Path) -> None:
    shutil.rmtree(root / "etc")


def deleted_with_its_directory_and_made_anew(root: Path) -> None:
    """An opaque directory, in which nothing is."""
    shutil.rmtree(root / "etc")
    (root / "etc").mkdir()


def deleted_with_its_directory_and_a_file_instead(root: Path) -> None:
    shutil.rmtree(root / "etc")
    (root / "etc").touch()


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
        (given_away, "data/base"),  # the same file
        (marked, "data/base"),
        (beside_what_the_snapshot_has, "data/dump"),
        (a_file_of_the_image, "etc/other"),
        (a_new_link, "etc/current"),
        (deleted_what_the_snapshot_makes, "etc/motd"),
        (deleted_with_its_directory, "etc/motd"),
        (deleted_with_its_directory_and_made_anew, "etc/motd"),
        (deleted_with_its_directory_and_a_file_instead, "etc/motd"),
    ],
)
def test_what_it_has_written_itself_stays(
    overlays: Overlays, layer: bytes, tmp_path: Path, writes: Callable[[Path], None], entry: str
) -> None:
    target = overlays.new()
    applied(layer, target, tmp_path / "first")
    writes(target.merged)
    before = picture(target.merged)
    with pytest.raises(LayerError, match=r"the container has (its own there|deleted it)") as caught:
        check(layer, target)
    assert caught.value.entry == entry
    assert difference(before, picture(target.merged)) == {}


def test_of_a_cold_start_too(overlays: Overlays, layer: bytes) -> None:
    """The container has never been restored: what it has changed of its image is its own."""
    target = overlays.new()
    (target.merged / "etc/motd").write_text("mine")
    with pytest.raises(LayerError, match=r"etc/motd: the container has its own there"):
        check(layer, target)


@pytest.mark.parametrize("writes", [now_empty, lambda root: (root / "data/base").unlink()], ids=["emptied", "deleted"])
def test_what_is_not_there_is_not_lost(
    overlays: Overlays, layer: bytes, tmp_path: Path, writes: Callable[[Path], None]
) -> None:
    target = overlays.new()
    applied(layer, target, tmp_path / "first")
    writes(target.merged)
    applied(layer, target, tmp_path / "second")
    assert (target.merged / "data/base").read_bytes() == b"1" * 3000


def test_what_runc_and_engines_make_to_mount_on(overlays: Overlays, layer: bytes, tmp_path: Path) -> None:
    """Before the hook runs, in an upper directory that is new: empty files and directories."""
    target = overlays.new()
    (target.merged / "etc/motd").write_text("")
    (target.merged / "data").mkdir(mode=0o700)
    (target.merged / "data/empty").mkdir()
    (target.merged / "etc/mtab").symlink_to("/proc/mounts")
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
    for path in changed:
        merged = target.merged / path.relative_to(target.upper)
        kept = merged.read_bytes()
        at = kept.index(bytes(4096))
        with merged.open("r+b") as file:
            file.seek(at + 4095)
            file.write(b"x")
        with pytest.raises(LayerError, match="has its own there"):
            check(made, target)
        merged.write_bytes(kept)


@pytest.mark.parametrize("change", [*CHANGES, everything, program])
def test_after_a_failed_restore_that_was_undone(
    overlays: Overlays, image: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    """The upper directory has copies of what the image has: nothing of its own."""
    source, target = overlays.new(), overlays.new()
    change(source.merged)
    layer = layer_of(source)
    before = picture(target.merged)
    applied(layer, target, tmp_path / "undo")
    undone(target, tmp_path / "undo")
    assert difference(before, picture(target.merged)) == {}
    check(layer, target)
    (target.merged / "etc/motd").write_text("not the same")
    with pytest.raises(LayerError, match="etc/motd: the container has its own there"):
        check(layer, target)


def test_many_layers_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer is opened once, not for each file: a restore that was undone can leave many thousand of them."""
    files, layers_ = 500, 40
    for name in ("upper", "work", "merged"):
        (tmp_path / name).mkdir()
    for number in range(layers_):
        (tmp_path / f"l{number}/usr/lib/deep/below").mkdir(parents=True)
    for number in range(files):
        (tmp_path / f"l{layers_ - 1}/usr/lib/deep/below/{number}").write_text("of the image")
    lower = ":".join(f"{tmp_path}/l{number}" for number in range(layers_))
    options = f"lowerdir={lower},upperdir={tmp_path}/upper,workdir={tmp_path}/work"
    mount("overlay", tmp_path / "merged", "overlay", options)
    try:
        for path in (tmp_path / "merged/usr/lib/deep/below").iterdir():
            path.write_text("of the image")
        calls, opens = [], os.open

        def counted(*asked: Any, **more: Any) -> int:
            calls.append(asked[0])
            return opens(*asked, **more)

        monkeypatch.setattr(os, "open", counted)
        layers.check_own(str(tmp_path / "merged"), None)
        monkeypatch.undo()
        # The file and the image's, looked at and opened, and a way down each tree.
        assert len(calls) <= 4 * files + 20 * layers_ + 50
    finally:
        unmount(tmp_path / "merged")


@pytest.mark.parametrize("hidden", ["", "opaque", "deleted", "a file"])
def test_what_the_image_has_in_several_layers(tmp_path: Path, hidden: str) -> None:
    for name in ("one/dir", "two/dir/deep", "upper", "work", "merged"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "two/dir/file").write_text("of the image")
    (tmp_path / "two/dir/deep/file").write_text("of the image")
    if hidden == "opaque":
        os.setxattr(tmp_path / "one/dir", "trusted.overlay.opaque", b"y")
    if hidden == "deleted":
        os.mknod(tmp_path / "one/dir/file", stat.S_IFCHR, 0)
    if hidden == "a file":
        (tmp_path / "one/dir").rmdir()
        (tmp_path / "one/dir").write_text("in its place")
    options = f"lowerdir={tmp_path}/one:{tmp_path}/two,upperdir={tmp_path}/upper,workdir={tmp_path}/work"
    mount("overlay", tmp_path / "merged", "overlay", options)
    try:
        assert (tmp_path / "merged/dir/file").exists() == (not hidden)
        if hidden == "a file":
            (tmp_path / "merged/dir").unlink()
            (tmp_path / "merged/dir").mkdir()
        (tmp_path / "merged/dir/deep").mkdir(exist_ok=True)
        (tmp_path / "merged/dir/deep/file").write_text("of the image")
        if hidden != "deleted":
            layers_own(tmp_path / "merged", "dir/deep/file" if hidden else "")
        (tmp_path / "merged/dir/deep/file").unlink()
        (tmp_path / "merged/dir/file").write_text("of the image")
        if hidden:
            layers_own(tmp_path / "merged", "dir/file")
        else:
            layers_own(tmp_path / "merged", "")
    finally:
        unmount(tmp_path / "merged")


def layers_own(root: Path, name: str) -> None:
    """Checks that `name` is what is the container's own; "" for nothing."""
    if not name:
        layers.check_own(str(root), None)
        return
    with pytest.raises(RestoreError, match=f" {name}: the container has its own there"):
        layers.check_own(str(root), None)


def test_what_engines_make_by_themselves(overlays: Overlays, tmp_path: Path) -> None:
    """NVIDIA's hooks, with other names and content each time; and a place for a time zone, where there was a link."""
    (overlays.lower / "etc").mkdir(exist_ok=True)
    (overlays.lower / "etc/localtime").symlink_to("/usr/share/zoneinfo/UTC")
    source, target = overlays.new(), overlays.new()
    for made, number in ((source, "1"), (target, "2")):
        (made.merged / "etc/ld.so.conf.d").mkdir()
        (made.merged / f"etc/ld.so.conf.d/00-nvcr-{number}.conf").write_text("/usr/lib/nvidia")
        (made.merged / f"etc/ld.so.conf.d/00-compat-{number}.conf").write_text("/usr/local/cuda/compat")
        (made.merged / "etc/ld-musl-x86_64.path").write_text(number)
        (made.merged / "etc/ld.so.cache").write_text(number)
        (made.merged / "etc/localtime").unlink()
    (source.merged / "etc/localtime").touch()
    check(layer_of(source), target)
    (target.merged / "etc/ld.so.conf.d/mine.conf").write_text("mine")
    with pytest.raises(LayerError, match=r"mine\.conf: the container has its own there"):
        check(layer_of(source), target)


def test_many_extents(overlays: Overlays, tmp_path: Path) -> None:
    source, target = overlays.new(), overlays.new()
    with (source.merged / "map").open("wb") as file:
        for number in range(4000):
            file.seek(number * 8192)
            file.write(b"x")
    made = layer_of(source)
    applied(made, target, tmp_path / "first")
    check(made, target)
    with (target.merged / "map").open("r+b") as file:
        file.seek(3999 * 8192)
        file.write(b"y")
    with pytest.raises(LayerError, match="map: the container has its own there"):
        check(made, target)


def test_large_holes_are_not_read(overlays: Overlays, tmp_path: Path) -> None:
    source, target = overlays.new(), overlays.new()
    with (source.merged / "map").open("wb") as file:
        file.truncate(1 << 40)
        file.seek(1 << 39)
        file.write(b"data")
    made = layer_of(source)
    applied(made, target, tmp_path / "first")
    check(made, target)
    with (target.merged / "map").open("r+b") as file:
        file.seek(1 << 35)
        file.write(b"x")
    with pytest.raises(LayerError, match="map: the container has its own there"):
        check(made, target)


@pytest.mark.parametrize("option", ["redirect_dir=on", "metacopy=on"])
def test_a_directory_that_was_moved(overlays: Overlays, layer: bytes, tmp_path: Path, option: str) -> None:
    """Its files are in a lower directory still."""
    (overlays.lower / "releases/next").mkdir(parents=True)
    (overlays.lower / "releases/next/file").write_text("of the image")
    target = overlays.new(f",{option}")
    applied(layer, target, tmp_path / "first")
    check(layer, target)
    (target.merged / "releases/next").rename(target.merged / "releases/current")
    assert not (target.upper / "releases/current/file").exists()
    with pytest.raises(LayerError, match="releases/current: the container has its own there"):
        check(layer, target)


def test_only_the_owner_was_changed(overlays: Overlays, tmp_path: Path) -> None:
    """With metacopy the upper directory has none of the content."""
    source, target = overlays.new(), overlays.new(",metacopy=on")
    (overlays.lower / "large").write_bytes(b"1" * 100_000)
    os.chown(source.merged / "large", 1000, 1000)
    os.chown(target.merged / "large", 1000, 1000)
    check(layer_of(source), target)
    os.chown(target.merged / "large", 1001, 1000)
    with pytest.raises(LayerError, match="large: the container has its own there"):
        check(layer_of(source), target)


def test_deep_directories(overlays: Overlays, layer: bytes) -> None:
    target = overlays.new()
    fd = os.open(target.merged, os.O_RDONLY)
    for _ in range(1000):
        os.mkdir("d", dir_fd=fd)
        os.mkdir("e", dir_fd=fd)
        below = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)
    with pytest.raises(LayerError, match="more than 128 directories deep"):
        check(layer, target)
    subprocess.run(["rm", "-r", target.merged / "d"], check=True)


def test_things_that_are_not_opened(overlays: Overlays, layer: bytes, tmp_path: Path) -> None:
    """FIFOs, sockets and devices say nothing; where the snapshot has a file, neither is lost with them."""
    target = overlays.new()
    applied(layer, target, tmp_path / "first")
    for name in ("etc/motd", "data/base"):
        (target.merged / name).unlink()
    os.mkfifo(target.merged / "data/base")
    os.mknod(target.merged / "etc/null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(target.merged / "etc/motd", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    check(layer, target)


def test_more_than_can_be_looked_at(overlays: Overlays, layer: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own, "_MOST", 100)
    target = overlays.new()
    for number in range(50):
        (target.merged / str(number)).touch()
        (target.merged / f"d{number}").mkdir()
    check(layer, target)
    (target.merged / "d7/one more").touch()
    with pytest.raises(LayerError, match="the container has made or changed more than 100 files"):
        check(layer, target)


def test_names_before_content(
    overlays: Overlays, layer: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights may lie in the layer: they are not read where a small thing speaks against it."""
    target = overlays.new()
    applied(layer, target, tmp_path / "first")
    (target.merged / "zz").write_text("mine")
    monkeypatch.setattr(alike, "opened", None)
    with pytest.raises(LayerError, match="zz: the container has its own there"):
        check(layer, target)


def test_no_layer(overlays: Overlays) -> None:
    """The source had changed nothing: what the container has is its own."""
    target = overlays.new()
    layers.check_own(str(target.merged), None)
    (target.merged / "etc").mkdir(exist_ok=True)
    layers.check_own(str(target.merged), None)
    (target.merged / "etc/mine").write_text("mine")
    with pytest.raises(RestoreError, match=r"etc/mine: the container has its own there.*make a new container"):
        layers.check_own(str(target.merged), None)


def test_other_kinds_of_root_filesystem(overlays: Overlays, tmp_path: Path) -> None:
    """They do not tell what is the image's. Part of an overlay is the root of somebody else's container."""
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain/file").write_text("of whoever")
    assert overlay.upper_of_mount(str(tmp_path / "plain")) is None
    layers.check_own(str(tmp_path / "plain"), None)
    outer = overlays.new()
    (outer.merged / "inner").mkdir()
    (outer.merged / "inner/file").write_text("of whoever")
    (tmp_path / "bound").mkdir()
    subprocess.run(["mount", "--bind", outer.merged / "inner", tmp_path / "bound"], check=True)
    try:
        assert overlay.upper_of_mount(str(tmp_path / "bound")) is None
    finally:
        unmount(tmp_path / "bound")


@pytest.mark.parametrize("name", ["a,b", "a b", "a=b", "a#b", "a\nb"])
def test_names_of_upper_directories(tmp_path: Path, name: str) -> None:
    made = tmp_path / name
    for part in ("lower", "upper", "work", "merged"):
        (made / part).mkdir(parents=True)
    escaped = str(made).replace(",", "\\,")
    options = f"lowerdir={escaped}/lower,upperdir={escaped}/upper,workdir={escaped}/work"
    mount("overlay", made / "merged", "overlay", options)
    try:
        assert overlay.upper_of_mount(str(made / "merged")) == str(made / "upper")
    finally:
        unmount(made / "merged")


def test_an_overlay_that_nothing_can_be_written_to(tmp_path: Path) -> None:
    for name in ("one", "two", "merged"):
        (tmp_path / name).mkdir()
    mount("overlay", tmp_path / "merged", "overlay", f"lowerdir={tmp_path}/one:{tmp_path}/two")
    try:
        assert overlay.upper_of_mount(str(tmp_path / "merged")) is None
    finally:
        unmount(tmp_path / "merged")


def test_an_overlay_that_another_mount_hides(overlays: Overlays) -> None:
    """What lies at its path is not what mountinfo says of it: another upper directory would be looked at."""
    made = overlays.new()
    mount("tmpfs", made.merged.parent, "tmpfs", "size=1m")
    try:
        made.merged.mkdir()
        with pytest.raises(RestoreError, match="hidden by another mount"):
            layers.check_own(str(made.merged), None)
    finally:
        unmount(made.merged.parent)


def test_an_upper_directory_that_cannot_be_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Docker names it relative to a directory of its own when there are very many layers."""
    for name in ("lower", "id/diff", "id/work", "merged"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    mount("overlay", tmp_path / "merged", "overlay", "lowerdir=lower,upperdir=id/diff,workdir=id/work")
    try:
        monkeypatch.chdir("/")
        with pytest.raises(RestoreError, match="no upper directory 'id/diff' is here"):
            layers.check_own(str(tmp_path / "merged"), None)
    finally:
        unmount(tmp_path / "merged")
