"""Huge pages for memory that another process takes: a thread of it is traced from outside, and must not notice."""

from __future__ import annotations

import mmap
import os
import random
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from rewarm import processes
from rewarm.gpu import advise as advising
from rewarm.gpu.threads import of_number
from rewarm_native import process
from support.proc import children, wait_for

SOURCE = Path(__file__).parents[1] / "support" / "victim.c"
MIB = 1 << 20
SIZE = 64 * MIB


class Victim:
    """A process whose second thread does what it is told (victim.c)."""

    def __init__(self, program: Path) -> None:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([program], stdin=pipe, stdout=pipe, stderr=pipe, text=True, bufsize=1)
        self.pid = self.process.pid
        self.tid = int(self.answer())

    def say(self, word: str, number: int = 1) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word} {number}\n")

    def answer(self) -> str:
        assert self.process.stdout is not None
        assert select.select([self.process.stdout], [], [], 20)[0], "no answer"
        return self.process.stdout.readline().strip()

    def ask(self, word: str, number: int = 1) -> str:
        self.say(word, number)
        return self.answer()

    def map(self, word: str, size: int = SIZE) -> int:
        return int(self.ask(word, size), 16)

    def mapping(self, address: int) -> tuple[bool, int]:
        """Whether the mapping there may have huge pages, and how many bytes of it are in such."""
        for part in re.split(r"(?m)^(?=[0-9a-f]+-)", Path(f"/proc/{self.pid}/smaps").read_text())[1:]:
            start, end = (int(word, 16) for word in part.split()[0].split("-"))
            if start <= address < end:
                huge = re.search(r"AnonHugePages: +(\d+)", part)
                assert huge
                return "hg" in part.partition("VmFlags:")[2].split(), int(huge[1]) << 10
        raise AssertionError(f"nothing is mapped at {address:#x}")

    def state(self, tid: int) -> str:
        found = processes.stat(self.pid, tid)
        assert found is not None
        return found.state

    def tracer(self) -> int:
        text = Path(f"/proc/{self.pid}/task/{self.tid}/status").read_text()
        return int(text.partition("TracerPid:")[2].split()[0])

    def signal(self, meanwhile: Callable[[], object] = lambda: None) -> None:
        """One SIGUSR1, which has to arrive."""
        os.kill(self.pid, signal.SIGUSR1)
        meanwhile()
        assert self.process.stderr is not None
        assert select.select([self.process.stderr], [], [], 20)[0], "a signal is lost"
        assert os.read(self.process.stderr.fileno(), 10) == b"s"

    def loop(self) -> None:
        assert self.ask("loop", 32 * MIB) == "loops"

    def end_loop(self) -> tuple[int, int]:
        os.kill(self.pid, signal.SIGUSR2)
        times, huge = self.answer().split()
        return int(times), int(huge)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("advise") / "victim"
    flags = ["-O1", "-mavx", "-mno-red-zone", "-Wall", "-Wextra", "-Werror", "-pthread"]
    subprocess.run(["cc", *flags, "-o", str(path), str(SOURCE)], check=True)
    return path


@pytest.fixture
def victims(program: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Victim]]:
    monkeypatch.setattr(advising, "on_request", lambda: True)
    made: list[Victim] = []

    def make() -> Victim:
        made.append(Victim(program))
        return made[-1]

    yield make
    for victim in made:
        victim.process.kill()
        victim.process.communicate()


@pytest.fixture
def victim(victims: Callable[[], Victim]) -> Victim:
    return victims()


@pytest.fixture(scope="module")
def available() -> bool:
    """Whether a process that asks for a huge page gets one here and now."""
    with mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as area:
        area.madvise(mmap.MADV_HUGEPAGE)
        for at in range(0, SIZE, mmap.PAGESIZE):
            area[at] = 1
        return bool(re.search(r"AnonHugePages: +[1-9]", Path("/proc/self/smaps").read_text()))


def watching(*victims: Victim) -> advising.HugePages:
    return advising.HugePages([(victim.pid, victim.tid) for victim in victims])


