"""One capture of a container at a time, and the helpers of those that are over."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rewarm import alone as module
from rewarm import processes, sweep
from rewarm.alone import alone
from rewarm.errors import CaptureError
from rewarm.oci import record
from rewarm.oci.runc import Container

SOURCES = str(Path(module.__file__).parents[1])
CAPTURE = """
import signal, subprocess, sys
from rewarm.alone import alone
from rewarm.oci.runc import Container
container = Container(sys.argv[1] + "/root", "one", int(sys.argv[2]), int(sys.argv[3]), "", "", {}, (), "")
with alone(container, sys.argv[1]) as lock:
    helper = subprocess.Popen(["sleep", "1000"], pass_fds=(lock,), stdout=subprocess.DEVNULL)
    print(helper.pid, flush=True)
    sys.stdin.read()
print("over", flush=True)
signal.pause()
"""


@pytest.fixture
def container(tmp_path: Path) -> Container:
    """This very process, as far as its init goes."""
    start = processes.start_time(os.getpid())
    assert start is not None
    return Container(f"{tmp_path}/root", "one", os.getpid(), start, "", "", {}, (), "")


@pytest.fixture
def lock(tmp_path: Path, container: Container) -> Path:
    return Path(f"{record.capture_path(str(tmp_path), container.pid, container.start_time)}~lock")


class Other:
    """A capture in another process, with a helper that has no end of its own."""

    def __init__(self, directory: Path, container: Container) -> None:
        words = [sys.executable, "-c", CAPTURE, str(directory), str(container.pid), str(container.start_time)]
        env = {**os.environ, "PYTHONPATH": SOURCES}
        self.process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, text=True, start_new_session=True
        )
        assert self.process.stdout is not None
        self.helper = int(self.process.stdout.readline())

    def end(self) -> None:
        """The capture has failed; its process is there yet."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        assert self.process.stdout.readline() == "over\n"

    def close(self) -> None:
        os.killpg(self.process.pid, 9)
        self.process.wait()


@pytest.fixture
def other(tmp_path: Path, container: Container) -> Iterator[Other]:
    found = Other(tmp_path, container)
    yield found
    found.close()


def test_nothing_is_left(container: Container, tmp_path: Path, lock: Path) -> None:
    for _ in range(2):
        with alone(container, str(tmp_path)) as held:
            assert lock.exists() and os.get_inheritable(held) is False
        assert not lock.exists()
    with pytest.raises(KeyError), alone(container, str(tmp_path)):
        raise KeyError
    assert not lock.exists()


def test_two_at_once(container: Container, tmp_path: Path, other: Other) -> None:
    began = time.monotonic()
    with pytest.raises(CaptureError, match="another capture of it is going on"), alone(container, str(tmp_path)):
        pass
    assert time.monotonic() - began < module.PATIENCE / 2


@pytest.mark.parametrize("how", ["killed", "failed"])
def test_a_helper_is_waited_for(container: Container, tmp_path: Path, lock: Path, other: Other, how: str) -> None:
    if how == "killed":
        other.process.kill()
        other.process.wait()
    else:
        other.end()
    assert lock.exists(), "the next one would have a lock of its own"
    words = f"import os, time; time.sleep(0.7); os.kill({other.helper}, 9)"
    began = time.monotonic()
    told: list[None] = []
    with subprocess.Popen([sys.executable, "-c", words]), alone(container, str(tmp_path), lambda: told.append(None)):
        assert time.monotonic() - began > 0.5
    assert not lock.exists() and told


def test_a_helper_that_does_not_end(
    container: Container, tmp_path: Path, other: Other, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.3)
    other.end()
    with pytest.raises(CaptureError, match="still being undone"), alone(container, str(tmp_path)):
        pass


def test_a_file_of_another_process(container: Container, tmp_path: Path, lock: Path) -> None:
    """As a killed one leaves it, or as nobody has written it."""
    for text in (b"", b"\xff", b"1 2 3", f"{os.getpid()} 1".encode()):
        lock.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock.write_bytes(text)
        with alone(container, str(tmp_path)):
            pass
        assert not lock.exists()


@pytest.mark.parametrize("text", [b"", b"\xff", b"1 2 3", b"PID 1", b"99999999 1"])
def test_who_has_it_does_not_live(
    container: Container, tmp_path: Path, lock: Path, other: Other, monkeypatch: pytest.MonkeyPatch, text: bytes
) -> None:
    """Another process with the number of one that was killed is not it."""
    monkeypatch.setattr(module, "PATIENCE", 0.2)
    other.end()
    lock.write_bytes(text.replace(b"PID", str(os.getpid()).encode()))
    with pytest.raises(CaptureError, match="still being undone"), alone(container, str(tmp_path)):
        pass


def test_a_container_that_has_ended(tmp_path: Path, container: Container, lock: Path) -> None:
    gone = container._replace(start_time=container.start_time + 1)
    with pytest.raises(CaptureError, match="has ended"), alone(gone, str(tmp_path)):
        pass
    assert list(lock.parent.iterdir()) == []


def test_no_room_for_the_signature(container: Container, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with alone(container, str(tmp_path)):
        pass


def test_what_killed_ones_have_left_is_swept(container: Container, tmp_path: Path, lock: Path) -> None:
    lock.parent.mkdir(mode=0o700)
    of_others = [lock.with_name("1-99999~lock"), lock.with_name(f"{container.pid}-1~lock")]
    for path in (lock, *of_others, lock.with_name("else")):
        path.touch()
    stays = lock.with_name("1-88888~lock")
    stays.mkdir()
    assert sweep.left_overs(str(tmp_path), "/no/runc") == []
    assert sorted(lock.parent.iterdir()) == sorted([lock, lock.with_name("else"), stays])


def test_a_file_that_stays_fails_no_capture(
    container: Container, tmp_path: Path, lock: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*given: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    with monkeypatch.context() as patched:
        patched.setattr(os, "unlink", refused)
        with alone(container, str(tmp_path)):
            pass
    assert lock.exists()
    with alone(container, str(tmp_path)):
        pass
    assert not lock.exists()


def test_a_container_directory_by_another_name_of_its_root(tmp_path: Path) -> None:
    """As Docker's, below /var/run."""
    state, root = str(tmp_path / "state"), tmp_path / "root"
    root.mkdir()
    (tmp_path / "link").symlink_to(root)
    for name in ("one", "two"):
        made = record.Record(id=name, root=str(tmp_path / "link"), bundle="/b", phase=record.COLD)
        record.make_directory(record.directory(state, made.root, name), made)
    wanted = record.directory(state, str(tmp_path / "link"), "one")
    for called in (root, tmp_path / "link"):
        assert record.find_directory(state, str(called), "one") == wanted
    exact = record.directory(state, str(root), "one")
    assert record.find_directory(state, str(root), "three") == record.directory(state, str(root), "three")
    (tmp_path / "other").mkdir()
    assert record.find_directory(state, str(tmp_path / "other"), "one") != wanted
    record.make_directory(exact, record.Record(id="one", root=str(root), bundle="/b", phase=record.COLD))
    assert record.find_directory(state, str(root), "one") == exact
