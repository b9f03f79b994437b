"""rewarm_hooks.workload in programs that are hard on it: green threads, lost descriptors, forks, other programs."""

from __future__ import annotations

import json
import os
import select
import subprocess
import time
from pathlib import Path

import pytest

from support.proc import wait_for
from unit.test_workload_hook import program, sockets, tell

MASK = "import signal; mask = lambda: len(signal.pthread_sigmask(signal.SIG_BLOCK, ()))\n"
# NumPy's: `random` seeds itself anew in a forked child.
NUMBERS = """
import numpy.random as numbers
numbers.seed(1)
alike = lambda: (numbers.get_state()[1] == numbers.RandomState(1).get_state()[1]).all()
"""
ON = "while True: time.sleep(0.05)\n"


@pytest.fixture
def control(tmp_path: Path) -> Path:
    (tmp_path / "restored.json").write_text(json.dumps({"hostname": "copy"}))
    return tmp_path


def restore(control: Path) -> None:
    """What the hook finds in a copy, before anybody tells it."""
    (control / "new").write_text(json.dumps({"hostname": "another copy"}))
    (control / "new").rename(control / "restored.json")


def line(started: subprocess.Popen[str], seconds: float = 15.0) -> str:
    """What it says next; "nothing" if it does not in time. By bytes: select knows of no buffer."""
    assert started.stdout is not None
    fd, data, end = started.stdout.fileno(), b"", time.monotonic() + seconds
    while not data.endswith(b"\n"):
        if not select.select([fd], [], [], max(0.0, end - time.monotonic()))[0]:
            return "nothing"
        piece = os.read(fd, 1)
        if not piece:
            break
        data += piece
    return data.decode().strip()


GREEN = {
    "gevent": "import gevent.monkey; gevent.monkey.patch_all()\n",
    "eventlet": "import warnings; warnings.simplefilter('ignore')\nimport eventlet; eventlet.monkey_patch()\n",
}


@pytest.mark.parametrize("first", ["patched", "asked"])
@pytest.mark.parametrize("kind", list(GREEN))
def test_green_threads(control: Path, kind: str, first: str) -> None:
    """Its thread is the program's own then, which must go on to take signals; or one that was there before."""
    ask = "workload.on_restore(lambda r: say(r['hostname']))\n"
    order = GREEN[kind] + ask if first == "patched" else ask + GREEN[kind]
    # eventlet's os.write() is for no handler.
    text = (
        f"{MASK}write = os.write\n{order}say(mask())\nsignal.signal(signal.SIGTERM, lambda *_: write(1, b'TERM\\n'))\n"
    )
    with program(control, text) as started:
        assert [line(started), line(started)] == ["0", "ready"]
        for _ in range(2):
            tell(control)
            assert line(started) == "copy"
            started.terminate()
            assert line(started) == "TERM"
        started.kill()
        assert started.communicate() == ("", "")


def test_green_threads_and_forks(control: Path) -> None:
    """The parent's green thread is there in its child as well, and closes nothing of it."""
    text = f"""{GREEN["gevent"]}{NUMBERS}
workload.on_restore(lambda r: say("parent"))
if os.fork() == 0:
    while alike(): time.sleep(0.01)
    say("seeded")
    {ON}
"""
    with program(control, text) as started:
        assert line(started) == "ready"
        wait_for("the child's socket", lambda: len(sockets(control)) == 2)
        tell(control)
        assert {line(started), line(started)} == {"parent", "seeded"}


@pytest.mark.parametrize("kind", list(GREEN))
def test_green_threads_in_a_worker_alone(control: Path, kind: str) -> None:
    """Its server loads the application first. What waits in the child is a thread of the system's, which would hang
    with gevent's modules: they are there before it makes its socket."""
    patches = GREEN[kind].replace("\n", "; ")
    text = f"""{NUMBERS}
workload.on_restore()
if os.fork() == 0:
    {patches}
    while alike(): time.sleep(0.01)
    numbers.seed(1)
    say("seeded")
    while alike(): time.sleep(0.01)
    say("seeded")
    {ON}
"""
    with program(control, text) as started:
        assert line(started) == "ready"
        wait_for("the child's socket", lambda: len(sockets(control)) == 2)
        for _ in range(2):
            tell(control)
            assert line(started) == "seeded"


LOST = """
workload.on_restore(lambda r: say("told"))
number = workload._listener.socket.fileno()
os.closerange(3, 100)
kept = open(os.devnull)
while kept.fileno() != number: os.dup2(kept.fileno(), number); kept = open(number, closefd=False)
def mine():
    try: return os.path.samestat(os.fstat(number), os.stat(os.devnull))
    except OSError: return False
"""


def test_a_lost_descriptor_is_not_closed_in_children(control: Path) -> None:
    text = f"""{LOST}
child = os.fork()
if child == 0:
    say("child", mine())
    time.sleep(0.6)
    say("child", mine())
    os._exit(0)
os.waitpid(child, 0)
"""
    with program(control, text) as started:
        assert [line(started) for _ in range(3)] == ["child True", "child True", "ready"]


def test_a_lost_descriptor_is_not_closed_at_the_end(control: Path) -> None:
    text = f"{LOST}\nimport atexit\natexit._run_exitfuncs()\nsay(mine())\n"
    with program(control, text, end="") as started:
        assert started.communicate() == ("True\n", "")
    assert sockets(control) == []
    with program(control, "workload.on_restore()\nos.closerange(3, 100)\n", end="") as started:
        assert started.communicate() == ("", "")


