"""Who is told of a restore; a control directory, which its container may have filled with anything, misleads nobody."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from rewarm import notify
from rewarm.oci.runc import Container
from rewarm.store.manifest import Wanted
from support.handler import Handler

NOBODY = Container("/run/runc", "c", 0, 0, "/bundle", "/bundle/rootfs", {}, (), "")
LINE = {"event": "restored", "file": "/run/rewarm/restored.json"}


@pytest.fixture
def sockets() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def control(tmp_path: Path) -> Path:
    path = tmp_path / "control"
    path.mkdir()
    return path


def listen(stack: ExitStack, path: Path, backlog: int = 4, kind: int = socket.SOCK_STREAM) -> socket.socket:
    found = stack.enter_context(socket.socket(socket.AF_UNIX, kind))
    directory = os.open(path.parent, os.O_PATH)
    found.bind(f"/proc/self/fd/{directory}/{path.name}")  # whose name may be longer than the address has room for
    os.close(directory)
    if kind != socket.SOCK_DGRAM:
        found.listen(backlog)
    found.settimeout(5)
    return found


def heard(listener: socket.socket) -> list[bytes]:
    """What everybody said who has connected so far."""
    listener.setblocking(False)
    found = []
    with suppress(BlockingIOError):
        while True:
            connection, _ = listener.accept()
            with connection:
                found.append(connection.makefile("rb").read())
    return found


def test_a_listener_is_told_once(control: Path, sockets: ExitStack) -> None:
    listeners = [listen(sockets, control / name) for name in ("a.sock", "b.sock")]
    other = listen(sockets, control / "other")
    assert notify.notify(str(control), NOBODY, (), {}) == []
    for listener in listeners:
        (line,) = heard(listener)
        assert line.endswith(b"\n") and json.loads(line) == LINE
    assert heard(other) == []


def test_nobody_is_there(control: Path) -> None:
    assert notify.notify(str(control), NOBODY, (), {}) == []
    with pytest.raises(FileNotFoundError):
        notify.notify(str(control / "none"), NOBODY, (), {})


def test_what_is_no_listener_is_a_note(control: Path, sockets: ExitStack) -> None:
    outside = listen(sockets, control.parent / "of-the-node.sock")
    (control / "link.sock").symlink_to(control.parent / "of-the-node.sock")
    os.mkfifo(control / "fifo.sock")
    os.mknod(control / "device.sock", stat.S_IFCHR | 0o666, os.makedev(1, 5))
    (control / "directory.sock").mkdir()
    (control / "file.sock").write_text("")
    listen(sockets, control / "gone.sock").close()
    listen(sockets, control / "datagrams.sock", kind=socket.SOCK_DGRAM)
    began = time.monotonic()
    notes = sorted(notify.notify(str(control), NOBODY, (), {}))
    assert time.monotonic() - began < 1
    assert [note.removeprefix("/run/rewarm/") for note in notes] == [
        "datagrams.sock was not told: Protocol wrong type for socket",
        "device.sock was not told: it is no socket",
        "directory.sock was not told: it is no socket",
        "fifo.sock was not told: it is no socket",
        "file.sock was not told: it is no socket",
        "gone.sock was not told: nobody listens",
        "link.sock was not told: it is no socket",
    ]
    assert heard(outside) == []


def test_a_full_backlog_is_not_waited_for(control: Path, sockets: ExitStack) -> None:
    listener = listen(sockets, control / "full.sock", backlog=0)
    sockets.enter_context(socket.socket(socket.AF_UNIX)).connect(str(control / "full.sock"))
    began = time.monotonic()
    assert notify.notify(str(control), NOBODY, (), {}) == ["/run/rewarm/full.sock was not told: its backlog is full"]
    assert time.monotonic() - began < 1
    assert listener.accept()[0].detach() >= 0


def test_a_full_directory(control: Path) -> None:
    """Of names as long and as odd as they may be."""
    base = b"\xff\n\x1b[31m" + b"x" * 235
    for number in range(20_000):
        os.close(os.open(os.fsencode(control) + b"/" + base + b"%05d" % number + b".sock", os.O_CREAT | os.O_WRONLY))
    began = time.monotonic()
    notes = notify.notify(str(control), NOBODY, (), {})
    assert time.monotonic() - began < 2
    assert notes[0] == "not everybody was told: more than 256 sockets or 4096 names in /run/rewarm"
    assert notes[-1] == "and 249 more were not told" and len(notes) == 9
    assert all(note.isprintable() and note.isascii() and len(note) < 200 for note in notes)
    json.dumps(notes).encode()


def test_so_many_listeners(control: Path, sockets: ExitStack) -> None:
    listeners = [listen(sockets, control / f"{number}.sock") for number in range(notify.MOST + 4)]
    (note,) = notify.notify(str(control), NOBODY, (), {})
    assert note.startswith("not everybody was told")
    assert sum(len(heard(listener)) for listener in listeners) == notify.MOST


def test_a_name_that_changes_leads_nowhere(control: Path, sockets: ExitStack) -> None:
    """Whoever runs already (with a GPU) may put a link to a socket of the node there at any moment."""
    outside = listen(sockets, control.parent / "of-the-node.sock", backlog=4096)
    inside = listen(sockets, control / "its-own", backlog=4096)
    change = (
        "while ln its-own again && mv again a.sock && ln -s ../of-the-node.sock link && mv -T link a.sock; do :; done"
    )
    with subprocess.Popen(["sh", "-c", change], cwd=control) as changing:
        try:
            end = time.monotonic() + 10
            refused, told = 0, 0
            while (refused < 20 or told < 20) and time.monotonic() < end:
                refused += any("is no socket" in note for note in notify.notify(str(control), NOBODY, (), {}))
                told += len(heard(inside))
        finally:
            changing.kill()
    assert refused >= 20 and told >= 20 and heard(outside) == []


@pytest.mark.parametrize("apart", [False, True], ids=["same numbers", "numbers of its own"])
def test_a_stopped_process_sees_its_signal_first(control: Path, apart: bool) -> None:
    with Handler(signal.SIGUSR1, apart=apart) as handler:
        handler.stop()
        assert handler.number == 1 or not apart
        assert notify.notify(str(control), handler.container, (Wanted(handler.number, signal.SIGUSR1),), {}) == []
        handler.go_on()
        assert handler.said() == signal.SIGUSR1
        again = control / f"{handler.number}.signal"
        assert again.read_text() == "10\n" and stat.S_IMODE(again.stat().st_mode) == 0o644


def test_who_does_not_handle_it_is_left_alone(control: Path) -> None:
    with Handler(signal.SIGUSR2) as handler:
        notes = notify.notify(str(control), handler.container, (Wanted(handler.number, signal.SIGUSR1),), {})
        assert notes == [f"process {handler.number} was not sent signal 10: it does not handle it"]
        assert notify.notify(str(control), handler.container, (Wanted(handler.number, signal.SIGUSR2),), {}) == []
        assert handler.said() == signal.SIGUSR2, "and so it lives"


def test_nobody_else_is_sent_one(control: Path) -> None:
    """By whatever number a snapshot names it."""
    with Handler(signal.SIGUSR1) as handler, Handler(signal.SIGUSR1) as other, Handler(signal.SIGUSR1) as last:
        (note,) = notify.notify(str(control), handler.container, (Wanted(other.pid, signal.SIGUSR1),), {})
        assert note == f"process {other.pid} was not sent signal 10: it is not there"
        ended = last.container._replace(start_time=last.container.start_time - 1)
        notes = notify.notify(str(control), ended, (Wanted(last.pid, signal.SIGUSR1),), {})
        assert notes == ["no process was sent a signal: the container's init has ended"]
        for one in (other, last):
            os.kill(one.pid, signal.SIGUSR1)
            assert one.said() == signal.SIGUSR1
            os.kill(one.pid, 0)
    assert list(control.iterdir()) == []


def test_what_is_planted_is_not_written_to(control: Path) -> None:
    outside = control.parent / "of-the-node"
    with Handler(signal.SIGUSR1) as handler:
        name = control / f"{handler.number}.signal"
        for plant in (lambda: os.mkfifo(name), lambda: name.symlink_to(outside), lambda: name.write_text("USR2")):
            plant()
            assert notify.notify(str(control), handler.container, (Wanted(handler.number, signal.SIGUSR1),), {}) == []
            assert handler.said() == signal.SIGUSR1
            assert not outside.exists()
            name.unlink()
