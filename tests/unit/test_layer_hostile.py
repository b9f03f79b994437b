"""A snapshot is hostile input, and so is a container's own image: every bad archive is refused by name, with nothing
done.

Each archive begins with good members, which must not be applied either.
"""

from __future__ import annotations

import contextlib
import io
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rewarm_hooks import plan
from rewarm_hooks.layer import LayerError, apply_layer, undo_layer
from support.hostile import GOOD, refused, root
from support.layers import difference, mount, picture, unmount
from support.tars import BLOCK, END, directory, file, hard_link, header, pax, sparse, symlink

__all__ = ["root"]  # a fixture

NAMES = {
    "dotdot": (b"../escaped", "../escaped", ".."),
    "dotdot inside": (b"etc/../../escaped", "etc/../../escaped", ".."),
    "dotdot last": (b"etc/..", "etc/..", ".."),
    "dot inside": (b"etc/./x", "etc/./x", "component ."),
    "absolute": (b"/etc/cron.d/x", "/etc/cron.d/x", "absolute"),
    "absolute after dot": (b".//etc/x", ".//etc/x", "empty"),
    "double slash": (b"etc//x", "etc//x", "empty"),
    "empty component": (b"etc/", "etc/", "empty"),
    "only dot": (b".", ".", "component ."),
    "component too long": (b"etc/" + b"n" * 256, "etc/nnn", "256 bytes"),
    "path too long": (b"d/" * 2100 + b"x", "d/d/", "4201 bytes"),
    "control characters": (b"../\x1b[2J\n", "../\\x1b[2J\\n", ".."),
    "not UTF-8": (b"../\xff", "../\\xff", ".."),
}


@pytest.mark.parametrize(("name", "entry", "cause"), NAMES.values(), ids=NAMES.keys())
@pytest.mark.parametrize("kind", [b"0", b"2", b"6"])
def test_names_that_leave_the_root(root: Path, name: bytes, entry: str, cause: str, kind: bytes) -> None:
    link = b"etc" if kind == b"2" else b""
    error = refused(root, GOOD + pax((b"path", name)) + header(b"x", kind, link=link) + END)
    assert error.entry.startswith(entry)
    assert cause in error.cause


@pytest.mark.parametrize("name", [b"../d/", b"/d/", b"etc/../../d/", b"a//", b"./../d", b"//"])
def test_directory_names_that_leave_the_root(root: Path, name: bytes) -> None:
    assert refused(root, GOOD + pax((b"path", name)) + directory(b"x/") + END).entry == name.decode()


def test_names_with_a_nul_byte_or_empty(root: Path) -> None:
    error = refused(root, GOOD + pax((b"path", b"etc/pass\0wd")) + file(b"x") + END)
    assert (error.entry, error.cause) == ("etc/pass\\x00wd", "a NUL byte in the name")
    error = refused(root, GOOD + header(b"etc/pass\0wd") + END)
    assert (error.entry, error.cause) == ("etc/pass", "a NUL byte in the name")
    error = refused(root, GOOD + header(b"") + END)
    assert (error.entry, error.cause) == ("(empty name)", "an empty name")
    assert refused(root, GOOD + pax((b"path", b"")) + header(b"x") + END).cause == "an empty name"


def test_a_prefix_is_part_of_the_name(root: Path) -> None:
    assert refused(root, GOOD + header(b"x", fields={345: b"../.."}) + END).entry == "../../x"


THROUGH = {
    "planted and written through": (symlink(b"evil", b"../outside") + file(b"evil/x"), "evil/x", "makes a file of"),
    "planted absolute": (symlink(b"evil", b"/etc") + file(b"evil/passwd"), "evil/passwd", "makes a file of"),
    "planted deep": (symlink(b"dir/evil", b"..") + file(b"dir/evil/a/b"), "dir/evil/a/b", "makes a file of"),
    "over a directory": (symlink(b"dir", b"../outside") + file(b"dir/sub/x"), "dir/sub/x", "makes a file of"),
    "a file of the layer": (file(b"f") + file(b"f/x"), "f/x", "makes a file of"),
    "a link of the image": (file(b"tmp/x"), "tmp/x", "is a link or a file"),
    "below a link of the image": (file(b"tmp/sub/x"), "tmp/sub/x", "is a link or a file"),
    "up through the image": (file(b"dir/up/escaped"), "dir/up/escaped", "is a link or a file"),
    "a directory below a link": (directory(b"tmp/d/"), "tmp/d/", "is a link or a file"),
    "a whiteout below a link": (header(b"tmp/.wh.passwd"), "tmp/.wh.passwd", "is a link or a file"),
    "a file of the image": (file(b"etc/passwd/x"), "etc/passwd/x", "is a link or a file"),
    "a missing directory": (file(b"nowhere/x"), "nowhere/x", "No such file"),
    "a deleted directory": (header(b".wh.dir") + file(b"dir/sub/x"), "dir/sub/x", "deletes"),
    "an emptied directory": (
        directory(b"dir/") + header(b"dir/.wh..wh..opq") + file(b"dir/sub/x"), "dir/sub/x", "does not make before it",
    ),
    "a new directory": (directory(b"new/") + file(b"new/sub/x"), "new/sub/x", "does not make before it"),
    "made too late": (file(b"dir/x") + directory(b"dir/"), "dir/", "after entries for what is in it"),
    "deleted too late": (file(b"dir/sub/x") + header(b".wh.dir"), ".wh.dir", "after entries for what is in it"),
    "link for its directory": (file(b"dir/x") + symlink(b"dir", b"/etc"), "dir", "after entries for what is in it"),
}  # fmt: skip


