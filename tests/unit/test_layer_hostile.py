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
from support.layers import Picture, difference, mount, picture, unmount
from support.tars import BLOCK, END, directory, file, hard_link, header, pax, record, sparse, symlink

GOOD = directory(b"./") + file(b"good") + directory(b"made/") + file(b"made/in") + header(b".wh.doomed")
LIMIT = 2**63


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


@pytest.mark.parametrize("kind", [b"7", b"g", b"L", b"K", b"S", b"D", b"V", b"X", b"\xff"])
def test_member_types_that_are_not_known(root: Path, kind: bytes) -> None:
    error = refused(root, GOOD + header(b"odd", kind) + END)
    assert error.entry == "odd"
    assert "type" in error.cause


SPARSE = {
    "beyond the end": (10, b"1\n5\n6\n", b"123456"),
    "offset beyond the end": (10, b"1\n11\n0\n", b""),
    "overlap": (100, b"2\n0\n6\n5\n6\n", b"x" * 12),
    "backwards": (100, b"2\n50\n6\n0\n6\n", b"x" * 12),
    "claims more data than stored": (1 << 60, b"1\n0\n1000000000000\n", b"x"),
    "claims less data than stored": (100, b"1\n0\n1\n", b"x" * 50),
    "great offset and length": (LIMIT - 1, b"2\n9000000000000000000\n9000000000000000000\n1\n1\n", b""),
    "many extents": (100, b"999999999999\n0\n1\n", b"x"),
    "more extents than lines": (100, b"3\n0\n1\n", b"x"),
    "negative": (100, b"1\n-1\n1\n", b"x"),
    "not numbers": (100, b"one\n", b""),
    "digits without end": (100, b"1" * 512, b""),
    "empty lines": (100, b"1\n\n\n", b""),
    "size too great": (LIMIT, b"0\n", b""),
    "size negative": (b"-1", b"0\n", b""),
    "size no number": (b"1e9", b"0\n", b""),
}


@pytest.mark.parametrize(("size", "text", "data"), SPARSE.values(), ids=SPARSE.keys())
def test_sparse_maps_that_lie(root: Path, size: int | bytes, text: bytes, data: bytes) -> None:
    assert refused(root, GOOD + sparse(b"sparse", size, text, data) + END).entry == "sparse"


