"""Directories that only root may look into, whatever the umask."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from rewarm import private


@pytest.fixture(params=[0o000, 0o022, 0o777], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_every_level_is_private(tmp_path: Path, umask: int) -> None:
    private.make(str(tmp_path / "a" / "b" / "c"))
    for name in ("a", "a/b", "a/b/c"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o700, name


def test_what_is_there_stays(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir(mode=0o755)
    private.make(str(tmp_path / "a"))
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o755


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o1777])
def test_one_that_others_may_write_to_is_refused(tmp_path: Path, mode: int) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a").chmod(mode)
    with pytest.raises(PermissionError, match="others may write"):
        private.make(str(tmp_path / "a"))


def test_one_of_another_user_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    os.chown(tmp_path / "a", 1, 1)
    with pytest.raises(PermissionError, match="others may write"):
        private.make(str(tmp_path / "a"))


def test_a_file_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    with pytest.raises(OSError):
        private.make(str(tmp_path / "a" / "b"))