def test_who_lost_it_asks_once_more(control: Path) -> None:
    text = f"{LOST}\nsay(workload.on_restore(), mine())\n"
    with program(control, text) as started:
        assert [line(started), line(started)] == ["True True", "ready"]
        tell(control)
        assert line(started) == "told"
        assert len(sockets(control)) == 1


def test_who_lost_it_before_the_restore_is_told_when_it_asks(control: Path) -> None:
    text = f"{LOST}\nsay('lost'); sys.stdin.readline(); say(workload.on_restore())\n"
    with program(control, text, stdin=subprocess.PIPE) as started:
        assert line(started) == "lost"
        restore(control)
        assert started.stdin is not None
        started.stdin.write("\n")
        started.stdin.flush()
        assert {line(started), line(started), line(started)} == {"True", "told", "ready"}


def test_children_without_a_descriptor_are_told(control: Path) -> None:
    """A parent's lost number is no reason to leave a child without a socket, nor is it a traceback."""
    text = f"""{NUMBERS}
workload.on_restore()
os.close(workload._listener.socket.fileno())
if os.fork() == 0:
    while alike(): time.sleep(0.01)
    say("seeded"); os._exit(0)
"""
    with program(control, text) as started:
        assert line(started) == "ready"
        parents = set(control.glob(f"python-{started.pid}-*.sock"))
        wait_for("the child's socket", lambda: set(sockets(control)) - parents)
        for path in parents:
            path.unlink(missing_ok=True)
        tell(control)
        assert line(started) == "seeded"
        started.kill()
        assert started.communicate() == ("", "")


FORKS = f"""{NUMBERS}
workload.on_restore(lambda r: say("told"))
say("waits"); sys.stdin.readline()
if os.fork() == 0:
    time.sleep(0.2)
    say("alike" if alike() else "seeded")
    numbers.seed(1); say("again")
    while alike(): time.sleep(0.01)
    say("seeded"); os._exit(0)
"""


@pytest.mark.parametrize(("restored", "first"), [(True, "seeded"), (False, "alike")])
def test_a_child_that_is_forked_before_its_parent_is_told(control: Path, restored: bool, first: str) -> None:
    with program(control, FORKS, stdin=subprocess.PIPE) as started:
        assert line(started) == "waits"
        if restored:
            restore(control)
        assert started.stdin is not None
        started.stdin.write("\n")
        started.stdin.flush()
        assert {line(started) for _ in range(3)} == {"ready", first, "again"}
        wait_for("the child's socket", lambda: len(sockets(control)) == 2)
        tell(control)
        assert {line(started), line(started)} == {"seeded", "told"}


@pytest.mark.parametrize("asks", [False, True])
def test_a_child_that_is_restored_before_it_has_a_socket(control: Path, asks: bool) -> None:
    """It sees by itself that it was."""
    text = f"""{NUMBERS}
workload.on_restore()
workload._GRACE = 1.0
if os.fork() == 0:
    say("child"); sys.stdin.readline()
    if {asks}: workload.on_restore(lambda r: say(r["hostname"], alike()))
    while alike(): time.sleep(0.01)
    say("seeded")
    {ON}
time.sleep(60)
"""
    with program(control, text, stdin=subprocess.PIPE) as started:
        assert line(started) == "child"
        assert len(sockets(control)) == 1
        restore(control)
        assert started.stdin is not None
        started.stdin.write("\n")
        started.stdin.flush()
        wanted = {"another copy False", "seeded"} if asks else {"seeded"}
        assert {line(started) for _ in wanted} == wanted
        wait_for("the child's socket", lambda: len(sockets(control)) == 2)
        time.sleep(1.2)
        assert len(sockets(control)) == 2, "a second one for the child"


POPEN = """
import subprocess
def alone(): say(len(os.listdir("/proc/self/task")))
started = [subprocess.Popen(["sleep", "60"], preexec_fn=alone) for _ in range(3)]
"""
RUNS = {
    "subprocess": f"workload.on_restore(){POPEN}",
    "gevent": f"{GREEN['gevent']}workload.on_restore(){POPEN}",
    "exec": """
workload.on_restore()
workload._GRACE = 2.0
for _ in range(3):
    say(1)
    if os.fork() == 0: os.execvp("sleep", ["sleep", "60"])
""",
}


@pytest.mark.parametrize("kind", list(RUNS))
def test_a_child_that_runs_another_program_leaves_nothing(control: Path, kind: str) -> None:
    """And has one thread only where it can be known: unshare(2) of a user namespace wants that."""
    seconds = 3 if kind == "exec" else 0.6
    with program(control, f"{RUNS[kind]}time.sleep({seconds})\n") as started:
        assert [line(started) for _ in range(4)] == ["1", "1", "1", "ready"]
        assert len(sockets(control)) == 1


def test_sockets_of_processes_that_became_another_program_are_swept(control: Path) -> None:
    """They live on, and nobody hears there."""
    with program(control, "workload.on_restore()\nos.execvp('sleep', ['sleep', '60'])\n") as started:
        wait_for("the other program", lambda: Path(f"/proc/{started.pid}/comm").read_text() == "sleep\n")
        assert len(sockets(control)) == 1
        with program(control, "workload.on_restore(lambda r: say('told'))") as other:
            assert line(other) == "ready"
            (path,) = sockets(control)
            with program(control, "workload.on_restore()") as third:
                assert line(third) == "ready"
                assert len(sockets(control)) == 2 and path.exists(), "its process listens"
                tell(control)
                assert line(other) == "told"
