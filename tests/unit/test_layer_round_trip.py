"""Overlay A's upper directory -> layer -> the merged view of overlay B, over one lower directory: the trees are equal.

Then the undo: B is what it was before. On real overlayfs mounts, so it needs root.
"""

from __future__ import annotations

import io
import os
import shutil
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rewarm_hooks.layer import LayerStats, apply_layer, undo_layer, write_layer
from rewarm_hooks.sparse import joined
from support.layers import Overlays, difference, picture

# struct vfs_cap_data, revision 2: effective, permitted CAP_NET_BIND_SERVICE
CAPABILITY = bytes.fromhex("0100000200040000000000000000000000000000")


@pytest.fixture
def overlays(tmp_path: Path) -> Iterator[Overlays]:
    made = Overlays(tmp_path)
    base_image(made.lower)
    yield made
    made.close()


def base_image(root: Path) -> None:
    for name in ("etc/app/conf.d", "usr/lib/deep/er", "var/empty", "home"):
        (root / name).mkdir(parents=True)
    for name in ("etc/passwd", "etc/app/a", "etc/app/b", "etc/app/conf.d/x", "usr/lib/deep/er/f", "usr/lib/one", "run"):
        (root / name).write_text(f"base {name}")
        os.utime(root / name, ns=(1, 1_600_000_000_123_456_789))
    os.link(root / "usr/lib/one", root / "usr/lib/two")
    (root / "lib").symlink_to("usr/lib")
    (root / "tmp").mkdir()
    (root / "tmp").chmod(0o1777)
    (root / "usr/lib/suid").write_bytes(b"suid")
    os.chown(root / "usr/lib/suid", 10, 20)
    (root / "usr/lib/suid").chmod(0o6755)
    os.setxattr(root / "etc/app", "user.base", b"dir")
    os.setxattr(root / "etc/passwd", "user.base", b"\0\xff")
    os.mkfifo(root / "var/pipe")
    os.mknod(root / "var/null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    (root / "étc").mkdir()
    for path in sorted(root.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            os.utime(path, ns=(5, 1_500_000_000_000_000_007))


def nothing(root: Path) -> None:
    pass


def modify(root: Path) -> None:
    with (root / "etc/passwd").open("a") as file:
        file.write("appended")


def metadata_only(root: Path) -> None:
    (root / "etc/app/a").chmod(0o400)
    os.chown(root / "etc/app/b", 1234, 5678)
    os.chown(root / "etc/app", 70000, 3_000_000_000)
    os.setxattr(root / "usr/lib", "user.new", b"v")
    os.utime(root / "home", ns=(7, 7_000_000_009))


def delete_file(root: Path) -> None:
    (root / "etc/app/a").unlink()


def delete_directory(root: Path) -> None:
    shutil.rmtree(root / "etc/app")
    shutil.rmtree(root / "usr")


def delete_specials(root: Path) -> None:
    (root / "var/pipe").unlink()
    (root / "var/null").unlink()
    (root / "lib").unlink()


def opaque(root: Path) -> None:
    shutil.rmtree(root / "etc/app")
    (root / "etc/app").mkdir()
    (root / "etc/app/b").write_text("new b")
    (root / "etc/app/conf.d").mkdir()
    (root / "etc/app/conf.d/new").write_text("new")


def opaque_empty(root: Path) -> None:
    shutil.rmtree(root / "usr/lib")
    (root / "usr/lib").mkdir(mode=0o750)


def directory_by_file(root: Path) -> None:
    shutil.rmtree(root / "etc/app")
    (root / "etc/app").write_text("a file now")
    shutil.rmtree(root / "usr/lib/deep")
    (root / "usr/lib/deep").symlink_to("/etc")


def file_by_directory(root: Path) -> None:
    (root / "etc/passwd").unlink()
    (root / "etc/passwd").mkdir()
    (root / "etc/passwd/in").write_text("in")
    (root / "lib").unlink()
    (root / "lib").mkdir()
    (root / "lib/so").write_text("so")
    (root / "var/pipe").unlink()
    (root / "var/pipe").mkdir()


def file_by_specials(root: Path) -> None:
    (root / "etc/app/a").unlink()
    os.mkfifo(root / "etc/app/a", 0o620)
    (root / "etc/app/b").unlink()
    (root / "etc/app/b").symlink_to("../../../../../outside")


def hard_links(root: Path) -> None:
    (root / "home/first").write_text("linked")
    os.link(root / "home/first", root / "home/second")
    (root / "a").mkdir()
    os.link(root / "home/first", root / "a/third")
    os.link(root / "etc/passwd", root / "home/passwd")  # copied up: both names come into the upper directory


def modify_linked(root: Path) -> None:
    (root / "usr/lib/one").unlink()
    (root / "usr/lib/two").unlink()
    (root / "usr/lib/one").write_text("new")


def extended_attributes(root: Path) -> None:
    path = root / "home/program"
    path.write_bytes(b"elf")
    os.chown(path, 33, 33)
    path.chmod(0o4711)
    os.setxattr(path, "security.capability", CAPABILITY)
    os.setxattr(path, "user.binary", bytes(range(256)))
    os.setxattr(path, "user.with=and%3D", b"=\n=")
    os.setxattr(path, "user.empty", b"")
    os.setxattr(path, "trusted.kept", b"t")
    os.removexattr(root / "etc/passwd", "user.base")
    os.removexattr(root / "etc/app", "user.base")
    (root / "home/link").symlink_to("nowhere")
    os.setxattr(root / "home/link", "trusted.on_link", b"l", follow_symlinks=False)
    os.mkfifo(root / "home/fifo")
    os.setxattr(root / "home/fifo", "trusted.on_fifo", b"f")


def access_lists(root: Path) -> None:
    # version 2; user:: rw-, user:1000 r--, group:: r--, mask:: r--, other:: ---
    entries = ((1, 6, 0xFFFFFFFF), (2, 4, 1000), (4, 4, 0xFFFFFFFF), (16, 4, 0xFFFFFFFF), (32, 0, 0xFFFFFFFF))
    value = (2).to_bytes(4, "little") + b"".join(
        tag.to_bytes(2, "little") + perm.to_bytes(2, "little") + who.to_bytes(4, "little") for tag, perm, who in entries
    )
    (root / "home/listed").write_text("x")
    os.setxattr(root / "home/listed", "system.posix_acl_access", value)
    (root / "home/inherited").mkdir()
    (root / "home/inherited/before").write_text("has no list of its own")
    os.setxattr(root / "home/inherited", "system.posix_acl_default", value)
    os.setxattr(root / "var", "system.posix_acl_default", value)
    (root / "var/after").write_text("inherits")
    (root / "var/without").write_text("inherited and removed")
    os.removexattr(root / "var/without", "system.posix_acl_access")


def times(root: Path) -> None:
    for index, stamp in enumerate(
        (0, 1, -1, -1_500_000_001, 999_999_999, 4_102_444_800_000_000_001, 2_000_000_000 * 10**9)
    ):
        path = root / f"home/{index}"
        path.write_text("t")
        os.utime(path, ns=(stamp, stamp))
    (root / "home/dated").symlink_to("0")
    os.utime(root / "home/dated", ns=(3, 1_234_567_890_123_456_789), follow_symlinks=False)
    (root / "home/dir/in").mkdir(parents=True)
    os.utime(root / "home/dir/in", ns=(1, 1_000_000_001))
    os.utime(root / "home/dir", ns=(1, 1_000_000_002))
    os.utime(root, ns=(1, 1_000_000_003))


def names(root: Path) -> None:
    base = os.fsencode(root)
    for name in (
        "ünïcödé 🐚".encode(), b"\xff\xfe not utf-8", b"new\nline", b"back\\slash", b" ", b"-rf", b"~", b"a" * 255,
        b"\xe9" * 255, b"..a", b"...", b".w", b"wh.", b"%s", b"=",
    ):  # fmt: skip
        with open(base + b"/home/" + name, "wb") as file:
            file.write(name)
        os.symlink(b"/" + name, base + b"/tmp/" + name)
        os.mkdir(base + b"/var/" + name)
    os.link(base + b"/home/" + b"\xe9" * 255, base + b"/" + b"l" * 200)
    os.rmdir(base + "/étc".encode())
    deep = base
    for _ in range(14):
        deep += b"/" + b"d" * 250
        os.mkdir(deep)
    with open(deep + b"/end", "wb") as file:
        file.write(b"deep")


def sparse_files(root: Path) -> None:
    with (root / "home/middle").open("wb") as file:
        file.seek(1 << 20)
        file.write(b"x" * 5000)
        file.seek(16 << 20)
        file.write(b"end")
    with (root / "home/tail").open("wb") as file:
        file.write(b"head" * 3000)
        file.truncate(10 << 20)
    with (root / "home/all").open("wb") as file:
        file.truncate(1 << 40)
        file.truncate((8 << 20) + 1)
    with (root / "home/many").open("wb") as file:
        for index in range(200):
            file.seek(index * 40960)
            file.write(b"%d" % index)
    (root / "home" / ("n" * 200)).write_bytes(b"")
    os.truncate(root / "home" / ("n" * 200), 1 << 20)
    os.link(root / "home/middle", root / "home/middle-2")


def rename_over(root: Path) -> None:
    (root / "home/new").write_text("new")
    (root / "home/new").rename(root / "etc/passwd")
    (root / "etc/app/a").rename(root / "etc/app/c")
    (root / "étc").mkdir(exist_ok=True)


def everything(root: Path) -> None:
    for change in (
        hard_links,
        extended_attributes,
        times,
        names,
        sparse_files,
        delete_specials,
        opaque,
        delete_file_in_usr,
    ):
        change(root)


def delete_file_in_usr(root: Path) -> None:
    shutil.rmtree(root / "usr/lib/deep")
    (root / "usr/lib/two").unlink()
    (root / "usr/lib/one").unlink()


CHANGES = [
    nothing,
    modify,
    metadata_only,
    delete_file,
    delete_directory,
    delete_specials,
    opaque,
    opaque_empty,
    directory_by_file,
    file_by_directory,
    file_by_specials,
    hard_links,
    modify_linked,
    extended_attributes,
    access_lists,
    times,
    names,
    sparse_files,
    rename_over,
]


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