def helper(pages: advising.HugePages) -> int:
    assert pages._helper is not None
    return pages._helper.pid


def test_a_large_mapping_has_huge_pages_from_its_first_byte(victims: Callable[[], Victim], available: bool) -> None:
    """In every process that is watched, and nothing else changes there."""
    one, other = victims(), victims()
    before = one.map("private")
    with watching(one, other) as pages:
        threads = processes.threads(helper(pages))
        assert {one.tracer(), other.tracer()} < set(threads)
        large = {victim: victim.map("private") for victim in (one, other)}
        again = one.map("private", 32 * MIB)
        populated = one.map("populated")
        others = [one.map(word) for word in ("shared", "file", "readonly", "main")]
        small = one.map("private", 32 * MIB - 4096)
        for victim, address in (*large.items(), (one, again), (one, populated)):
            flag, size = victim.mapping(address)
            assert flag and bool(size) == available
        assert not any(one.mapping(address)[0] for address in (before, small, *others))
    assert one.tracer() == other.tracer() == 0
    assert not one.mapping(one.map("private"))[0]


def test_the_thread_gets_everything_back(victim: Victim) -> None:
    """Registers, vector registers, control words, red zone, signal mask and signal stack."""
    assert victim.ask("registers") == "0"
    with watching(victim):
        assert [victim.ask("registers") for _ in range(20)] == ["0"] * 20
        assert victim.mapping(victim.map("private"))[0]


def test_a_killed_helper_does_no_harm(victim: Victim, available: bool) -> None:
    """At whatever moment: the thread does little but mappings that the helper is after. Nor is a signal lost."""
    victim.loop()
    chance = random.Random(1)
    for at in range(30):
        with watching(victim) as pages:
            pid = helper(pages)
            time.sleep(chance.random() * 0.02)
            if at % 2:
                victim.signal(partial(os.kill, pid, signal.SIGKILL))
            else:
                os.kill(pid, signal.SIGKILL)
        assert victim.process.poll() is None
    times, huge = victim.end_loop()
    assert times > 1000
    assert not available or huge > 30
    assert victim.ask("registers") == "0"
    assert victim.tracer() == 0


def test_signals_arrive(victim: Victim) -> None:
    with watching(victim):
        for _ in range(20):
            victim.signal()  # in read(2), which goes on
        victim.loop()
        for _ in range(500):
            victim.signal()
            time.sleep(0.0005)
        assert victim.end_loop()[0] > 10
    assert victim.ask("registers") == "0"


def test_job_control(victim: Victim) -> None:
    """A stop is reported to the parent, lasts, and ends as ever: also when the helper comes or goes meanwhile."""

    def stop() -> None:
        os.kill(victim.pid, signal.SIGSTOP)
        found = os.waitid(os.P_PID, victim.pid, os.WSTOPPED)
        assert found is not None and found.si_status == signal.SIGSTOP

    def go_on() -> None:
        os.kill(victim.pid, signal.SIGCONT)
        found = os.waitid(os.P_PID, victim.pid, os.WCONTINUED)
        assert found is not None and found.si_status == signal.SIGCONT

    def silent() -> bool:
        assert victim.process.stdout is not None
        return not select.select([victim.process.stdout], [], [], 0.2)[0]

    with watching(victim):
        for _ in range(3):
            stop()
            victim.say("private", SIZE)
            assert silent()
            assert (victim.state(victim.pid), victim.state(victim.tid)) == ("T", "t")
            go_on()
            assert victim.mapping(int(victim.answer(), 16))[0]
        stop()
        victim.say("registers")
    wait_for("the stop", lambda: victim.state(victim.tid) == "T")
    assert silent()
    with watching(victim):
        assert silent()
        go_on()
        assert victim.answer() == "0"
        stop()
        victim.say("registers")
        assert silent()
        os.kill(victim.pid, signal.SIGKILL)
        assert victim.process.wait() == -signal.SIGKILL


def test_a_thread_in_a_long_call_is_let_go_at_once(victim: Victim) -> None:
    victim.say("sleep", 2000)
    time.sleep(0.1)
    with watching(victim):
        time.sleep(0.1)
        before = time.monotonic()
    assert time.monotonic() - before < 0.5
    assert victim.tracer() == 0
    result, milliseconds = victim.answer().split()
    assert result == "0" and 2000 <= int(milliseconds) < 2500


