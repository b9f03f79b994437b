"""Parking: real processes are held still by ptrace, and must not notice; whatever happens, they go on."""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import random
import select
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from rewarm import processes
from rewarm.errors import GpuError
from rewarm.gpu.parking import Parking
from rewarm_native import parking
from support.proc import wait_for

SUPPORT = Path(__file__).parents[1] / "support"
LIMIT = 10.0
STILL = 0.1
"""Seconds in which a thread that runs counts something for sure, and one that does not run counts nothing."""


class Busy:
    """A process whose threads count (busy.c)."""

    def __init__(self, program: Path, *words: str, command: tuple[str, ...] = ()) -> None:
        self.words = words
        # In memory: threads that write to a file's mapping stand in D while it is written to the disk.
        self._file = tempfile.NamedTemporaryFile(dir="/dev/shm")  # noqa: SIM115
        self._file.truncate(mmap.PAGESIZE)
        self._counts = mmap.mmap(self._file.fileno(), mmap.PAGESIZE)
        pipe = subprocess.PIPE
        call = [*command, str(program), self._file.name, *words]
        self.process = subprocess.Popen(call, stdin=pipe, stdout=pipe, bufsize=0)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"ready\n"
        self.pid = self.process.pid
        wait_for(
            "threads that count", lambda: all(self.count(word) for word in self.words if self.counts_by_itself(word))
        )

    @staticmethod
    def counts_by_itself(word: str) -> bool:
        return word not in ("sleep", "pipe")

    def close(self) -> None:
        for pid in processes.children(self.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.kill()
        self.process.communicate()
        self._file.close()

    def count(self, word: str) -> int:
        return int(struct.unpack_from("<Q", self._counts, 8 * self.words.index(word))[0])

    @property
    def signals(self) -> int:
        return int(struct.unpack_from("<Q", self._counts, 8 * len(self.words))[0])

    def counting(self) -> set[str]:
        """Which of the words count now."""
        before = {word: self.count(word) for word in self.words}
        time.sleep(STILL)
        return {word for word, count in before.items() if self.count(word) != count}

    def runs_only(self, *words: str) -> None:
        """These count, all others do not."""
        before = {word: self.count(word) for word in self.words}
        wait_for(f"{words} to count", lambda: all(self.count(word) != before[word] for word in words))
        time.sleep(STILL)
        assert {word for word, count in before.items() if self.count(word) != count} == set(words)

    def goes_on(self) -> None:
        expected = {word for word in self.words if self.counts_by_itself(word)}
        wait_for("all threads to count", lambda: self.counting() == expected)
        assert {processes.tracer(self.pid, tid) for tid in processes.threads(self.pid)} == {0}

    def echo(self) -> bytes:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(b"x")
        if not select.select([self.process.stdout], [], [], 20)[0]:
            return b""
        return self.process.stdout.read(1)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("parking") / "busy"
    flags = ["-O1", "-Wall", "-Wextra", "-Werror", "-pthread"]
    subprocess.run(["cc", *flags, "-o", str(path), str(SUPPORT / "busy.c")], check=True)
    return path


@pytest.fixture
def busy(program: Path) -> Iterator[Callable[..., Busy]]:
    made: list[Busy] = []

    def make(*words: str, command: tuple[str, ...] = ()) -> Busy:
        made.append(Busy(program, *words, command=command))
        return made[-1]

    yield make
    for one in made:
        one.close()


def of_driver(pid: int, tid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/task/{tid}/comm").read_text() == "cuda-EvtHandlr\n"
    except (FileNotFoundError, ProcessLookupError):
        return False


def sleeper(one: Busy) -> int:
    """Its thread in uninterruptible sleep."""
    found = {tid: processes.stat(one.pid, tid) for tid in processes.threads(one.pid)}
    [tid] = [tid for tid, stat in found.items() if stat is not None and stat.state == "D"]
    return tid


def arrived(one: Busy, signals: int) -> bool:
    return one.signals == signals


def parked(*pids: int, limit: float = LIMIT) -> Parking:
    return Parking(lambda: pids, of_driver, limit)


def test_all_but_the_drivers(busy: Callable[..., Busy]) -> None:
    one = busy("work", "driver", "sleep", "pipe")
    with parked(one.pid) as parking:
        assert parking.count == 4  # the first thread, which waits for signals, among them
        one.runs_only("driver")
    one.goes_on()
    assert one.count("sleep") == 0  # its hour was not cut short
    assert one.echo() == b"x"


def test_again_and_again(busy: Callable[..., Busy]) -> None:
    one = busy("work", "driver", "sleep", "pipe")
    for _ in range(50):
        with parked(one.pid):
            pass
        assert one.echo() == b"x"
    one.goes_on()
    assert one.count("sleep") == 0


def test_threads_that_are_born_meanwhile(busy: Callable[..., Busy]) -> None:
    one = busy("spawn", "spawn", "driver")
    for _ in range(10):
        with parked(one.pid):
            one.runs_only("driver")
    one.goes_on()


def test_several_processes_and_a_pid_namespace_below(busy: Callable[..., Busy]) -> None:
    first, second = busy("work", "driver"), busy("work", command=("unshare", "--pid", "--fork"))
    [below] = processes.children(second.pid)
    assert processes.namespace_pid(below) == 1
    with parked(first.pid, second.pid, below):
        first.runs_only("driver")
        second.runs_only()
    first.goes_on()
    second.runs_only("work")


def test_processes_that_are_forked_meanwhile(busy: Callable[..., Busy]) -> None:
    """The list is asked for again until nobody runs who could make it longer."""
    first, second = busy("work"), busy("work")
    asked: list[int] = []

    def pids() -> list[int]:
        asked.append(0)
        return [first.pid] if len(asked) == 1 else [first.pid, second.pid]

    with Parking(pids, of_driver, LIMIT):
        first.runs_only()
        second.runs_only()


def test_a_stopped_tree_goes_on_only_in_the_drivers_threads(busy: Callable[..., Busy]) -> None:
    """As after CRIU: SIGSTOP, then SIGCONT, while all but the driver's are held."""
    one = busy("work", "driver")
    os.kill(one.pid, signal.SIGSTOP)
    wait_for("a stop", lambda: processes.running(one.pid) == "")
    with parked(one.pid):
        one.runs_only()
        os.kill(one.pid, signal.SIGCONT)
        one.runs_only("driver")
    one.goes_on()


def test_a_stop_that_lasts(busy: Callable[..., Busy]) -> None:
    """Who was stopped before, or meanwhile, is so afterwards."""
    one = busy("work", "driver")
    os.kill(one.pid, signal.SIGSTOP)
    wait_for("a stop", lambda: processes.running(one.pid) == "")
    with parked(one.pid):
        pass
    one.runs_only()
    os.kill(one.pid, signal.SIGCONT)
    one.goes_on()
    with parked(one.pid):
        os.kill(one.pid, signal.SIGSTOP)
        wait_for("the driver's thread to stop", lambda: one.counting() == set())
    one.runs_only()
    os.kill(one.pid, signal.SIGCONT)
    one.goes_on()


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_no_signal_is_lost(busy: Callable[..., Busy], when: str) -> None:
    one = busy("work", "work", "work")
    for turn in range(40):
        if when == "before":
            os.kill(one.pid, signal.SIGUSR1)
        with parked(one.pid):
            seen = one.signals
            if when == "meanwhile":
                os.kill(one.pid, signal.SIGUSR1)
            time.sleep(0.002)
            assert one.signals == seen  # no handler runs
        wait_for("the signal", partial(arrived, one, turn + 1))


def test_killed_meanwhile(busy: Callable[..., Busy]) -> None:
    one = busy("work", "driver", "sleep")
    with parked(one.pid) as parking:
        assert parking.count == 3
        os.kill(one.pid, signal.SIGKILL)
    assert one.process.wait(20) == -signal.SIGKILL


def test_a_thread_in_uninterruptible_sleep(busy: Callable[..., Busy]) -> None:
    one = busy("vfork", "work", "driver")
    [stuck] = [
        tid for tid in processes.threads(one.pid) if (found := processes.stat(one.pid, tid)) and found.state == "D"
    ]
    began = time.monotonic()
    with pytest.raises(GpuError) as caught, parked(one.pid, limit=0.3):
        raise AssertionError("it is held")
    assert 0.3 <= time.monotonic() - began < 5
    text = str(caught.value)
    assert f"thread {stuck} of process {one.pid} (busy)" in text and "state D" in text and "all go on" in text
    one.goes_on()


def test_programs_that_are_started_anew(busy: Callable[..., Busy]) -> None:
    """execve(2) ends all threads but one, held ones as well, and gives that another number."""
    one = busy("exec", "work", "driver")
    for _ in range(50):
        with parked(one.pid):
            times = one.count("exec")
            tids = processes.threads(one.pid)
            assert [tid for tid in tids if not processes.tracer(one.pid, tid) and not of_driver(one.pid, tid)] == []
            time.sleep(0.01)
            assert one.count("exec") == times and processes.threads(one.pid) == tids
        time.sleep(random.random() * 0.004)
    one.goes_on()


def test_a_parent_in_vfork(busy: Callable[..., Busy]) -> None:
    """It waits for a child that is held: it runs no code either, and does not have to be waited for."""
    one = busy("vfork", "work", "driver")
    [child] = processes.children(one.pid)
    began = time.monotonic()
    with parked(one.pid, child):
        one.runs_only("driver")
    assert time.monotonic() - began < LIMIT
    one.goes_on()


def test_somebody_who_starts_processes_for_ever(busy: Callable[..., Busy]) -> None:
    """Of a thread that may run, or from outside: they have ended when they are looked at, and may have made others."""
    one = busy("work", "driver")
    others = itertools.count(1)
    began = time.monotonic()
    with (
        pytest.raises(GpuError) as caught,
        Parking(lambda: [one.pid, 2**22 - next(others)], of_driver, 0.3),
    ):
        raise AssertionError("it is held")
    assert time.monotonic() - began < LIMIT
    assert "new threads or processes for 0.3 s; all go on" in str(caught.value)
    one.goes_on()


def test_interrupted_while_it_begins(busy: Callable[..., Busy]) -> None:
    """A deadline that passes meanwhile lets all go on at once."""
    one = busy("vfork", "work", "driver")

    def passed(number: int, frame: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, passed)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        began = time.monotonic()
        with pytest.raises(TimeoutError), parked(one.pid, limit=60):
            raise AssertionError("it is held")
        assert time.monotonic() - began < 10
    finally:
        signal.signal(signal.SIGALRM, before)
    one.goes_on()


def test_a_first_thread_that_has_ended(program: Path) -> None:
    """It stays as a zombie while others run."""
    code = "import ctypes, threading, time; threading.Thread(target=time.sleep, args=(60,)).start(); "
    code += "print(flush=True); ctypes.CDLL(None).pthread_exit(None)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        wait_for("the end of its first thread", lambda: (found := processes.stat(process.pid)) and found.state == "Z")
        with parked(process.pid) as parking:
            assert parking.count == 1
        process.kill()


def test_a_debugger(busy: Callable[..., Busy]) -> None:
    one = busy("work", "driver")
    tid = processes.threads(one.pid)[1]
    code = f"import time; from rewarm_native import parking; parking.hold({tid}); print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as debugger:
        assert debugger.stdout is not None
        debugger.stdout.readline()
        with pytest.raises(GpuError) as caught, parked(one.pid):
            raise AssertionError("it is held")
        assert f"thread {tid} of process {one.pid}" in str(caught.value)
        assert f"process {debugger.pid} (" in str(caught.value) and "traces it" in str(caught.value)
        others = [processes.tracer(one.pid, other) for other in processes.threads(one.pid) if other != tid]
        assert set(others) == {0}
        debugger.kill()
    one.goes_on()


def test_rewarm_is_killed(busy: Callable[..., Busy]) -> None:
    """At any moment, signals on their way included: the program goes on, with all of them."""
    one = busy("work", "driver", "sleep")
    code = f"""
import time
from rewarm.gpu.parking import Parking
while True:
    with Parking(lambda: [{one.pid}], lambda pid, tid: False, 10.0):
        print(flush=True)
        time.sleep(0.001)
"""
    for turn in range(30):
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as killed:
            assert killed.stdout is not None
            killed.stdout.readline()
            os.kill(one.pid, signal.SIGUSR1)
            time.sleep(random.random() * 0.003)
            killed.kill()
        wait_for("the signal", partial(arrived, one, turn + 1))
    one.goes_on()
    assert one.count("sleep") == 0


def test_nobody_there() -> None:
    with parked(2**22 - 1) as parking:
        assert parking.count == 0


def test_what_cannot_be_let_go(busy: Callable[..., Busy]) -> None:
    """The calls by themselves: for a thread that has not stopped, and for none."""
    one = busy("vfork", "work")
    [stuck] = [
        tid for tid in processes.threads(one.pid) if (found := processes.stat(one.pid, tid)) and found.state == "D"
    ]
    failures: list[OSError] = []

    def work() -> None:
        parking.hold(stuck)
        assert not parking.is_held(stuck)
        for tid in (stuck, 2**22 - 1):
            try:
                parking.let_go(tid)
            except OSError as error:
                failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert [error.args[1] for error in failures] == [
        f"let go thread {stuck}: Device or resource busy",
        f"let go thread {2**22 - 1}: No such process",
    ]
    one.goes_on()
