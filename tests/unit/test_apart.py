"""Work in a process of its own: what it gives, how it dies, and that one that hangs holds nobody up."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rewarm import apart
from rewarm.apart import Child
from rewarm.errors import NotUndone
from support.proc import reap_orphans, state_of, wait_for
from support.silence import Silence

SECONDS = 20.0

# What `create` does, as far as processes go: the work hangs in a thread, then this process becomes another program.
HANGING = """
import os, sys, threading
from rewarm import apart, aside

def hang():
    fd = os.open(sys.argv[1] + "/x", os.O_RDONLY)
    os.pread(fd, 1, 0)

def work(child):
    child.begin()
    try:
        aside.run(hang, 1)
        return "not so late"
    except TimeoutError:
        return "too late"

print(apart.run(work, 20, lambda: print("undone")), flush=True)
os.execv("/bin/echo", ["echo", "cold"])
"""


def python(code: str, *words: str | Path) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    argv = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, text=True)


def run(work: str, limit: float = SECONDS) -> str:
    """`apart.run` of an expression in which `child` is the Child; the undoing is not to happen."""
    return apart.run(lambda child: str(eval(work, globals(), {"child": child})), limit, lambda: pytest.fail("undone"))


def children() -> str:
    return Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text()


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """No child is left, and signals are handled as they were."""

    def state() -> list[object]:
        handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)]
        pipes = []
        for fd in os.listdir("/proc/self/fd"):
            with contextlib.suppress(FileNotFoundError):  # that of the listing
                target = os.readlink(f"/proc/self/fd/{fd}")
                pipes += [target] if target.startswith("pipe:") and int(fd) > 2 else []
        return [children(), signal.pthread_sigmask(signal.SIG_BLOCK, ()), handlers[2], pipes]

    before, handlers = state(), [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    yield
    for number, handler in zip((signal.SIGTERM, signal.SIGINT), handlers, strict=True):
        signal.signal(number, handler)  # after a success they are noted for good

    def settled() -> bool:
        reap_orphans()  # where this process is a subreaper, what hung comes to it
        return state() == before

    wait_for(f"what was before: {before} instead of {state()}", settled, timeout=5)


def test_gives_what_the_work_gives() -> None:
    assert run("''") == ""
    assert run("'it says é\\n' + 'x' * 200_000") == f"it says é\n{'x' * 200_000}"
    assert run("child.begin() or 'begun'") == "begun"


def test_what_the_work_raises() -> None:
    def undone(child: Child) -> str:
        raise NotUndone("undo restore", "c1", "why", "what next")

    with pytest.raises(NotUndone, match="undo restore c1: why; what next"):
        apart.run(undone, SECONDS, lambda: pytest.fail("undone"))
    assert "internal error ZeroDivisionError" in run("1 / 0")
    assert "internal error SystemExit" in run("sys.exit(3)")


@pytest.mark.parametrize(
    ("end", "cause", "step"),
    [("os.kill(os.getpid(), 9)", "killed by signal 9", "OOM"), ("os._exit(3)", "with status 3", "report it")],
)
def test_a_child_that_dies(end: str, cause: str, step: str) -> None:
    calls: list[str] = []
    with pytest.raises(apart.Died, match=cause) as caught:
        apart.run(lambda child: str(eval(end)), SECONDS, lambda: calls.append("undone"))
    assert calls == ["undone"]
    assert step in caught.value.next_step


@pytest.mark.parametrize("beginning", ["", "child.begin() or "])
def test_a_child_that_takes_too_long(beginning: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apart, "_LONGEST_START", 100 if beginning else 0.3)
    calls: list[str] = []
    work = f"{beginning} time.sleep(100)"
    limit = 0.3 if beginning else 100.0
    began = time.monotonic()
    with pytest.raises(apart.Died, match=r"no answer within 0\.3 s"):
        apart.run(lambda child: str(eval(work, globals(), {"child": child})), limit, lambda: calls.append("undone"))
    assert time.monotonic() - began < 10
    assert calls == ["undone"]


@pytest.mark.parametrize("operation", ["OPEN", "READ", "FLUSH", ""])
def test_a_child_that_hangs_holds_nobody_up(tmp_path: Path, operation: str) -> None:
    """Neither the process that waits for it, nor who reads its output; what it has open may hang when it is closed."""
    (tmp_path / "source").mkdir()
    (tmp_path / "source/x").write_text("x")
    with Silence(tmp_path / "silence", tmp_path / "source") as silence:
        silence.fall_silent(*([operation] if operation else []))
        process = python(HANGING, silence.target)
        wait_for("the child to hang", silence.asked.is_set)
        said = "not so late" if operation == "FLUSH" else "too late"
        assert process.communicate(timeout=SECONDS)[0] == f"{said}\ncold\n"
        assert process.returncode == 0


def test_a_process_alone_is_held_up(tmp_path: Path) -> None:
    """What this is good for: the same without a child does not come to its end."""
    with Silence(tmp_path / "silence") as silence:
        code = HANGING.replace('apart.run(work, 20, lambda: print("undone"))', "work(apart.Child(0, 1))")
        process = python(code, silence.target)
        wait_for("the thread to hang", silence.asked.is_set)
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)] == ["\n", "too late\n"]
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)
        process.kill()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)
        silence.end()
        assert process.wait(SECONDS) == -signal.SIGKILL
        process.stdout.close()


LASTING = """
import os, signal, sys, time
from rewarm import apart

