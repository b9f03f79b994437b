"""rewarm-guard: reports the end of its program, lets go on commit, and kills everything below it in every other case.

The real binary, built plain and with ASan and UBSan.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rewarm_native import process

NATIVE = Path(__file__).resolve().parents[2] / "native"
SECONDS = 20.0

# Leaves a process behind that forked twice and has a session of its own; its pid goes into the file argv[1].
ORPHAN = """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        open(sys.argv[1], "w").write(str(os.getpid()))
        {action}
    os._exit(0)
while not os.path.exists(sys.argv[1]) or not open(sys.argv[1]).read():
    time.sleep(0.002)
"""
LASTING_ORPHAN = ORPHAN.format(action="time.sleep(1000)")


@pytest.fixture(scope="module", params=["plain", "sanitized"])
def binary(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    build = tmp_path_factory.mktemp(request.param)
    sanitize = ["SANITIZE=1"] if request.param == "sanitized" else []
    subprocess.run(["make", "-s", "-C", NATIVE, f"BUILD={build}", *sanitize, f"{build}/rewarm-guard"], check=True)
    return build / "rewarm-guard"


class Guard:
    """A running guard and rewarm's end of its control socket."""

    def __init__(self, binary: Path, output: Path, *program: str | Path, recover: tuple[str, ...] = (),
                 kind: int = socket.SOCK_STREAM) -> None:  # fmt: skip
        self.control, guards = socket.socketpair(socket.AF_UNIX, kind)
        self.control.settimeout(SECONDS)
        life, self.life = os.pipe()
        self.output = output
        with guards, output.open("w") as file:
            self.process = subprocess.Popen(
                [binary, str(guards.fileno()), str(life), str(len(recover)), *recover, *program],
                pass_fds=[guards.fileno(), life],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        os.close(life)

    def hang_up(self) -> None:
        """As if the process that the engine waits for had ended. A second call does nothing."""
        if self.life >= 0:
            os.close(self.life)
            self.life = -1

    def line(self) -> str:
        return self.control.recv(100).decode()

    def say(self, byte: bytes) -> None:
        self.control.sendall(byte)

    def status(self) -> int:
        status = self.process.wait(SECONDS)
        text = self.output.read_text()
        assert "Sanitizer" not in text and "runtime error" not in text, text
        return status


Start = Callable[..., Guard]


@pytest.fixture
def start(binary: Path, tmp_path: Path) -> Iterator[Start]:
    guards: list[Guard] = []

    def make(*program: str | Path, recover: tuple[str, ...] = (), kind: int = socket.SOCK_STREAM) -> Guard:
        guards.append(Guard(binary, tmp_path / "output", *program, recover=recover, kind=kind))
        guards[-1].say(b"s")
        return guards[-1]

    yield make
    for guard in guards:
        guard.control.close()  # whatever a failed test left below the guard goes with it
        guard.hang_up()
        guard.process.wait(SECONDS)


@pytest.fixture
def adopting() -> Iterator[None]:
    """The test is where orphans go, as the shim is for the runtime."""
    process.set_child_subreaper(True)
    yield
    process.set_child_subreaper(False)
    with contextlib.suppress(ChildProcessError):  # when there is none left
        while os.waitpid(-1, os.WNOHANG)[0] != 0:
            pass


def python(code: str, *words: str | Path) -> list[str]:
    return [sys.executable, "-I", "-S", "-c", code, *map(str, words)]


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "waited for too long"
        time.sleep(0.005)


def pid_in(path: Path) -> int:
    wait_until(lambda: path.exists() and path.read_text() != "")
    return int(path.read_text())


def stat(pid: int) -> tuple[str, int]:
    """State and parent; ("", 0) for a process that is gone."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return "", 0
    return words[0], int(words[1])


def gone(pid: int) -> bool:
    return stat(pid)[0] == ""


# --- before the program


@pytest.mark.parametrize("word", [b"c", b"a", b"x", b""])
def test_nothing_is_run_before_it_is_told_to(binary: Path, tmp_path: Path, word: bytes) -> None:
    """The recovery runs if rewarm has died by then, and only then."""
    ran, recovered = tmp_path / "ran", tmp_path / "recovered"
    recover = ("/usr/bin/touch", str(recovered))
    guard = Guard(binary, tmp_path / "output", "/usr/bin/touch", ran, recover=recover)
    if word:
        guard.say(word)
        assert guard.line() == "clean\n"
    else:
        guard.control.close()
    assert guard.status() == (1 if word else 0)
    assert not ran.exists()
    assert recovered.exists() == (not word)


# --- the end of the program


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET])
def test_exit_status_and_commit(start: Start, kind: int) -> None:
    guard = start("/bin/sh", "-c", "exit 3", kind=kind)
    assert guard.line() == "exit 3\n"
    assert guard.process.poll() is None
    guard.say(b"c")
    assert guard.status() == 0
    assert guard.line() == ""


def test_death_by_signal(start: Start) -> None:
    guard = start("/bin/sh", "-c", "kill -USR1 $$")
    assert guard.line() == f"signal {signal.SIGUSR1.value}\n"
    guard.say(b"c")
    assert guard.status() == 0


def test_a_program_that_is_not_there(start: Start) -> None:
    guard = start("/nowhere/program")
    assert guard.line() == "exit 127\n"
    guard.say(b"c")
    assert guard.status() == 0
    assert "run /nowhere/program: No such file" in guard.output.read_text()


def test_the_program_has_everything_but_the_control_socket(start: Start, tmp_path: Path) -> None:
    code = """
import os, signal
inherited = [fd for fd in map(int, os.listdir("/proc/self/fd")) if os.path.exists(f"/proc/self/fd/{fd}")]
print([os.readlink(f"/proc/self/fd/{fd}") for fd in inherited if fd > 2])
print([signal.getsignal(one) == signal.SIG_DFL for one in (signal.SIGTERM, signal.SIGHUP)])
"""
    guard = start(*python(code))
    assert guard.line() == "exit 0\n"
    guard.say(b"c")
    assert guard.status() == 0
    inherited = signal.getsignal(signal.SIGHUP) == signal.SIG_DFL  # nohup and its like ignore it
    assert guard.output.read_text() == f"[]\n[True, {inherited}]\n"


def test_ignored_signals_stay_ignored_for_the_program(start: Start, binary: Path) -> None:
    """As nohup has it; SIGCHLD too, which must not cost the guard the exit status."""
    code = "import signal; print(all(signal.getsignal(s) == signal.SIG_IGN for s in (signal.SIGHUP, signal.SIGCHLD)))"
    words = python(code)
    ours, guards = socket.socketpair()
    life, end = map(os.fdopen, os.pipe())
    with ours, guards, life, end:
        fds = guards.fileno(), life.fileno()
        done = subprocess.Popen(
            ["/usr/bin/env", "--ignore-signal=HUP", "--ignore-signal=CHLD", binary, *map(str, fds), "0", *words],
            pass_fds=fds,
            stdout=subprocess.PIPE,
            text=True,
        )
        ours.send(b"s")
        assert ours.recv(100) == b"exit 0\n"
        ours.send(b"c")
        assert done.communicate(timeout=SECONDS)[0] == "True\n"
        assert done.returncode == 0


# --- commit


def test_commit_leaves_descendants_alone(start: Start, tmp_path: Path, adopting: None) -> None:
    guard = start(*python(LASTING_ORPHAN, tmp_path / "pid"))
    assert guard.line() == "exit 0\n"
    orphan = pid_in(tmp_path / "pid")
    assert stat(orphan)[1] == guard.process.pid
    guard.say(b"c")
    assert guard.status() == 0
    assert stat(orphan) == ("S", os.getpid())
    os.kill(orphan, signal.SIGKILL)
    assert os.waitpid(orphan, 0)[1] == signal.SIGKILL


def test_the_status_of_an_orphan_is_left_to_whoever_adopts_it(start: Start, tmp_path: Path, adopting: None) -> None:
    guard = start(*python(ORPHAN.format(action="os._exit(7)"), tmp_path / "pid"))
    assert guard.line() == "exit 0\n"
    orphan = pid_in(tmp_path / "pid")
    wait_until(lambda: stat(orphan) == ("Z", guard.process.pid))
    guard.say(b"c")
    assert guard.status() == 0
    assert os.waitstatus_to_exitcode(os.waitpid(orphan, 0)[1]) == 7


# --- abort


@pytest.mark.parametrize("word", [b"a", b"?"])
def test_abort_after_the_end_kills_orphans(start: Start, tmp_path: Path, word: bytes) -> None:
    guard = start(*python(LASTING_ORPHAN, tmp_path / "pid"), recover=("/usr/bin/touch", str(tmp_path / "recovered")))
    assert guard.line() == "exit 0\n"
    orphan = pid_in(tmp_path / "pid")
    guard.say(word)
    assert guard.line() == "clean\n"
    assert gone(orphan)
    assert guard.status() == 1
    assert not (tmp_path / "recovered").exists()


@pytest.mark.parametrize("word", [b"a", b"c"], ids=["abort", "commit too early"])
def test_abort_while_the_program_runs(start: Start, tmp_path: Path, word: bytes) -> None:
    guard = start(*python(LASTING_ORPHAN + "time.sleep(1000)", tmp_path / "pid"))
    orphan = pid_in(tmp_path / "pid")
    guard.say(word)
    assert guard.line() == "clean\n"
    assert gone(orphan)
    assert guard.status() == 1


def test_abort_kills_the_stopped_the_deaf_and_the_numerous(start: Start, tmp_path: Path) -> None:
    code = """
import os, signal, sys, threading, time
def tree(depth):
    for number in range(3):
        if os.fork() == 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            with open(sys.argv[1], "a") as file: file.write(f"{os.getpid()}\\n")
            if number == 0: os.setsid()
            if depth:  # children of a thread that is not the first
                thread = threading.Thread(target=tree, args=(depth - 1,)); thread.start(); thread.join()
            if number == 1: os.kill(os.getpid(), signal.SIGSTOP)
            if number == 2 and depth == 1: os._exit(0)
            time.sleep(1000)
tree(3)
time.sleep(1000)
"""
    guard = start(*python(code, tmp_path / "pids"))
    expected = 3 + 9 + 27 + 81
    wait_until(lambda: (tmp_path / "pids").exists() and len((tmp_path / "pids").read_text().split()) == expected)
    guard.say(b"a")
    assert guard.line() == "clean\n"
    assert all(gone(int(pid)) for pid in (tmp_path / "pids").read_text().split())
    assert guard.status() == 1


def test_abort_catches_processes_that_keep_forking(start: Start, tmp_path: Path) -> None:
    """Each lives for some milliseconds and has a successor: a walk of /proc alone would always be late for one."""
    code = """
import os, sys, time
if os.fork() == 0:
    with open(sys.argv[1], "a") as file: file.write("x")
    while True:
        time.sleep(0.003)
        if os.fork() != 0:
            os._exit(0)
        os.utime(sys.argv[1])
"""
    guard = start(*python(code, tmp_path / "beat"))
    assert guard.line() == "exit 0\n"
    wait_until(lambda: (tmp_path / "beat").exists())
    time.sleep(0.05)
    guard.say(b"a")
    assert guard.line() == "clean\n"
    assert guard.status() == 1
    last = (tmp_path / "beat").stat().st_mtime_ns
    time.sleep(0.1)
    assert (tmp_path / "beat").stat().st_mtime_ns == last


def test_abort_kills_a_pid_namespace(start: Start, tmp_path: Path) -> None:
    guard = start("/usr/bin/unshare", "--pid", "--fork", "--kill-child=SIGTERM", "/bin/sh", "-c",
                  f"sleep 1000 & sleep 1000 & echo x > {tmp_path}/up; wait")  # fmt: skip
    wait_until(lambda: (tmp_path / "up").exists())
    below = [guard.process.pid]
    for pid in below:
        below += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    assert len(below) == 5  # guard, unshare, sh, two sleeps
    guard.say(b"a")
    assert guard.line() == "clean\n"
    assert all(gone(pid) for pid in below[1:])
    assert guard.status() == 1


# --- rewarm dies


def test_end_of_file_while_the_program_runs(start: Start, tmp_path: Path) -> None:
    guard = start(*python(LASTING_ORPHAN + "time.sleep(1000)", tmp_path / "pid"))
    orphan = pid_in(tmp_path / "pid")
    guard.control.close()
    assert guard.status() == 1
    assert gone(orphan)


@pytest.mark.parametrize("unread", [True, False])
def test_end_of_file_after_the_end_recovers_when_all_is_clean(start: Start, tmp_path: Path, unread: bool) -> None:
    check = 'kill -0 "$(cat "$1")" 2> /dev/null && echo alive > "$2" || echo "clean $#" > "$2"; exit 9'
    words = ("/bin/sh", "-c", check, "x", str(tmp_path / "pid"), str(tmp_path / "recovered"))
    guard = start(*python(LASTING_ORPHAN, tmp_path / "pid"), recover=words)
    if not unread:
        assert guard.line() == "exit 0\n"
    wait_until(
        lambda: len(Path(f"/proc/{guard.process.pid}/task/{guard.process.pid}/children").read_text().split()) > 0
    )
    pid_in(tmp_path / "pid")
    guard.control.close()
    assert guard.status() == 9  # the recovery's own
    assert (tmp_path / "recovered").read_text() == "clean 2\n"


def test_a_recovery_that_cannot_be_run(start: Start) -> None:
    guard = start("/bin/true", recover=("/nowhere/recover",))
    assert guard.line() == "exit 0\n"
    guard.control.close()
    assert guard.status() == 1
    assert "run /nowhere/recover" in guard.output.read_text()


# --- a rewarm that is dead and holds the socket


@pytest.mark.parametrize("began", [True, False])
def test_a_hang_up_recovers_though_the_socket_stays_open(binary: Path, tmp_path: Path, began: bool) -> None:
    """As when a thread of rewarm's hangs in a call that no signal ends."""
    recovered = tmp_path / "recovered"
    recover = ("/usr/bin/touch", str(recovered))
    guard = Guard(binary, tmp_path / "output", *python(LASTING_ORPHAN, tmp_path / "pid"), recover=recover)
    if began:
        guard.say(b"s")
        orphan = pid_in(tmp_path / "pid")
    guard.hang_up()
    assert guard.status() == 0
    assert recovered.exists()
    assert not began or gone(orphan)
    guard.control.close()


def test_a_hang_up_waits_for_the_last_word(start: Start, tmp_path: Path) -> None:
    """A commit that came before it counts; a death that comes soon after it is waited for."""
    recovered = tmp_path / "recovered"
    recover = ("/usr/bin/touch", str(recovered))
    guard = start("/bin/true", recover=recover)
    assert guard.line() == "exit 0\n"
    guard.process.send_signal(signal.SIGSTOP)
    guard.say(b"c")
    guard.hang_up()
    guard.process.send_signal(signal.SIGCONT)
    assert guard.status() == 0 and not recovered.exists()
    guard = start("/bin/true", recover=recover)
    assert guard.line() == "exit 0\n"
    guard.hang_up()
    began = time.monotonic()
    wait_until(recovered.exists)
    assert time.monotonic() - began > 1.5


@pytest.mark.parametrize("word", [b"s", b"a", b"x"])
@pytest.mark.parametrize("began", [True, False])
def test_after_a_hang_up_no_other_word_counts(binary: Path, tmp_path: Path, word: bytes, began: bool) -> None:
    """Whatever it has said, rewarm is dying: what it has changed is put back."""
    recovered = tmp_path / "recovered"
    guard = Guard(binary, tmp_path / "output", "/bin/sleep", "100", recover=("/usr/bin/touch", str(recovered)))
    if began:
        guard.say(b"s")
    guard.hang_up()
    guard.say(word)
    assert guard.status() == 0
    assert recovered.exists()
    guard.control.close()


# --- the guard itself


def test_signals_that_people_and_init_systems_send_are_ignored(start: Start) -> None:
    guard = start("/bin/sh", "-c", "exit 0")
    assert guard.line() == "exit 0\n"
    assert os.getsid(guard.process.pid) == guard.process.pid
    for one in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        guard.process.send_signal(one)
    time.sleep(0.02)
    guard.say(b"c")
    assert guard.status() == 0


def test_the_program_dies_with_the_guard(start: Start, tmp_path: Path, adopting: None) -> None:
    guard = start("/bin/sh", "-c", f"echo $$ > {tmp_path}/pid; exec sleep 1000")
    program = pid_in(tmp_path / "pid")
    guard.process.kill()
    assert guard.process.wait(SECONDS) == -signal.SIGKILL
    assert os.waitstatus_to_exitcode(os.waitpid(program, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize(
    "words",
    [[], ["3"], ["3", "4"], ["3", "4", "0"], ["x", "4", "0", "true"], ["3", "4", "1", "true"], ["3", "4", "-1", "true"],
     ["3x", "4", "0", "true"], ["3", "x", "0", "true"], ["3", "-1", "0", "true"]],
)  # fmt: skip
def test_wrong_use_starts_nothing(binary: Path, words: list[str]) -> None:
    done = subprocess.run([binary, *words], capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: rewarm-guard CONTROL_FD")


def test_a_control_that_is_no_socket_is_refused(binary: Path) -> None:
    for fd in ("0", "999"):
        done = subprocess.run([binary, fd, "0", "0", "true"], stdin=subprocess.DEVNULL, capture_output=True, text=True)
        assert done.returncode == 2
        assert "use CONTROL_FD" in done.stderr


def test_a_life_that_is_not_there_is_refused(binary: Path) -> None:
    ours, guards = socket.socketpair()
    with ours, guards:
        words = [str(binary), str(guards.fileno()), "999", "0", "true"]
        done = subprocess.run(words, pass_fds=[guards.fileno()], capture_output=True, text=True)
    assert done.returncode == 2
    assert "close LIFE_FD on exec: Bad file descriptor" in done.stderr
