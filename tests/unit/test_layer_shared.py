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

from rewarm_hooks import apply as applying
from rewarm_hooks import dump
from rewarm_hooks.layer import LayerError, apply_layer, undo_layer, write_layer
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
        apply_layer(io.BytesIO(layer), fd, root.parent / "undo", shared=needed)


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
    is_open = applying._is_open

    def plant(*asked: Any) -> bool:
        planted.append(Planted(root / "sem.x"))
        return is_open(*asked)

    monkeypatch.setattr(applying, "_is_open", plant)
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


FOREIGN = ["sem.x", "link_remap.5"]


def foreign(root: Path, layer: bytes, undo: Path) -> None:
    """As in the node's own /dev/shm, of which nothing is the container's."""
    with opened(root) as fd:
        mine = (os.getuid(), os.getgid())
        owns = lambda user, group: (user, group) == mine  # noqa: E731
        apply_layer(io.BytesIO(layer), fd, undo, shared={REMAP}, may_own=owns)


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
