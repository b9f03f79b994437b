"""What the driver has compiled, kept on a node: whole, or not at all."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from rewarm.gpu import kernels

TEXT = ".version 7.0"


@pytest.fixture
def path(tmp_path: Path) -> str:
    return kernels.place(str(tmp_path), 13000, (9, 0), TEXT)


def test_by_text_and_kind_of_gpu(tmp_path: Path, path: str) -> None:
    assert path == kernels.place(str(tmp_path), 13000, (9, 0), TEXT)
    assert path != kernels.place(str(tmp_path), 13000, (8, 0), TEXT)
    assert path != kernels.place(str(tmp_path), 13000, (9, 0), TEXT + " ")
    assert path != kernels.place(str(tmp_path), 13010, (9, 0), TEXT)


def test_kept_and_forgotten(path: str) -> None:
    assert kernels.find(path) is None
    kernels.forget(path)
    kernels.keep(path, b"one")
    assert kernels.find(path) == b"one"
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(os.path.dirname(path)).st_mode) == 0o700
    kernels.keep(path, b"two")
    assert kernels.find(path) == b"one", "who was first"
    assert os.listdir(os.path.dirname(path)) == [os.path.basename(path)]
    kernels.forget(path)
    assert kernels.find(path) is None


def test_what_is_damaged_makes_room(path: str) -> None:
    kernels.keep(path, b"one")
    for damaged in (b"", b"x" * 31, b"x" * 32, b"x" * 50):
        Path(path).write_bytes(damaged)
        assert kernels.find(path) is None
        kernels.keep(path, b"two")
        assert kernels.find(path) == b"two"


def test_what_is_no_file_of_its_own(path: str, tmp_path: Path) -> None:
    kernels.keep(path, b"one")
    elsewhere = tmp_path / "elsewhere"
    os.rename(path, elsewhere)
    os.symlink(elsewhere, path)
    assert kernels.find(path) is None
    os.unlink(path)
    os.mkfifo(path)
    assert kernels.find(path) is None, "nor is it waited for"
    with open(os.open(path, os.O_RDWR), "wb"):
        assert kernels.find(path) is None
    os.unlink(path)
    os.mkdir(path)
    before = os.listdir("/proc/self/fd")
    assert kernels.find(path) is None
    assert os.listdir("/proc/self/fd") == before
    kernels.keep(path, b"two")
    kernels.forget(path)


def test_what_others_can_have_made_is_not_used(path: str) -> None:
    kernels.keep(path, b"one")
    os.chmod(path, 0o620)
    assert kernels.find(path) is None
    os.chmod(path, 0o600)
    os.chmod(os.path.dirname(path), 0o770)
    assert kernels.find(path) is None
    os.chmod(os.path.dirname(path), 0o700)
    assert kernels.find(path) == b"one"
    os.chown(path, 12345, -1)
    assert kernels.find(path) is None


def test_a_directory_that_others_may_write_to_is_not_used(path: str) -> None:
    os.makedirs(os.path.dirname(path))
    os.chmod(os.path.dirname(path), 0o777)
    kernels.keep(path, b"one")
    assert not os.path.exists(path)


def test_no_room(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: object, **more: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "link", full)
    kernels.keep(path, b"one")
    assert os.listdir(os.path.dirname(path)) == []
