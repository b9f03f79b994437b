"""Of a stopped process a few threads run, and nothing else, whatever becomes of who arranged that."""

from __future__ import annotations

import mmap
import os
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from rewarm import processes
from rewarm.errors import GpuError
from rewarm.gpu.awake import Awake, go_on, stop
from rewarm_native import rouse
from rewarm_native.cuda import Driver
from support.fake_gpu import FakeGpus
from support.proc import wait_for

TESTS = Path(__file__).parents[1]
LIMIT = 10.0
STILL = 0.15
"""Seconds in which a thread that runs counts something for sure."""
NAMES = ("python3", "worker", "cuda-EvtHandlr", "rewarm-mem-70", "cuda00001800007")
ALLOWED = {"cuda-EvtHandlr", "rewarm-mem-70", "cuda00001800007"}


class Counting:
    """A process whose threads count (support/counting.py). `names` are those of its threads, the first its own."""

    def __init__(self, names: Sequence[str] = NAMES) -> None:
        self.names = names
        self._file = tempfile.NamedTemporaryFile(dir="/dev/shm")  # noqa: SIM115
        self._file.truncate(mmap.PAGESIZE)
        self._counts = mmap.mmap(self._file.fileno(), mmap.PAGESIZE)
        words = [sys.executable, "-m", "support.counting", self._file.name, *names]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True, cwd=TESTS)
        self.pid = self.process.pid
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"
        wait_for("threads that count", lambda: self.counting() == set(names))

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        self._file.close()

    def count(self, at: int) -> int:
        return int(struct.unpack_from("<Q", self._counts, 8 * at)[0])

    @property
    def signals(self) -> int:
        return self.count(len(self.names))

    @property
    def born(self) -> int:
        return self.count(len(self.names) + 1)

    def counting(self) -> set[str]:
        return {self.names[at] for at in self.places_counting()}

    def places_counting(self) -> set[int]:
        before = [self.count(at) for at in range(len(self.names))]
        time.sleep(STILL)
        return {at for at in range(len(self.names)) if self.count(at) != before[at]}

    def spawn(self, at: int) -> None:
        """Wakes a Python thread for it, which has to run."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"spawn {at}\n")
        self.process.stdin.flush()

    def masks(self) -> set[str]:
        found = set()
        for tid in processes.threads(self.pid):
            lines = Path(f"/proc/{self.pid}/task/{tid}/status").read_text().splitlines()
            found |= {line for line in lines if line.startswith("SigBlk")}
        return found

    def blocked(self) -> dict[str, int]:
        """The signals that its threads block, by their names."""
        found = {}
        for tid in processes.threads(self.pid):
            task = Path(f"/proc/{self.pid}/task/{tid}")
            (line,) = (one for one in (task / "status").read_text().splitlines() if one.startswith("SigBlk"))
            found[(task / "comm").read_text().strip()] = int(line.split()[1], 16)
        return found

    def states(self) -> set[str]:
        tids = processes.threads(self.pid)
        return {found.state for tid in tids if (found := processes.stat(self.pid, tid)) is not None}


@pytest.fixture
def counting() -> Iterator[Counting]:
    found = Counting()
    yield found
    found.close()


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Driver:
    """One that knows of no process."""
    return Driver(str(FakeGpus(tmp_path_factory.mktemp("gpus")).libcuda))


def test_stopped_processes_count_nothing_until_they_go_on(counting: Counting) -> None:
    stop([counting.pid], LIMIT)
    assert counting.states() == {"T"}
    assert counting.counting() == set()
    go_on([counting.pid])
    assert counting.counting() == set(NAMES)


def test_only_the_drivers_and_the_librarys_threads_run(counting: Counting, driver: Driver) -> None:
    # Python's lock: who is stopped while it has that would hold up the others, as no thread of a driver is.
    for _ in range(5):
        stop([counting.pid], LIMIT)
        with Awake(driver, [counting.pid]):
            assert counting.counting() <= ALLOWED
        assert counting.counting() == set()
        assert counting.states() == {"T"}
        go_on([counting.pid])
        assert counting.counting() == set(NAMES)
    assert counting.masks() == {"SigBlk:\t0000000000000000"}


def test_a_signal_waits_until_the_program_runs(counting: Counting, driver: Driver) -> None:
    stop([counting.pid], LIMIT)
    with Awake(driver, [counting.pid]):
        os.kill(counting.pid, signal.SIGUSR1)
        time.sleep(STILL)
        assert counting.signals == 0
    go_on([counting.pid])
    wait_for("the signal", lambda: counting.signals == 1)


def test_whoever_made_it_run_may_be_killed(counting: Counting, driver: Driver) -> None:
    killed_inside(counting.pid, driver)
    wait_for("a process of which nothing runs", lambda: counting.states() == {"T"})
    assert counting.counting() == set()
    go_on([counting.pid])
    assert counting.counting() == set(NAMES)


EVERY_SIGNAL = (1 << 64) - 1 & ~(1 << signal.SIGKILL - 1) & ~(1 << signal.SIGSTOP - 1)


def killed_inside(pid: int, driver: Driver) -> None:
    """Stop a process, and have whoever makes threads of it run be killed meanwhile."""
    stop([pid], LIMIT)
    child = os.fork()
    if child == 0:
        try:
            with Awake(driver, [pid]):
                os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    os.waitpid(child, 0)


def test_the_masks_that_a_killed_one_left_are_undone_by_the_next(counting: Counting, driver: Driver) -> None:
    """But for the library's own thread, which blocks every signal anyway."""
    for _ in range(2):
        killed_inside(counting.pid, driver)
        wait_for("a process of which nothing runs", lambda: counting.states() == {"T"})
        left = counting.blocked()
        assert {name for name, mask in left.items() if mask == EVERY_SIGNAL} == ALLOWED
        assert {mask for name, mask in left.items() if name not in ALLOWED} == {0}
    stop([counting.pid], LIMIT)
    with Awake(driver, [counting.pid]):
        assert counting.counting() <= ALLOWED
    assert {name for name, mask in counting.blocked().items() if mask} == {"rewarm-mem-70"}
    assert counting.states() == {"T"}
    go_on([counting.pid])
    assert counting.counting() == set(NAMES)
    os.kill(counting.pid, signal.SIGUSR1)
    wait_for("the signal", lambda: counting.signals == 1)