def test_seccomp_of_the_program_does_not_judge(victim: Victim) -> None:
    """This filter kills for madvise(2)."""
    assert victim.ask("seccomp") == "denied"
    with watching(victim):
        assert victim.mapping(victim.map("private"))[0]
        assert victim.ask("registers") == "0"
    assert victim.process.poll() is None


@pytest.mark.parametrize("word", ["exec", "exec-main"])
def test_another_program(victim: Victim, word: str) -> None:
    """Whichever thread runs it, it is not in the way and not traced."""
    with watching(victim):
        victim.say(word)
        wait_for("cat", lambda: Path(f"/proc/{victim.pid}/comm").read_text() == "cat\n")
        assert victim.ask("hello") == "hello 1"
        victim.tid = victim.pid
        wait_for("its end of tracing", lambda: victim.tracer() == 0)


def test_threads_that_end(victims: Callable[[], Victim]) -> None:
    one, other = victims(), victims()
    with watching(one, other):
        assert one.ask("exit") == "over"
        wait_for("the end", lambda: not Path(f"/proc/{one.pid}/task/{one.tid}").exists())
        assert one.process.poll() is None
        one.process.kill()
        assert one.process.wait() == -signal.SIGKILL
        other.process.kill()
        assert other.process.wait() == -signal.SIGKILL


def test_nobody_to_watch(victims: Callable[[], Victim]) -> None:
    """Gone, of another process, or traced by another: nothing happens."""
    one, other = victims(), victims()
    with advising.HugePages([(one.pid, other.tid), (4000000, 4000000)]) as pages:
        assert pages._helper is None
    with watching(one), watching(one, other):
        assert one.mapping(one.map("private"))[0] and other.mapping(other.map("private"))[0]
    other.process.kill()
    other.process.wait()
    with pytest.raises(ProcessLookupError):
        process.HugePages(4000000, SIZE)


def test_a_rewarm_that_is_killed_takes_the_helper_along(victim: Victim) -> None:
    code = (
        "import sys, time; from rewarm.gpu import advise; advise.on_request = lambda: True\n"
        f"with advise.HugePages([({victim.pid}, {victim.tid})]): print('in', flush=True); time.sleep(100)"
    )
    with subprocess.Popen([sys.executable, "-I", "-c", code], stdout=subprocess.PIPE, text=True) as rewarm:
        assert rewarm.stdout is not None and rewarm.stdout.readline() == "in\n"
        assert victim.tracer() != 0
        rewarm.kill()
    wait_for("the end of tracing", lambda: victim.tracer() == 0)
    assert victim.ask("registers") == "0"


def test_thread_numbers_of_a_pid_namespace(program: Path, victim: Victim) -> None:
    assert of_number(victim.pid, victim.tid) == victim.tid
    assert of_number(victim.pid, victim.tid + 1000) is None
    assert of_number(4000000, 1) is None
    words = ["unshare", "--pid", "--fork", "--kill-child", str(program)]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as outer:
        try:
            assert outer.stdout is not None
            number = int(outer.stdout.readline())
            (pid,) = children(outer.pid)
            (tid,) = [tid for tid in processes.threads(pid) if tid != pid]
            assert of_number(pid, number) == of_number(pid, tid) == tid != number
            assert of_number(pid, 1) == pid
        finally:
            outer.kill()


def test_not_where_there_is_no_choice(victim: Victim, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(advising, "on_request", lambda: False)
    with watching(victim) as found:
        assert found._helper is None


@pytest.mark.parametrize(
    ("text", "expected"), [("always [madvise] never\n", True), ("[always] madvise never\n", False), ("", False)]
)
def test_the_nodes_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, expected: bool) -> None:
    monkeypatch.setattr(advising, "_ENABLED", str(tmp_path / "enabled"))
    if text:
        (tmp_path / "enabled").write_text(text)
    assert advising.on_request() == expected
