"""rewarm_hooks.workload in programs: who is told, what is seeded anew, and that it stands in nobody's way."""

from __future__ import annotations

import ast
import json
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from rewarm import processes
from support.proc import wait_for

HOOK = Path(__file__).parents[2] / "hooks/rewarm_hooks/workload.py"
TOLD = b'{"event": "restored", "file": "/run/rewarm/restored.json"}\n'
BEGIN = """
import os, sys, time
sys.path.insert(0, os.path.dirname(sys.argv[1]))
import workload  # as a copy of one file, without its package
workload.CONTROL = sys.argv[2]
say = lambda *words: os.write(1, (" ".join(map(str, words)) + "\\n").encode())
"""
END = "\nsay('ready')\nwhile True: time.sleep(0.01)\n"


@contextmanager
def program(
    control: Path, text: str, end: str = END, stdin: int = subprocess.DEVNULL
) -> Iterator[subprocess.Popen[str]]:
    words = [sys.executable, "-c", BEGIN + text + end, str(HOOK), str(control)]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdin=stdin, stdout=pipe, stderr=pipe, text=True, start_new_session=True) as started:
        try:
            yield started
        finally:
            with suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGKILL)  # its children, too


def line(started: subprocess.Popen[str]) -> str:
    assert started.stdout is not None
    return started.stdout.readline().strip()


def sockets(control: Path) -> list[Path]:
    return sorted(control.glob("python-*.sock"))


def tell(control: Path, message: bytes = TOLD) -> None:
    for path in sockets(control):
        with socket.socket(socket.AF_UNIX) as connection:
            # A child's that is new may have its name and not listen yet.
            wait_for("a listener", lambda at=path: connection.connect_ex(str(at)) == 0)  # type: ignore[misc]
            connection.sendall(message)


@pytest.fixture
def control(tmp_path: Path) -> Path:
    (tmp_path / "restored.json").write_text(json.dumps({"hostname": "copy"}))
    return tmp_path


def test_callbacks_in_order(control: Path) -> None:
    text = "workload.on_restore(lambda r: say(1, r['hostname'])); say(workload.on_restore(lambda r: say(2)))"
    with program(control, text) as started:
        assert [line(started), line(started)] == ["True", "ready"]
        (path,) = sockets(control)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, "others of the container have nothing to say there"
        for _ in range(2):
            tell(control)
            assert [line(started), line(started)] == ["1 copy", "2"]


def test_what_a_callback_raises_ends_nothing(control: Path) -> None:
    text = (
        "workload.on_restore(lambda r: 1 / 0); workload.on_restore(sys.exit); workload.on_restore(lambda r: say('on'))"
    )
    with program(control, text) as started:
        assert line(started) == "ready"
        for _ in range(2):
            tell(control)
            assert line(started) == "on"
        started.kill()
        said = started.communicate()[1]
        assert said.count("ZeroDivisionError") == 2 and said.count("SystemExit") == 2


@pytest.mark.parametrize("message", [b"", b"\n", b"{}", b"[" * 5000, b"null\n", b'{"event": "other"}\n', b"\xff" * 9])
def test_other_messages_are_none(control: Path, message: bytes) -> None:
    with program(control, "workload.on_restore(lambda r: say('told'))") as started:
        assert line(started) == "ready"
        tell(control, message)
        tell(control)
        assert line(started) == "told"
        started.kill()
        assert started.communicate() == ("", "")


def test_a_file_that_it_may_not_read(control: Path) -> None:
    (control / "restored.json").unlink()
    with program(control, "workload.on_restore(lambda r: say(r))") as started:
        assert line(started) == "ready"
        tell(control)
        assert line(started) == "{}"


def test_no_container_of_rewarms(tmp_path: Path) -> None:
    with program(tmp_path / "none", "say(workload.on_restore(print))", end="") as started:
        assert started.communicate() == ("False\n", "")


def test_no_socket_can_be_made(tmp_path: Path) -> None:
    directory = tmp_path / ("x" * 120)  # longer than the address of a socket
    directory.mkdir()
    with program(directory, "say(workload.on_restore(print))", end="") as started:
        out, err = started.communicate()
    assert out == "False\n" and err.startswith("rewarm: this process will not be told of a restore: ")
    assert list(directory.iterdir()) == []


def test_the_socket_goes_with_the_process(control: Path) -> None:
    with program(control, "workload.on_restore(); say(len(os.listdir(workload.CONTROL)))", end="") as started:
        assert started.communicate() == ("2\n", "")
    assert sockets(control) == []
    with program(control, "workload.on_restore()") as started:
        assert line(started) == "ready"
    assert len(sockets(control)) == 1, "it was killed"
    with program(control, "workload.on_restore()") as started:
        assert line(started) == "ready"
        (path,) = sockets(control)
        assert path.name.startswith(f"python-{started.pid}-")


