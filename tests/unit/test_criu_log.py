"""CRIU's log: the cause of a failure, what is kept of it, and the directory that a killed CRIU leaves in /tmp."""

from __future__ import annotations

from pathlib import Path

import pytest

from rewarm import causes
from rewarm.criu import log

LINES = """(00.000270) Running on vm Linux
(00.063002) mnt: \t\tWill mount 55 from /null (E)
(00.063003) mnt: \t\tWill mount 55 @ /tmp/.criu.mntns.DiO2KK/mnt-0000000055 /sys/firmware
(00.063010) mnt: \t\tWill mount 54 @ /tmp/.criu.mntns.Other0/mnt-0000000054 /proc/timer_list
(00.070000) Error (criu/mount.c:1): mnt: Can't mount at /x: No such file or directory
"""


def written(directory: Path, text: str) -> Path:
    path = directory / "work/restore.log"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def test_words_that_hide_what_has_happened(tmp_path: Path) -> None:
    text = "(00.07) Error (criu/cr-restore.c:1239): Can't fork for 29696: File exists\n"
    said = log.cause(str(written(tmp_path, text)))
    assert said == "process id 29696 is taken in the pid namespace that the container shares"


def test_mount_yards(tmp_path: Path) -> None:
    """Those that a path in the images brought as well: which is CRIU's own the log does not say for certain."""
    assert log.mount_yards(str(written(tmp_path, LINES))) == {"/tmp/.criu.mntns.DiO2KK", "/tmp/.criu.mntns.Other0"}
    assert log.mount_yards(str(tmp_path / "absent")) == set()
    assert log.mount_yards(str(written(tmp_path, ""))) == set()


def test_a_mount_yard_far_down(tmp_path: Path) -> None:
    before = "(00.05) Collected [/a/long/path/of/a/file]\n" * 200_000
    assert log.mount_yards(str(written(tmp_path, before + LINES))) >= {"/tmp/.criu.mntns.DiO2KK"}


def test_more_mount_yards_than_there_can_be(tmp_path: Path) -> None:
    lines = "".join(f"(00.1) mnt: \t\tWill mount 5 @ /tmp/.criu.mntns.{n:06}/mnt-1 /x\n" for n in range(1000))
    assert len(log.mount_yards(str(written(tmp_path, lines)))) == 16


@pytest.mark.parametrize(
    "line",
    [
        "/tmp/.criu.mntns.DiO2KK/mnt-1 /x",
        "(00.1) mnt: \t\tRead 5 mp @ /tmp/.criu.mntns.DiO2KK/mnt-1",
        "(00.1) mnt: \t\tWill mount 5 @ /tmp/.criu.mntns.DiO2KK",
        "(00.1) mnt: \t\tWill mount 5 @ /tmp/.criu.mntns.DiO2KKK/mnt-1 /x",
        "(00.1) mnt: \t\tWill mount 5 @ /tmp/.criu.mntns.../etc/mnt-1 /x",
        "(00.1) mnt: \t\tWill mount 5 @ /tmp/.criu.mntns.DiO2K/../mnt-1 /x",
        "(00.1) mnt: \t\tWill mount 5 @ /etc/.criu.mntns.DiO2KK/mnt-1 /x",
        "(00.1) mnt: \t\tWill mount 5 from /tmp/.criu.mntns.DiO2KK/",
        "x (00.1) mnt: \t\tWill mount 5 @ /tmp/.criu.mntns.DiO2KK/mnt-1 /x",
    ],
)
def test_no_mount_yard(tmp_path: Path, line: str) -> None:
    assert log.mount_yards(str(written(tmp_path, f"{line}\n"))) == set()


def test_what_is_kept_of_a_failure(tmp_path: Path) -> None:
    """Also of the second one; the log stays where it was, for whoever undoes the restore."""
    state = tmp_path / "state"
    state.mkdir()
    for text in (LINES, LINES.replace("DiO2KK", "second")):
        path = written(tmp_path, text)
        assert "Can't mount at /x" in causes.cause(str(tmp_path), "exit 1")
        assert str(state / "last-failed-restore.log") in causes.keep(str(tmp_path), str(state))
        assert (state / "last-failed-restore.log").read_text() == path.read_text() == text
        path.unlink()
    assert causes.keep(str(tmp_path), str(state)) == "run `rewarm doctor`"
    assert (state / "last-failed-restore.log").exists()
    assert [path.name for path in state.iterdir()] == ["last-failed-restore.log"]
    assert (state / "last-failed-restore.log").stat().st_mode & 0o7777 == 0o600
    assert list((tmp_path / "work").iterdir()) == []
