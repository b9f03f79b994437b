"""Which signals a capture takes down: those that a process of the container wants and handles, and nothing else."""

from __future__ import annotations

import fcntl
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rewarm import processes, registered
from rewarm.store.manifest import Wanted
from support.handler import Handler

OF_A_USER = """
import ctypes, os, signal, sys
if int(sys.argv[2]): ctypes.CDLL(None).unshare(0x10000000)  # CLONE_NEWUSER
print(flush=True)
sys.stdin.readline()
os.setuid(int(sys.argv[1]))
signal.signal(signal.SIGUSR2, lambda *_: None)
print(flush=True)
while True: signal.pause()
"""


@contextmanager
def handler_of(user: int, first: int = 0) -> Iterator[int]:
    """The pid of a process of that user that handles SIGUSR2; in a user namespace whose root is the node's `first`."""
    words = [sys.executable, "-I", "-c", OF_A_USER, str(user), str(first)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdout.readline()
            if first:
                Path(f"/proc/{process.pid}/uid_map").write_text(f"0 {first} 65536\n")
            process.stdin.write("\n")
            process.stdin.flush()
            process.stdout.readline()
            yield process.pid
        finally:
            process.kill()


def want(directory: Path, number: int, text: str) -> None:
    (directory / f"{number}.signal").write_text(text)


@pytest.mark.parametrize("text", ["USR1", "USR1\n", "SIGUSR1\n", " 10 "])
@pytest.mark.parametrize("apart", [False, True], ids=["same numbers", "numbers of its own"])
def test_a_signal_by_name_or_number(tmp_path: Path, text: str, apart: bool) -> None:
    with Handler(signal.SIGUSR1, apart=apart) as handler:
        want(tmp_path, handler.number, text)
        assert registered.signals(str(tmp_path), [handler.pid]) == ((Wanted(handler.number, 10),), [])


def test_none(tmp_path: Path) -> None:
    (tmp_path / "ready").touch()
    assert registered.signals(str(tmp_path), [os.getpid()]) == ((), [])
    assert registered.signals(str(tmp_path / "none"), [os.getpid()]) == ((), []), "a container without the annotation"


def test_several(tmp_path: Path) -> None:
    with Handler(signal.SIGHUP) as one, Handler(64) as two:
        want(tmp_path, one.number, "HUP")
        want(tmp_path, two.number, "64")
        found, notes = registered.signals(str(tmp_path), [one.pid, two.pid])
        assert set(found) == {Wanted(one.number, 1), Wanted(two.number, 64)} and notes == []


@pytest.mark.parametrize("text", ["", "KILL", "TERM", "9", "15", "19", "33", "65", "010", "-1", "U\0SR1", "USR1" * 20])
def test_no_signal_that_a_process_may_want(tmp_path: Path, text: str) -> None:
    with Handler(signal.SIGUSR1, signal.SIGTERM) as handler:
        want(tmp_path, handler.number, text)
        found, (note,) = registered.signals(str(tmp_path), [handler.pid])
        assert found == ()
        assert note.endswith("is not one of HUP, USR1, USR2, WINCH or 34 to 64") and note.isprintable()
        assert len(note) < 200


def test_bytes_of_any_kind(tmp_path: Path) -> None:
    with Handler(signal.SIGUSR1) as handler:
        (tmp_path / f"{handler.number}.signal").write_bytes(b"\xff\x1b[31m\n")
        found, (note,) = registered.signals(str(tmp_path), [handler.pid])
        assert found == () and note.isprintable() and note.isascii()


def test_of_a_process_that_does_not_handle_it_or_is_not_there(tmp_path: Path) -> None:
    with Handler(signal.SIGUSR2) as handler:
        want(tmp_path, handler.number, "USR1")
        want(tmp_path, 1, "USR1")
        found, notes = registered.signals(str(tmp_path), [handler.pid])
        assert found == ()
        assert sorted(notes) == sorted(
            [
                "no signal by /run/rewarm/1.signal: the container has no process 1",
                f"no signal by /run/rewarm/{handler.number}.signal: "
                f"process {handler.number} does not handle signal {int(signal.SIGUSR1)}",
            ]
        )


def test_one_that_waits_for_it_handles_it(tmp_path: Path) -> None:
    """As with sigwait(3) or signalfd(2), where it has no handler and all threads block it."""
    with Handler(blocks="10") as handler:
        want(tmp_path, handler.number, "USR1")
        assert registered.signals(str(tmp_path), [handler.pid]) == ((Wanted(handler.number, 10),), [])
        assert not processes.handles(handler.pid, signal.SIGUSR2)
    assert not processes.handles(handler.pid, signal.SIGUSR1), "it has ended"


@pytest.mark.parametrize(
    ("user", "first", "owner", "said"),
    [
        (0, 0, 0, ""),
        (0, 0, 1000, "it is user 1000's"),
        (1000, 0, 1000, ""),
        (1000, 0, 0, ""),
        (1000, 0, 1001, "it is user 1001's"),
        (500, 100000, 100500, ""),
        (500, 100000, 100000, ""),  # root of the container
        (500, 100000, 0, ""),
        (500, 100000, 500, "it is user 500's"),
        (0, 100000, 100500, "it is user 100500's"),
    ],
)
def test_who_may_want_one_for_a_process(tmp_path: Path, user: int, first: int, owner: int, said: str) -> None:
    """Who may not send it a signal has rewarm send none either. Files have the node's numbers."""
    with handler_of(user, first) as pid:
        want(tmp_path, pid, "USR2")
        os.chown(tmp_path / f"{pid}.signal", owner, 0)
        found, notes = registered.signals(str(tmp_path), [pid])
    why = f"no signal by /run/rewarm/{pid}.signal: {said}, and has to be the process's own user's, or root's"
    assert (found, notes) == (((), [why]) if said else ((Wanted(pid, signal.SIGUSR2),), []))


def test_a_second_name_of_somebodys_file(tmp_path: Path) -> None:
    """Anybody may make one where fs.protected_hardlinks is off."""
    with Handler(signal.SIGUSR2) as one, Handler(signal.SIGUSR2) as two:
        want(tmp_path, one.number, "USR2")
        os.link(tmp_path / f"{one.number}.signal", tmp_path / f"{two.number}.signal")
        found, notes = registered.signals(str(tmp_path), [one.pid, two.pid])
        assert found == () and all("it has several names" in note for note in notes) and len(notes) == 2


def test_what_is_planted_is_not_opened(tmp_path: Path) -> None:
    with Handler(signal.SIGUSR1) as handler:
        name = tmp_path / f"{handler.number}.signal"
        outside = tmp_path / "of-the-node"
        outside.write_text("USR1")
        began = time.monotonic()
        for kind in (stat.S_IFIFO, stat.S_IFCHR, stat.S_IFDIR, stat.S_IFLNK):
            if kind == stat.S_IFDIR:
                name.mkdir()
            elif kind == stat.S_IFLNK:
                name.symlink_to(outside)
            else:
                os.mknod(name, kind | 0o666, os.makedev(1, 5))
            found, (note,) = registered.signals(str(tmp_path), [handler.pid])
            assert found == () and note.endswith("it is no regular file")
            name.rename(tmp_path / f"was-{kind}")
        assert time.monotonic() - began < 1


def test_a_lease_is_not_waited_for(tmp_path: Path) -> None:
    """The kernel gives who holds one 45 s to let others open the file."""
    with Handler(signal.SIGUSR1) as handler:
        name = tmp_path / f"{handler.number}.signal"
        name.write_text("USR1")
        before = signal.signal(signal.SIGIO, signal.SIG_IGN)
        try:
            with name.open("r+") as file:
                fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
                began = time.monotonic()
                found, (note,) = registered.signals(str(tmp_path), [handler.pid])
                assert found == () and note.endswith("Resource temporarily unavailable")
                assert time.monotonic() - began < 1
        finally:
            signal.signal(signal.SIGIO, before)


def test_a_full_directory(tmp_path: Path) -> None:
    with Handler(signal.SIGUSR1) as handler:
        for number in range(1_000_000, 1_010_000):
            os.close(os.open(tmp_path / f"{number}.signal", os.O_CREAT | os.O_WRONLY))
        began = time.monotonic()
        found, notes = registered.signals(str(tmp_path), [handler.pid])
        assert time.monotonic() - began < 2
        assert found == () and len(notes) == 9
        assert notes[0] == "more than 4096 names in /run/rewarm: not all are looked at for signals"
        assert notes[-1] == "and 4089 more"