def interrupted(number, frame):
    raise KeyboardInterrupt

def undo():
    {undo}
    print("undone by the parent", flush=True)

def work(child):
    child.begin()
    {work}
    return "gave up"

signal.signal(signal.SIGTERM, interrupted)
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by what a shell runs in the background
try:
    print([apart.run(work, 100, undo)], flush=True)
    {after}
except KeyboardInterrupt:
    print("interrupted", flush=True)
except apart.Died as error:
    print(error.cause)
"""
SLEEP = "print(os.getpid(), flush=True); time.sleep(100)"
UNDOING = "\n    ".join(
    [
        "try:",
        "    print(os.getpid(), flush=True); time.sleep(100)",
        "except BaseException: time.sleep(0.5); print('undone', flush=True); raise",
    ]
)


def line(process: subprocess.Popen[str]) -> str:
    """Its next line, and not a byte more: what is read with it, `communicate` with a time limit would not see."""
    assert process.stdout is not None
    found = b""
    while not found.endswith(b"\n") and (byte := os.read(process.stdout.fileno(), 1)):
        found += byte
    return found.decode()


def begun(work: str, undo: str = "", after: str = "") -> tuple[subprocess.Popen[str], int]:
    process = python(LASTING.format(work=work, undo=undo or "pass", after=after or "pass"))
    return process, int(line(process))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_goes_to_the_child_first(number: signal.Signals) -> None:
    """And what it undoes for that is waited for, though more of them come."""
    process, child = begun(UNDOING)
    for _ in range(5):
        process.send_signal(number)
        time.sleep(0.02)
    assert process.communicate(timeout=SECONDS)[0] == "undone\ninterrupted\n"
    assert state_of(child) is None


def test_a_signal_to_both(tmp_path: Path) -> None:
    """As from who signals a whole process group or cgroup."""
    process, child = begun(UNDOING)
    os.kill(child, signal.SIGTERM)
    process.terminate()
    assert process.communicate(timeout=SECONDS)[0] == "undone\ninterrupted\n"


def test_a_signal_that_comes_too_late() -> None:
    """The child has done what it was asked for, and says so: that is what counts, here and until the end."""
    work = "signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(1); return ''"
    process, _ = begun(work, after="os.kill(os.getpid(), signal.SIGTERM); print('on')")
    process.terminate()
    assert process.communicate(timeout=SECONDS)[0] == "['']\non\n"


def test_a_signal_while_the_parent_undoes() -> None:
    """The undoing comes to its end first."""
    process, child = begun(SLEEP, undo="print('undoing', flush=True); time.sleep(1)")
    os.kill(child, signal.SIGKILL)
    assert line(process) == "undoing\n"
    process.terminate()
    assert process.communicate(timeout=SECONDS)[0] == "undone by the parent\ninterrupted\n"


def test_a_failure_leaves_signals_as_they_were() -> None:
    process, child = begun(SLEEP)
    os.kill(child, signal.SIGKILL)
    assert process.communicate(timeout=SECONDS)[0] == "undone by the parent\nits process was killed by signal 9\n"
    process, _ = begun("print(1, flush=True); return 'no'", after="os.kill(os.getpid(), signal.SIGTERM); print('on')")
    assert process.communicate(timeout=SECONDS)[0] == "['no']\ninterrupted\n"


def test_the_child_dies_with_its_parent() -> None:
    process, child = begun(SLEEP)
    process.kill()
    process.communicate(timeout=SECONDS)
    wait_for("the child's end", lambda: state_of(child) in (None, "Z"), timeout=10)


def test_the_pipe_hangs_up_when_the_child_is_given_up() -> None:
    """Though it still hangs: the guard learns of it so."""
    read, write = os.pipe()

    def work(child: Child) -> str:
        pid = os.fork()
        if pid == 0:
            os.setsid()
            os.write(write, b"forked")
            os.write(write, b" hung up" if os.read(child.life, 1) == b"" else b" ?")
            os._exit(0)
        child.begin()
        time.sleep(100)
        return ""

    with pytest.raises(apart.Died):
        apart.run(work, 1, lambda: None)
    os.close(write)
    with os.fdopen(read, "rb") as file:
        assert file.read() == b"forked hung up"


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_caller_that_has_closed_its_streams(tmp_path: Path, closed: str) -> None:
    """Nothing else takes their place, in which a program below would take it for its output."""
    code = "import os, sys\nfrom rewarm import apart\nreason = apart.run(lambda child: 'cold', 20, lambda: None)\n"
    code += "names = [os.readlink(f'/proc/self/fd/{fd}') for fd in (0, 1, 2)]\n"
    code += "open(sys.argv[1], 'w').write(f'{reason} {names}')"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    words = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-c", code, str(tmp_path / "said")]
    done = subprocess.run(words, env=env, timeout=SECONDS, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                          stderr=subprocess.DEVNULL)  # fmt: skip
    assert done.returncode == 0
    assert (tmp_path / "said").read_text() == f"cold {['/dev/null'] * 3}"


def test_a_caller_that_ignores_the_ends_of_children() -> None:
    """By inheritance, so that the kernel would throw exit statuses away."""
    code = "from rewarm import apart; import signal\n"
    code += (
        "print(apart.run(lambda child: 'cold', 20, lambda: None), signal.getsignal(signal.SIGCHLD) == signal.SIG_IGN)"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    words = ["env", "--ignore-signal=CHLD", sys.executable, "-c", code]
    done = subprocess.run(words, env=env, timeout=SECONDS, capture_output=True, text=True)
    assert done.stdout == "cold True\n", done.stderr


def test_no_child_can_be_had() -> None:
    """Its work is not done by the parent instead, and signals are as they were."""
    code = (
        "import os, resource, signal\nfrom rewarm import apart\n"
        "resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))\nos.setuid(65534)\n"
        "try: print(apart.run(lambda child: 'done', 20, lambda: print('undone')))\n"
        "except apart.Died as error: print(error.cause, signal.pthread_sigmask(signal.SIG_BLOCK, ()))\n"
    )
    process = python(code)
    said = "undone\nstart its process: Resource temporarily unavailable set()\n"
    assert process.communicate(timeout=SECONDS)[0] == said