@pytest.mark.parametrize(("members", "entry", "cause"), THROUGH.values(), ids=THROUGH.keys())
def test_nothing_goes_through_a_link_or_into_what_is_not_there(
    root: Path, members: bytes, entry: str, cause: str
) -> None:
    error = refused(root, GOOD + members + END)
    assert error.entry == entry
    assert cause in error.cause


def test_a_link_of_the_image_is_replaced_and_not_followed(root: Path) -> None:
    before = picture(root.parent / "outside")
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    members = directory(b"tmp/") + file(b"tmp/x") + file(b"file-link") + header(b"dir/.wh.up")
    apply_layer(io.BytesIO(members + END), fd, root.parent / "node/undo")
    assert difference(before, picture(root.parent / "outside")) == {}
    assert (root / "tmp/x").read_text() == "planted"
    assert stat.S_ISREG((root / "file-link").lstat().st_mode)
    assert undo_layer(root.parent / "node/undo", fd)
    os.close(fd)
    assert (root / "tmp").readlink() == root.parent / "outside"
    assert (root / "file-link").is_symlink()
    assert (root / "dir/up").is_symlink()
    assert difference(before, picture(root.parent / "outside")) == {}


LINKS = {
    "dotdot": b"../outside/passwd",
    "absolute": b"/etc/passwd",
    "through a link": b"tmp/passwd",
    "to a link of the image": b"file-link",
    "to a file of the image": b"etc/passwd",
    "to a link of the layer": b"planted",
    "to a directory of the layer": b"made",
    "to a deleted file": b"doomed",
    "to a whiteout": b".wh.doomed",
    "to a FIFO": b"pipe",
    "to itself": b"linked",
    "to a later file": b"later",
    "to nothing": b"nothing",
    "dot": b".",
    "empty component": b"made//in",
}


@pytest.mark.parametrize("target", LINKS.values(), ids=LINKS.keys())
def test_a_hard_link_reaches_nothing_but_an_earlier_file_of_the_layer(root: Path, target: bytes) -> None:
    members = (
        symlink(b"planted", b"/etc/passwd") + header(b"pipe", b"6") + hard_link(b"linked", target) + file(b"later")
    )
    error = refused(root, GOOD + members + END)
    assert error.entry in ("linked", target.decode())


@pytest.mark.parametrize(("kind", "target"), [(b"1", b""), (b"2", b""), (b"0", b"x"), (b"5", b"x"), (b"2", b"n\0n")])
def test_link_targets_that_make_no_sense(root: Path, kind: bytes, target: bytes) -> None:
    error = refused(root, GOOD + pax((b"linkpath", target)) + header(b"odd", kind) + END)
    assert error.entry == "odd"
    assert "link target" in error.cause


@pytest.mark.parametrize(
    "name",
    [b".wh...", b".wh..", b".wh.", b"etc/.wh...", b".wh..wh.plnk", b"etc/.wh..wh.aufs", b".wh..wh..opq/x", b".wh.a/b"],
)
def test_whiteouts_that_make_no_sense(root: Path, name: bytes) -> None:
    assert refused(root, GOOD + header(name) + END).entry == name.decode()


def test_markers_that_are_not_empty_files(root: Path) -> None:
    for member in (file(b".wh.etc"), symlink(b".wh.etc", b"x"), header(b".wh.etc", b"6"), file(b"made/.wh..wh..opq")):
        assert "not an empty file" in refused(root, GOOD + member + END).cause
    assert "mean deletions" in refused(root, GOOD + directory(b".wh.etc/") + END).cause


def test_opaque_markers_need_their_directory(root: Path) -> None:
    assert "no earlier entry makes" in refused(root, GOOD + header(b"etc/.wh..wh..opq") + END).cause
    assert "no earlier entry makes" in refused(root, file(b"good") + header(b".wh..wh..opq") + END).cause


