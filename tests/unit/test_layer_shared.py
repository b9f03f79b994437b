"""A layer among files of others, as a pod's /dev/shm has them: nothing of theirs is changed."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rewarm.oci.users import User
from rewarm_hooks import dump, sharing
from rewarm_hooks.layer import LayerError, apply_layer, undo_layer, write_layer
from rewarm_hooks.sharing import Sharing
from support.opens import Planted

SEMAPHORE, REMAP = (b"sem.x",), (b"link_remap.5",)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    made = tmp_path / "root"
    made.mkdir()
    made.chmod(0o1777)
    return made


@pytest.fixture
def layer(tmp_path: Path) -> bytes:
    """Of a source with a semaphore that is open, by the name that CRIU gave it as well, a file, and a directory."""
    source = tmp_path / "source"
    (source / "side").mkdir(parents=True)
    (source / "side").chmod(0o777)
    (source / "side" / "file").write_text("source")
    (source / "sem.x").write_text("source")
    os.link(source / "sem.x", source / "link_remap.5")
    source.chmod(0o755)
    out = io.BytesIO()
    write_layer(source, out)
    return out.getvalue()


@contextmanager
def opened(root: Path) -> Iterator[int]:
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)


def apply(layer: bytes, root: Path, needed: set[tuple[bytes, ...]]) -> None:
    with opened(root) as fd:
        rights = Sharing(needed, lambda user, group: True, lambda directory: True)
        apply_layer(io.BytesIO(layer), fd, root.parent / "undo", sharing=rights)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_directories_of_others_keep_their_mode(root: Path, layer: bytes) -> None:
    (root / "side").mkdir(mode=0o700)
    before = (root / "side").stat().st_mtime_ns
    apply(layer, root, set())
    assert (mode(root), mode(root / "side")) == (0o1777, 0o700)
    assert (root / "side" / "file").read_text() == "source"
    assert (root / "side").stat().st_mtime_ns != before
    with opened(root) as fd:
        undo_layer(root.parent / "undo", fd)
    assert (mode(root), mode(root / "side"), list((root / "side").iterdir())) == (0o1777, 0o700, [])


@pytest.mark.parametrize("kind", ["file", "link", "directory"])
def test_what_is_there_stays(root: Path, layer: bytes, kind: str) -> None:
    other = root / "sem.x"
    if kind == "file":
        other.write_text("other")
    elif kind == "link":
        other.symlink_to("/etc/passwd")
    else:
        other.mkdir()
    inode = other.lstat().st_ino
    apply(layer, root, set())
    assert other.lstat().st_ino == inode
    assert kind != "file" or other.read_text() == "other"


@pytest.mark.parametrize("needed", [{REMAP}, {SEMAPHORE}, {REMAP, SEMAPHORE}])
def test_what_is_open_comes_back_by_all_its_names(root: Path, layer: bytes, needed: set[tuple[bytes, ...]]) -> None:
    """CRIU opens link_remap.5: linked to what another has left at sem.x the program would have another semaphore."""
    (root / "sem.x").write_text("stale")
    apply(layer, root, needed)
    assert (root / "link_remap.5").read_text() == (root / "sem.x").read_text() == "source"
    assert (root / "link_remap.5").stat().st_ino == (root / "sem.x").stat().st_ino
    with opened(root) as fd:
        undo_layer(root.parent / "undo", fd)
    assert (root / "sem.x").read_text() == "stale" and not (root / "link_remap.5").exists()


def test_what_others_have_open_is_not_taken_away(root: Path, layer: bytes) -> None:
    with (root / "sem.x").open("w") as held:
        held.write("other")
        held.flush()
        with pytest.raises(LayerError, match="in use by others"):
            apply(layer, root, {REMAP})
    assert [path.name for path in root.iterdir()] == ["sem.x"] and (root / "sem.x").read_text() == "other"


def test_a_fifo_is_not_waited_for(root: Path, layer: bytes) -> None:
    os.mkfifo(root / "sem.x")
    with pytest.raises(LayerError, match="in use by others"):
        apply(layer, root, {SEMAPHORE})


def test_a_device_that_takes_a_files_place_is_not_opened(
    root: Path, layer: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another container of the pod, after the file was looked at: a pod's /dev/shm may be one with devices."""
    (root / "sem.x").write_text("stale")
    planted: list[Planted] = []
    is_open = sharing._is_open

    def plant(*asked: Any) -> bool:
        planted.append(Planted(root / "sem.x"))
        return is_open(*asked)

    monkeypatch.setattr(sharing, "_is_open", plant)
    with pytest.raises(LayerError, match=r"sem\.x: looking whether it is in use"):
        apply(layer, root, {SEMAPHORE})
    with planted[0] as device:
        assert device.opens() == 0 and device.path.is_char_device()