def test_sparse_forms_that_are_not_known(root: Path) -> None:
    for records in (
        ((b"GNU.sparse.major", b"0"), (b"GNU.sparse.minor", b"1"), (b"GNU.sparse.realsize", b"1")),
        ((b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0")),
        ((b"GNU.sparse.major", b"1"), (b"GNU.sparse.realsize", b"1")),
    ):
        assert "sparse file in another form" in refused(root, GOOD + pax(*records) + file(b"s") + END).cause
    assert "GNU.sparse.map" in refused(root, GOOD + pax((b"GNU.sparse.map", b"0,1")) + file(b"s") + END).cause


def test_a_size_that_no_filesystem_takes_is_put_back(root: Path) -> None:
    """What only the change itself can find out is undone on the spot."""
    assert refused(root, GOOD + sparse(b"sparse", LIMIT - 1, b"0\n") + END).entry == "sparse"


PAX = {
    "repeated": (record(b"path", b"a") * 2, "two records path"),
    "unknown": (record(b"VENDOR.x", b"a"), "unknown record VENDOR.x"),
    "length too great": (b"99 path=a\n", "not well formed"),
    "length too small": (b"3 path=a\n", "not well formed"),
    "length zero": (b"0 path=a\n", "not well formed"),
    "length absent": (b"path=a\n", "not well formed"),
    "length without end": (b"1" * 600, "not well formed"),
    "length no number": (b"x path=a\n\n", "not well formed"),
    "no newline": (b"9 path=abc", "not well formed"),
    "no equals": (b"7 path\n", "not well formed"),
    "no key": (b"5 =a\n", "not well formed"),
    "uid": (record(b"uid", b"-1"), "uid"),
    "uid that means keep": (record(b"uid", b"4294967295"), "uid"),
    "gid": (record(b"gid", b"0x10"), "gid"),
    "size": (record(b"size", b"1e3"), "size"),
    "size too great": (record(b"size", b"9" * 18), "truncated"),
    "mtime": (record(b"mtime", b"nan"), "mtime"),
    "mtime too great": (record(b"mtime", b"9" * 16), "mtime"),
    "mtime fraction": (record(b"mtime", b"1.-5"), "mtime"),
    "overlay's own mark": (record(b"SCHILY.xattr.trusted.overlay.redirect", b"/etc"), "trusted.overlay.redirect"),
    "overlay's own mark, user": (record(b"SCHILY.xattr.user.overlay.opaque", b"y"), "user.overlay.opaque"),
    "LSM label": (record(b"SCHILY.xattr.security.selinux", b"x"), "security.selinux"),
    "xattr of no namespace": (record(b"SCHILY.xattr.system.evil", b"x"), "system.evil"),
    "xattr without a name": (record(b"SCHILY.xattr.user.", b"x"), "user."),
    "xattr with a NUL": (record(b"SCHILY.xattr.user.a\0b", b"x"), "user.a"),
    "xattr name too long": (record(b"SCHILY.xattr.user." + b"n" * 255, b"x"), "user.nnn"),
    "xattr too great": (record(b"SCHILY.xattr.user.a", bytes(65537)), "65537"),
}


@pytest.mark.parametrize(("body", "cause"), PAX.values(), ids=PAX.keys())
def test_extended_headers_that_are_not_well_formed(root: Path, body: bytes, cause: str) -> None:
    extended = header(b"PaxHeaders/x", b"x", size=len(body)) + body + b"\0" * (-len(body) % BLOCK)
    assert cause in str(refused(root, GOOD + extended + file(b"odd") + END))


def test_extended_headers_in_the_wrong_place(root: Path) -> None:
    extended = pax((b"path", b"a"))
    assert "without a member" in refused(root, GOOD + extended + END).cause
    assert "two extended headers" in refused(root, GOOD + extended * 2 + file(b"x") + END).cause
    assert "at most" in refused(root, GOOD + header(b"x", b"x", size=1 << 30) + END).cause


FIELDS = {
    "checksum": (148, b"0000001\0"),
    "magic": (257, b"ustar  \0"),
    "no magic": (257, bytes(8)),
    "size": (124, b"9"),
    "size in base 256": (124, b"\x80"),
    "negative size": (124, b"-0000000001"),
    "mode": (100, b"7777777"),
    "mode no number": (100, b"abc"),
    "uid": (108, b"+1"),
    "mtime": (136, b"x"),
    "device": (329, b"?"),
}


@pytest.mark.parametrize(("offset", "value"), FIELDS.values(), ids=FIELDS.keys())
def test_header_fields_that_are_not_well_formed(root: Path, offset: int, value: bytes) -> None:
    block = header(b"odd", fields={offset: value})
    if offset == 148:
        block = block[:148] + value + block[156:]
    refused(root, GOOD + block + END)


@pytest.mark.parametrize("kind", [b"1", b"2", b"5", b"6"])
def test_data_in_members_that_have_none(root: Path, kind: bytes) -> None:
    link = b"good" if kind in b"12" else b""
    error = refused(root, GOOD + header(b"odd", kind, size=5, link=link) + bytes(BLOCK) + END)
    assert (error.entry, "data in a member" in error.cause) == ("odd", True)


def test_every_truncation(root: Path) -> None:
    whole = GOOD + sparse(b"sparse", 5000, b"2\n0\n3\n4000\n1000\n", b"d" * 1003) + file(b"last", b"l" * 700) + END
    for length in [*range(0, len(whole), BLOCK), 1, 511, len(whole) - 1, len(whole) - BLOCK - 1]:
        assert "truncated" in refused(root, whole[:length]).cause


def test_an_end_marker_of_one_block_is_damage(root: Path) -> None:
    assert "second block" in refused(root, GOOD + bytes(BLOCK) + file(b"x") + END).cause


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