def test_a_mask_that_a_thread_has_made_itself_stays(driver: Driver) -> None:
    """Of a program whose threads happen to be named as the driver's."""
    words = "import ctypes,signal,threading,time;signal.pthread_sigmask(signal.SIG_BLOCK,[signal.SIGUSR2]);"
    words += "threading.Thread(target=lambda:(ctypes.CDLL(None).prctl(15,b'cuda-x',0,0,0),print('x',flush=True),"
    words += "time.sleep(99))).start()"
    with subprocess.Popen([sys.executable, "-c", words], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == b"x\n"
            mask = 1 << signal.SIGUSR2 - 1
            own = f"SigBlk:\t{mask:016x}"
            for _ in range(2):
                stop([process.pid], LIMIT)
                with Awake(driver, [process.pid]):
                    pass
                for tid in processes.threads(process.pid):
                    assert own in Path(f"/proc/{process.pid}/task/{tid}/status").read_text().splitlines()
                go_on([process.pid])
        finally:
            process.kill()


def test_a_program_whose_threads_have_a_name_like_the_drivers_is_held(driver: Driver) -> None:
    """cuda_server is its executable: its threads, main thread and all, are called so."""
    held = Counting(("cuda_server", "cuda_server", "cuda_server", "rewarm-mem-70"))
    try:
        for _ in range(5):
            stop([held.pid], LIMIT)
            with Awake(driver, [held.pid]):
                assert held.places_counting() <= {3}
            assert held.places_counting() == set() and held.states() == {"T"}
            go_on([held.pid])
            assert held.places_counting() == {0, 1, 2, 3}
        assert held.blocked().keys() >= {"cuda_server", "rewarm-mem-70"}
    finally:
        held.close()


def test_a_program_that_has_such_threads_alone_is_held_and_named(driver: Driver) -> None:
    held = Counting(("cuda_server", "cuda_server"))
    try:
        stop([held.pid], LIMIT)
        with pytest.raises(GpuError, match=f"process {held.pid} .*: it has no thread of the driver"):
            Awake(driver, [held.pid]).__enter__()
        assert held.places_counting() == set() and held.states() == {"T"}
        go_on([held.pid])
        assert held.places_counting() == {0, 1}
    finally:
        held.close()


def test_a_process_that_ends_meanwhile_is_no_failure(counting: Counting, driver: Driver) -> None:
    stop([counting.pid], LIMIT)
    with Awake(driver, [counting.pid]):
        counting.process.kill()
        counting.process.wait()


def test_continued_by_another_it_runs_and_is_let_go(counting: Counting, driver: Driver) -> None:
    stop([counting.pid], LIMIT)
    with Awake(driver, [counting.pid]):
        go_on([counting.pid])
    assert counting.counting() == set(NAMES)


def test_a_process_without_such_threads_is_named(driver: Driver) -> None:
    with subprocess.Popen(["sleep", "100"]) as process:
        stop([process.pid], LIMIT)
        with pytest.raises(GpuError, match=f"process {process.pid} .sleep.: it has no thread of the driver"):
            Awake(driver, [process.pid]).__enter__()
        process.kill()


def test_traced_by_another_it_is_left_alone(counting: Counting, driver: Driver) -> None:
    stop([counting.pid], LIMIT)
    done: list[int] = []
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        for tid in processes.threads(counting.pid)[2:3]:
            rouse.rouse(tid)
        os.write(write, b"x")
        time.sleep(60)
        os._exit(0)
    try:
        os.read(read, 1)
        with pytest.raises(GpuError, match="no debugger may be attached"):
            Awake(driver, [counting.pid]).__enter__()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        done.append(child)
    wait_for("a process of which nothing runs", lambda: counting.states() == {"T"})


def test_the_signal_is_sent_again(counting: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first is taken by a thread that a debugger traces, and stays with that."""
    sent: list[int] = []
    real: Callable[[int, int], bool] = processes.send

    def send(pid: int, number: int) -> bool:
        sent.append(number)
        return len(sent) == 1 or real(pid, number)

    monkeypatch.setattr(processes, "send", send)
    stop([counting.pid], LIMIT)
    assert len(sent) >= 2 and set(sent) == {signal.SIGSTOP} and counting.states() == {"T"}


def test_what_does_not_stop_is_named(counting: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    # A process that is continued again and again never stands still for long enough to be looked at.
    sent: list[int] = []
    real: Callable[[int, int], bool] = processes.send

    def send(pid: int, number: int) -> bool:
        sent.append(number)
        return real(pid, number) and real(pid, signal.SIGCONT)

    monkeypatch.setattr(processes, "send", send)
    with pytest.raises(GpuError, match=r"has not stopped within 0\.2 s"):
        stop([counting.pid], 0.2)
    assert set(sent) == {signal.SIGSTOP}