@pytest.mark.parametrize(
    "member",
    [
        file(b"good"), file(b"./good"), directory(b"made/"), directory(b"./"), header(b".wh.good"), file(b"doomed"),
        header(b".wh.doomed"), symlink(b"made", b"x"), hard_link(b"good", b"made/in"), header(b".wh.made"),
    ],
)  # fmt: skip
def test_a_name_used_twice(root: Path, member: bytes) -> None:
    assert "second" in refused(root, GOOD + member + END).cause
    assert "second" in refused(root, GOOD + header(b"made/.wh..wh..opq") * 2 + END).cause


@pytest.mark.parametrize("kind", [b"3", b"4"])
@pytest.mark.parametrize("numbers", [(1, 1), (8, 0), (1, 3), (0, 0)])
def test_device_nodes(root: Path, kind: bytes, numbers: tuple[int, int]) -> None:
    error = refused(root, GOOD + header(b"dev", kind, device=numbers) + END)
    assert (error.entry, error.cause) == ("dev", "a device node, which a layer may not make")


def test_a_link_that_appears_after_the_check_is_not_followed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The root should be at rest; if it is not, that must not lead out of it either."""
    outside = picture(root.parent / "outside")
    real = plan.make

    def plant(*arguments: Any, **options: Any) -> list[plan.Step]:
        steps = real(*arguments, **options)
        (root / "file").symlink_to(root.parent / "outside/passwd")
        (root / "late").symlink_to(root.parent / "outside/new")
        (root / "dir").rename(root / "was-dir")
        (root / "dir").symlink_to(root.parent / "outside")
        return steps

    monkeypatch.setattr(plan, "make", plant)
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    for members in (file(b"file"), file(b"late"), file(b"dir/x"), file(b"dir/sub/x"), header(b"dir/.wh.passwd")):
        with contextlib.suppress(LayerError):
            apply_layer(io.BytesIO(members + END), fd, None)
        for planted in ("file", "late", "dir"):
            (root / planted).unlink()
        (root / "was-dir").rename(root / "dir")
    os.close(fd)
    assert difference(outside, picture(root.parent / "outside")) == {}


def test_a_mount_below_the_root_is_not_entered(root: Path) -> None:
    (root / "volume").mkdir()
    mount("none", root / "volume", "tmpfs", "size=1m")
    try:
        (root / "volume/data").write_text("the user's")
        for members in (
            file(b"volume/x"), header(b"volume/.wh.data"), header(b".wh.volume"), file(b"volume"),
            directory(b"volume/"), directory(b"volume/") + header(b"volume/.wh..wh..opq"),
        ):  # fmt: skip
            assert "is a mount" in refused(root, GOOD + members + END).cause
        assert (root / "volume/data").read_text() == "the user's"
    finally:
        unmount(root / "volume")


def test_a_deep_name_is_refused_and_not_walked_by_recursion(root: Path) -> None:
    deep = b"/".join([b"d"] * 2000)
    assert "No such file" in refused(root, GOOD + pax((b"path", deep)) + header(b"x") + END).cause


def test_a_real_name_that_means_a_deletion_cannot_be_undone_so_it_is_not_deleted(root: Path) -> None:
    (root / "dir/.wh.x").write_text("of the image")
    error = refused(root, GOOD + header(b".wh.dir") + END)
    assert (error.entry, ".wh." in error.cause) == ("dir/.wh.x", True)


BASE = GOOD + sparse(b"sparse", 5000, b"2\n0\n3\n4000\n1000\n", b"d" * 1003) + pax((b"path", b"./made/\xc3\xa9"), (
    b"SCHILY.xattr.user.a", b"v"), (b"mtime", b"1.5")) + symlink(b"x", b"../../outside") + END  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.lists(st.tuples(st.integers(0, len(BASE) - 1), st.binary(min_size=1, max_size=8)), max_size=6),
    fix=st.booleans(),
)
def test_no_damage_to_an_archive_gets_out(root: Path, changes: list[tuple[int, bytes]], fix: bool) -> None:
    archive = bytearray(BASE)
    for offset, value in changes:
        archive[offset : offset + len(value)] = value
    if fix:  # right checksums wherever a header may stand, so that the damage gets past them
        for at in range(0, len(archive) - BLOCK + 1, BLOCK):
            if archive[at + 257 : at + 262] == b"ustar":
                archive[at + 148 : at + 156] = b" " * 8
                archive[at + 148 : at + 156] = b"%06o\0 " % sum(archive[at : at + BLOCK])
    undo = root.parent / "node/undo"
    outside, before = picture(root.parent / "outside"), picture(root)
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        apply_layer(io.BytesIO(archive), fd, undo)
        assert difference(outside, picture(root.parent / "outside")) == {}
        undo_layer(undo, fd)
    except LayerError:
        pass  # refused, which is what most damage deserves; what counts is below
    finally:
        os.close(fd)
    assert not undo.exists()
    assert difference(outside, picture(root.parent / "outside")) == {}
    assert difference(before, picture(root)) == {}