def test_a_child_seeds_its_own_and_has_no_callbacks(control: Path) -> None:
    text = """
import random
workload.on_restore(lambda r: say("parent"))
random.seed(1)
if os.fork() == 0:
    before = random.random()
    random.seed(1)
    say("child")
    while random.getstate() == random.Random(1).getstate(): time.sleep(0.01)
    say("seeded")
    workload.on_restore(lambda r: say("child's"))
    say("registered")
    while True: time.sleep(1)
time.sleep(0.2)
"""
    with program(control, text) as started:
        assert {line(started), line(started)} == {"child", "ready"}
        wait_for("the child's socket", lambda: len(sockets(control)) == 2)
        tell(control)
        assert {line(started), line(started), line(started)} == {"parent", "seeded", "registered"}
        tell(control)
        assert {line(started), line(started)} == {"parent", "child's"}


def test_signals_are_not_for_its_thread(control: Path) -> None:
    """A program that waits for one by sigwait would be ended by it: the thread was started before it was blocked."""
    text = """
import signal
workload.on_restore(lambda r: say(signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()))
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
say("waits")
say(signal.sigwait({signal.SIGTERM}) == signal.SIGTERM)
"""
    with program(control, text) as started:
        assert line(started) == "waits"
        started.terminate()
        assert [line(started), line(started)] == ["True", "ready"]
        tell(control)
        assert line(started) == "True", "a callback's own children would be deaf"


SEEDED = """
import random, ssl, numpy.random
def numbers(): return [random.random(), numpy.random.random()]
def seed(): random.seed(1); numpy.random.seed(1)
seed(); first = numbers(); seed()
added = []
ssl.RAND_add = lambda data, entropy: added.append((len(data), entropy))
def told(restored):
    second = numbers()
    say(*(a != b for a, b in zip(first, second)), *added)
"""


@pytest.mark.parametrize(("reseed", "said"), [("", "True True (64, 64.0)"), (", reseed=False", "False False")])
def test_generators(control: Path, reseed: str, said: str) -> None:
    """That OpenSSL gives something else then, a test with copies shows (tests/integration/test_on_restore.py)."""
    with program(control, f"{SEEDED}workload.on_restore(told{reseed})") as started:
        assert line(started) == "ready"
        tell(control)
        assert line(started) == said


def test_once_without_is_without(control: Path) -> None:
    """Whoever wants the numbers of the source has a reason, a library that registers, too, has none."""
    with program(control, f"{SEEDED}workload.on_restore(reseed=False); workload.on_restore(told)") as started:
        assert line(started) == "ready"
        tell(control)
        assert line(started) == "False False"


def test_nothing_is_imported_to_be_seeded(control: Path) -> None:
    text = "workload.reseed(); say(*{'random', 'numpy', 'torch', 'ssl'} & set(sys.modules))"
    with program(control, text, end="") as started:
        assert started.communicate() == ("\n", "")


def test_a_program_that_closes_its_descriptors(control: Path) -> None:
    """The number is another socket's then, of which no connection may be taken, also once the thread looks again."""
    text = """
import socket
workload.on_restore(lambda found: say("told"))
os.closerange(3, 100)
listener = socket.socket()
listener.bind(("127.0.0.1", 0)); listener.listen(64)
while listener.fileno() < workload._listener.socket.fileno():
    listener = socket.socket(fileno=os.dup(listener.fileno()))
say(listener.getsockname()[1], listener.fileno() == workload._listener.socket.fileno())
say('ready')
while True:
    listener.accept()[0].sendall(b"mine")
"""
    with program(control, text, end="") as started:
        port, same = line(started).split()
        assert same == "True" and line(started) == "ready"
        for _ in range(3):
            started.send_signal(signal.SIGSTOP)
            wait_for("the stop", lambda: processes.running(started.pid) == "")
            started.send_signal(signal.SIGCONT)
            for _ in range(8):
                with socket.create_connection(("127.0.0.1", int(port)), timeout=5) as connection:
                    assert connection.recv(4) == b"mine"


@pytest.mark.parametrize("initialised", [True, False])
def test_pytorch(control: Path, initialised: bool) -> None:
    """Its CUDA only where the process uses it. By a stand-in: PyTorch itself is not for every run of the tests."""
    text = f"""
from types import SimpleNamespace as Made
calls = lambda name: lambda number: say(name, 0 <= number < 2**63)
cuda = Made(is_initialized=lambda: {initialised}, manual_seed_all=calls("cuda"))
sys.modules["torch"] = Made(default_generator=Made(manual_seed=calls("cpu")), cuda=cuda)
workload.reseed()
"""
    with program(control, text, end="") as started:
        assert started.communicate() == ("cpu True\n" + "cuda True\n" * initialised, "")


def test_a_generator_that_refuses_is_no_reason_not_to_seed_the_next(control: Path) -> None:
    text = """
import random
sys.modules["numpy.random"] = None
sys.modules["torch"] = object()
random.seed(1)
workload.reseed()
say(random.getstate() != random.Random(1).getstate())
"""
    with program(control, text, end="") as started:
        out, err = started.communicate()
    assert out == "True\n" and err.count("Traceback") == 1


def test_its_python_is_old() -> None:
    ast.parse(HOOK.read_text(), feature_version=(3, 8))


def test_a_thread_of_another_process_dies_with_it(control: Path) -> None:
    """The program ends when its main thread does."""
    with program(control, "workload.on_restore()", end="") as started:
        wait_for("the program to end", lambda: started.poll() is not None, timeout=10)
        assert started.returncode == 0