@pytest.mark.parametrize("other", ["device", "file"])
def test_what_takes_a_files_place_is_not_carried(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    (root / "file").write_text("own")
    (tmp_path / "theirs").write_text("theirs")
    planted: list[Planted] = []
    attributes = dump.attributes_in

    def plant(directory: int, name: bytes, path: bytes) -> dict[bytes, bytes]:
        if other == "device":
            planted.append(Planted(root / "file"))
        else:
            (tmp_path / "theirs").rename(root / "file")
        return attributes(directory, name, path)

    monkeypatch.setattr(dump, "attributes_in", plant)
    with pytest.raises(LayerError, match="file: "):
        write_layer(root, io.BytesIO())
    for device in planted:
        with device:
            assert device.opens() == 0


def test_a_device_in_the_place_of_an_added_file_is_not_opened(root: Path, tmp_path: Path) -> None:
    """What a process has open is read by its link in /proc, and may be anything."""
    (tmp_path / "link").symlink_to(tmp_path / "device")
    with Planted(tmp_path / "device") as device:
        with pytest.raises(LayerError, match="regular file"):
            write_layer(root, io.BytesIO(), extra=[("file", tmp_path / "link")])
        assert device.opens() == 0


ABLE = bytes.fromhex("0100000200040000000000000000000000000000")
"""A file capability: CAP_NET_BIND_SERVICE (linux/capability.h, VFS_CAP_REVISION_2)."""


def user_applies(layer: bytes, root: Path, needed: set[tuple[bytes, ...]] | None = None) -> None:
    """Into a container of user and group 1000."""
    user = User(1000, 1000, frozenset([1000]), privileged=False)
    with opened(root) as fd:
        rights = Sharing(needed or set(), lambda uid, gid: uid == 1000 and gid in (1000, None), user.may_make)
        apply_layer(io.BytesIO(layer), fd, root.parent / "undo", sharing=rights)


def of_users(tmp_path: Path) -> bytes:
    """A layer with what root and user 1000 have made."""
    source = tmp_path / "users"
    for name in ("mine", "roots"):
        (source / name / "below").mkdir(parents=True)
        (source / name / "below/file").write_text(name)
        (source / f"{name}.file").write_text(name)
        os.link(source / f"{name}.file", source / f"{name}.zlink")
    (source / "roots.file").chmod(0o4755)
    (source / "able").write_text("able")
    for path in source.rglob("*"):
        if not path.relative_to(source).parts[0].startswith("roots"):
            os.chown(path, 1000, 1000)
    os.setxattr(source / "able", "security.capability", ABLE)  # a change of the owner takes it away
    out = io.BytesIO()
    write_layer(source, out)
    return out.getvalue()


def test_what_the_container_could_not_have_made_is_passed_over(tmp_path: Path, root: Path) -> None:
    """Of a sidecar, or of a container with other rights whose snapshot this is."""
    layer = of_users(tmp_path)
    user_applies(layer, root)
    found = sorted(str(path.relative_to(root)) for path in root.rglob("*"))
    assert found == ["mine", "mine.file", "mine.zlink", "mine/below", "mine/below/file"]
    assert {path.stat().st_uid for path in root.rglob("*")} == {1000}


@pytest.mark.parametrize("name", ["roots.file", "roots.zlink", "able"])
def test_what_it_has_open_and_could_not_have_made_is_an_error(tmp_path: Path, root: Path, name: str) -> None:
    with pytest.raises(LayerError, match=r"belongs to 0:0|xattr"):
        user_applies(of_users(tmp_path), root, {(name.encode(),)})
    assert not list(root.iterdir())


def test_in_a_directory_of_the_node_that_it_may_not_write_to(tmp_path: Path, root: Path) -> None:
    """hostPath can mount any there."""
    layer = of_users(tmp_path)
    (root / "mine").mkdir(mode=0o755)
    user_applies(layer, root)
    assert sorted(path.name for path in root.iterdir()) == ["mine", "mine.file", "mine.zlink"]
    assert not list((root / "mine").iterdir())
    with opened(root) as fd:
        undo_layer(root.parent / "undo", fd)
    root.chmod(0o755)
    user_applies(layer, root)
    assert [path.name for path in root.iterdir()] == ["mine"]
    with pytest.raises(LayerError, match="may make nothing in its directory"):
        user_applies(layer, root, {(b"mine.file",)})


def test_anothers_file_is_not_replaced(tmp_path: Path, root: Path) -> None:
    (root / "mine.file").write_text("of the node")
    with pytest.raises(LayerError, match="another's file is there"):
        user_applies(of_users(tmp_path), root, {(b"mine.file",)})
    os.chown(root / "mine.file", 1000, 1000)
    user_applies(of_users(tmp_path / "again"), root, {(b"mine.file",)})
    assert (root / "mine.file").read_text() == "mine"


def test_a_directory_of_a_user_that_the_program_has_become(tmp_path: Path, root: Path) -> None:
    """Root without CAP_DAC_OVERRIDE may write to it as that user alone."""
    layer = of_users(tmp_path)
    (root / "mine").mkdir(mode=0o700)
    os.chown(root / "mine", 1000, 1000)
    nobody = User(0, 0, frozenset([0]), privileged=False)
    assert not nobody.may_make((root / "mine").stat())
    with opened(root) as fd:
        rights = Sharing({(b"mine", b"below", b"file")}, lambda uid, gid: uid in (0, 1000), nobody.may_make)
        apply_layer(io.BytesIO(layer), fd, root.parent / "undo", sharing=rights)
    assert (root / "mine/below/file").read_text() == "mine"


@pytest.mark.parametrize("mode", [0o3777, 0o1777])
def test_the_group_that_a_directory_gives(tmp_path: Path, root: Path, mode: int) -> None:
    source = tmp_path / "given"
    (source / "deep/deeper").mkdir(parents=True)
    for path in (source / "file", source / "deep/file", source / "deep/deeper/file"):
        path.write_text("x")
    for path in source.rglob("*"):
        os.chown(path, 1000, 3000)
    (source / "deep").chmod(0o2755)
    out = io.BytesIO()
    write_layer(source, out)
    os.chown(root, 0, 3000)
    root.chmod(mode)
    user = User(1000, 1000, frozenset([1000]), privileged=False)
    with opened(root) as fd:
        rights = Sharing(set(), lambda uid, gid: uid == 1000 and gid in (1000, None), user.may_make)
        apply_layer(io.BytesIO(out.getvalue()), fd, root.parent / "undo", sharing=rights)
    found = sorted(str(path.relative_to(root)) for path in root.rglob("*"))
    assert found == (["deep", "deep/deeper", "deep/file", "file"] if mode & 0o2000 else [])


def test_no_link_to_what_is_there(tmp_path: Path, root: Path) -> None:
    (root / "mine.file").write_text("of the node")
    user_applies(of_users(tmp_path), root)
    assert (root / "mine.file").read_text() == "of the node" and not (root / "mine.zlink").exists()


FOREIGN = ["sem.x", "link_remap.5"]


def foreign(root: Path, layer: bytes, undo: Path) -> None:
    """As in the node's own /dev/shm, of which nothing is the container's."""
    with opened(root) as fd:
        mine = (os.getuid(), os.getgid())
        owns = lambda user, group: (user, group) == mine  # noqa: E731
        rights = Sharing({REMAP}, owns, lambda directory: True, foreign=True)
        apply_layer(io.BytesIO(layer), fd, undo, sharing=rights)


def test_only_what_is_open_is_made_where_nothing_is_the_containers_own(
    tmp_path: Path, root: Path, layer: bytes
) -> None:
    foreign(root, layer, tmp_path / "undo")
    assert sorted(path.name for path in root.iterdir()) == sorted(FOREIGN)
    assert (root / "sem.x").samefile(root / "link_remap.5")
    with opened(root) as fd:
        undo_layer(tmp_path / "undo", fd)
    assert not list(root.iterdir())


@pytest.mark.parametrize("name", FOREIGN)
def test_nothing_is_replaced_there(tmp_path: Path, root: Path, layer: bytes, name: str) -> None:
    (root / name).write_text("of the node")
    with pytest.raises(LayerError, match=f"{name}: it is there already"):
        foreign(root, layer, tmp_path / "undo")
    assert [path.read_text() for path in root.iterdir()] == ["of the node"] and not (tmp_path / "undo").exists()


@pytest.mark.parametrize("what", ["setuid", "owner", "xattr", "link", "directory"])
def test_nothing_that_the_container_could_not_make_itself(tmp_path: Path, root: Path, what: str) -> None:
    source = tmp_path / "hostile"
    source.mkdir()
    path = source / "link_remap.5"
    if what == "link":
        path.symlink_to("/etc/passwd")
    elif what == "directory":
        path.mkdir()
    else:
        path.write_text("hostile")
    if what == "setuid":
        path.chmod(0o4755)
    elif what == "owner":
        os.chown(path, 12345, 0)
    elif what == "xattr":
        os.setxattr(path, "user.x", b"x")
    out = io.BytesIO()
    write_layer(source, out)
    with pytest.raises(LayerError, match=r"could not give it|no file at the top"):
        foreign(root, out.getvalue(), tmp_path / "undo")
    assert not list(root.iterdir())
