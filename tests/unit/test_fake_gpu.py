"""The fake CUDA driver and its workload: what tests of GPU containers rely on, without a container."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support import fake_gpu
from support.fake_driver import Driver, Workload
from support.fake_gpu import CHECKPOINTED, FAILED, LOCKED, RUNNING, FakeGpus
from support.proc import children, state_of, wait_for

TESTS = Path(__file__).parents[1]
SECONDS = 20
UNINITIALIZED, GONE, ILLEGAL = 3, 304, 401

Start = Callable[..., Workload]


@pytest.fixture
def gpus(tmp_path: Path) -> FakeGpus:
    return FakeGpus(tmp_path / "fake", fake_gpu.gpus(2))


@pytest.fixture
def driver(gpus: FakeGpus) -> Driver:
    return Driver(gpus.libcuda)


@pytest.fixture
def start(gpus: FakeGpus) -> Iterator[Start]:
    made: list[Workload] = []

    def begin(**environment: str) -> Workload:
        made.append(Workload(gpus, **environment))
        return made[-1]

    yield begin
    for workload in made:
        workload.close()


def frozen(driver: Driver, workload: Workload) -> None:
    """Lock and checkpoint."""
    assert (driver.lock(workload.pid), driver.checkpoint(workload.pid)) == (0, 0)


def probes(workload: Workload, count: int = 3) -> list[Any]:
    return [workload.get("/probe") for _ in range(count)]


# --- the whole way


def test_answers_go_on_after_a_checkpoint(gpus: FakeGpus, driver: Driver, start: Start) -> None:
    undisturbed, workload = start(), start()
    expected = probes(undisturbed, 6)
    assert probes(workload) == expected[:3]
    assert driver.state(workload.pid) == RUNNING
    assert driver.lock(workload.pid) == 0
    assert driver.state(workload.pid) == LOCKED
    assert driver.checkpoint(workload.pid) == 0
    assert driver.state(workload.pid) == CHECKPOINTED
    assert len(gpus.memories(fake_gpu.uuid(0))) == 1  # the other's
    assert driver.restore(workload.pid) == 0
    assert driver.state(workload.pid) == LOCKED
    assert driver.unlock(workload.pid) == 0
    assert probes(workload) == expected[3:]
    assert len({answer["answers"][0] for answer in expected}) == 6
    names = [call.name for call in gpus.log() if call.pid == workload.pid]
    assert names == ["state", "lock", "state", "checkpoint", "state", "restore", "state", "unlock"]


def test_memory_that_a_dump_loses_is_noticed(driver: Driver, start: Start) -> None:
    undisturbed, workload = start(), start()
    frozen(driver, workload)
    with open(f"/proc/{workload.pid}/mem", "r+b", buffering=0) as memory:
        memory.seek(0x7CA000000000 + 16)
        memory.seek(int.from_bytes(memory.read(8), "little"))
        memory.write(bytes(4096))
    assert (driver.restore(workload.pid), driver.unlock(workload.pid)) == (0, 0)
    assert probes(workload) != probes(undisturbed)


def test_an_unlocked_process_goes_on(driver: Driver, start: Start) -> None:
    workload = start()
    assert (driver.lock(workload.pid), driver.unlock(workload.pid)) == (0, 0)
    assert workload.get("/probe")["step"] == 1


def test_calls_wait_while_the_process_is_locked(driver: Driver, start: Start) -> None:
    workload = start(CHILDREN="1")
    (child,) = children(workload.pid)
    assert driver.lock(child) == 0
    answers: list[Any] = []
    waiting = threading.Thread(target=lambda: answers.append(workload.get("/probe")))
    waiting.start()
    time.sleep(0.2)
    assert answers == []
    assert [one["state"] for one in workload.get("/where")] == [RUNNING, LOCKED]
    assert driver.unlock(child) == 0
    waiting.join(SECONDS)
    assert answers[0]["step"] == 1


def test_a_lock_waits_for_calls_in_flight(driver: Driver, start: Start) -> None:
    """Under load, nothing that the process was in the middle of is lost."""
    workload, undisturbed = start(), start()
    answers: list[Any] = []
    load = threading.Thread(target=lambda: answers.extend(probes(workload, 100)))
    load.start()
    while load.is_alive():
        frozen(driver, workload)
        assert (driver.restore(workload.pid), driver.unlock(workload.pid)) == (0, 0)
        time.sleep(0.01)
    assert answers == probes(undisturbed, 100)


# --- GPUs


def test_a_map_moves_the_process(gpus: FakeGpus, driver: Driver, start: Start) -> None:
    workload, undisturbed = start(CHILDREN="1", GPUS=f"{fake_gpu.uuid(0)},{fake_gpu.uuid(1)}"), start(CHILDREN="1")
    pids = [workload.pid, *children(workload.pid)]
    swap = [(fake_gpu.uuid(0), fake_gpu.uuid(1)), (fake_gpu.uuid(1), fake_gpu.uuid(0))]
    for pid in pids:
        assert (driver.lock(pid), driver.checkpoint(pid)) == (0, 0)
    for pid in pids:
        assert (driver.restore(pid, *swap), driver.unlock(pid)) == (0, 0)
    assert [one["gpu"] for one in workload.get("/where")] == [fake_gpu.uuid(1), fake_gpu.uuid(0)]
    assert [one["pid"] for one in workload.get("/where")] == pids
    assert probes(workload) == probes(undisturbed)
    assert [call.map for call in gpus.log("restore")] == [dict(swap)] * 2


@pytest.mark.parametrize("pair", [(7, 1), (0, 7)], ids=["not its own", "not there"])
def test_a_wrong_map(driver: Driver, start: Start, pair: tuple[int, int]) -> None:
    workload = start()
    frozen(driver, workload)
    assert driver.restore(workload.pid, (fake_gpu.uuid(pair[0]), fake_gpu.uuid(pair[1]))) == 101
    assert driver.state(workload.pid) == FAILED
    assert driver.unlock(workload.pid) == ILLEGAL


def test_a_gpu_that_went_away(gpus: FakeGpus, driver: Driver, start: Start) -> None:
    workload = start()
    frozen(driver, workload)
    gpus.node(fake_gpu.gpus(1, first=1))
    assert driver.restore(workload.pid) == 101


def test_too_little_memory_cannot_be_undone(gpus: FakeGpus, driver: Driver, start: Start) -> None:
    workload = start()
    frozen(driver, workload)
    gpus.node([fake_gpu.gpus(1)[0]._replace(free=1000)])
    assert driver.restore(workload.pid) == 2
    assert driver.state(workload.pid) == FAILED


def test_device_nodes_may_be_asked_for(gpus: FakeGpus, driver: Driver, start: Start) -> None:
    assert not Path("/dev/nvidia0").exists()
    workload = start()
    frozen(driver, workload)
    gpus.script("nodes")
    assert driver.restore(workload.pid) == 100
    assert driver.state(workload.pid) == FAILED


# --- refusals


def test_processes_without_cuda(driver: Driver) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    for pid, expected in ((os.getpid(), UNINITIALIZED), (ended.pid, GONE)):
        for name in ("GetState", "GetRestoreThreadId", "Lock", "Checkpoint", "Restore", "Unlock"):
            assert driver.call(name, pid, bytes(64)) == expected, name


def test_only_in_order(driver: Driver, start: Start) -> None:
    pid = start().pid
    assert (driver.checkpoint(pid), driver.restore(pid), driver.unlock(pid)) == (ILLEGAL,) * 3
    assert driver.lock(pid) == 0
    assert (driver.lock(pid), driver.restore(pid)) == (ILLEGAL,) * 2
    assert driver.checkpoint(pid) == 0
    assert (driver.lock(pid), driver.checkpoint(pid), driver.unlock(pid)) == (ILLEGAL,) * 3
    assert driver.state(pid) == CHECKPOINTED


def test_managed_memory(driver: Driver, start: Start, tmp_path: Path) -> None:
    workload = start(MANAGED="1", UVM=str(tmp_path / "nvidia-uvm"))
    mapped = [line for line in Path(f"/proc/{workload.pid}/maps").read_text().splitlines() if "nvidia-uvm" in line]
    low, high = (int(word, 16) for word in mapped[0].split()[0].split("-"))
    assert high - low == 4 << 20
    assert (driver.lock(workload.pid), driver.checkpoint(workload.pid)) == (0, 801)
    assert driver.state(workload.pid) == LOCKED
    assert driver.unlock(workload.pid) == 0
    assert workload.get("/probe")["step"] == 1


def test_mps(driver: Driver, start: Start) -> None:
    workload = start(MPS="1")
    assert driver.lock(workload.pid) == 801
    assert driver.state(workload.pid) == RUNNING


def test_busy(driver: Driver, start: Start) -> None:
    workload = start(BUSY="1")
    began = time.monotonic()
    assert driver.lock(workload.pid, 300) == 600
    assert 0.3 <= time.monotonic() - began < 3
    assert driver.state(workload.pid) == RUNNING
    assert workload.get("/probe")["step"] == 1


def test_a_stopped_process_cannot_be_worked_on(gpus: FakeGpus, driver: Driver, start: Start) -> None:
    workload = start()
    gpus.script("patience 200")

    def stopped(call: Callable[[int], int]) -> int:
        os.kill(workload.pid, signal.SIGSTOP)
        wait_for("the stop", lambda: state_of(workload.pid) == "T")
        result = call(workload.pid)
        os.kill(workload.pid, signal.SIGCONT)
        return result

    assert stopped(driver.lock) == 0
    assert stopped(driver.checkpoint) == 999
    assert driver.state(workload.pid) == LOCKED
    assert driver.checkpoint(workload.pid) == 0
    assert stopped(driver.restore) == 999
    assert driver.state(workload.pid) == CHECKPOINTED
    assert (driver.restore(workload.pid), driver.unlock(workload.pid)) == (0, 0)
    assert workload.get("/probe")["step"] == 1


def test_the_restore_thread(driver: Driver, start: Start) -> None:
    workload = start()
    thread = driver.thread(workload.pid)
    assert thread != workload.pid
    assert Path(f"/proc/{workload.pid}/task/{thread}").is_dir()


def test_the_restore_thread_from_outside_a_pid_namespace(gpus: FakeGpus, driver: Driver) -> None:
    """The process knows its thread by another number than its caller does."""
    inside = (
        "import time; from support.workloads import gpu_fake; gpu_fake.context(0); "
        "print('ready', flush=True); time.sleep(1000)"
    )
    outer = subprocess.Popen(
        ["unshare", "--pid", "--fork", "--kill-child", sys.executable, "-c", inside],
        env={**os.environ, **gpus.environment(), "PYTHONPATH": str(TESTS), "DEVICE_MIB": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert outer.stdout is not None and outer.stdout.readline() == "ready\n"
        (pid,) = children(outer.pid)
        assert Path(f"/proc/{pid}/task/{driver.thread(pid)}").is_dir()
        assert (driver.lock(pid), driver.checkpoint(pid), driver.restore(pid), driver.unlock(pid)) == (0,) * 4
    finally:
        outer.kill()
        outer.communicate()


# --- the script


def test_the_second_of_a_kind_fails(gpus: FakeGpus, driver: Driver, start: Start) -> None:
    one, other = start(), start()
    gpus.script("checkpoint 2 999", "lock * sleep 100")
    assert (driver.lock(one.pid), driver.lock(other.pid)) == (0, 0)
    assert (driver.checkpoint(one.pid), driver.checkpoint(other.pid)) == (0, 999)
    assert (driver.state(one.pid), driver.state(other.pid)) == (CHECKPOINTED, LOCKED)
    assert driver.unlock(other.pid) == 0
    assert all(call.ended - call.began >= 100_000_000 for call in gpus.log("lock"))


def test_every_one_fails(gpus: FakeGpus, driver: Driver, start: Start) -> None:
    pid = start().pid
    gpus.script("lock * 600", "unlock 1 sleep 50", "unlock 1 46")
    assert [driver.lock(pid) for _ in range(3)] == [600] * 3
    assert (driver.state(pid), driver.unlock(pid), driver.unlock(pid)) == (RUNNING, 46, ILLEGAL)
    assert [call.result for call in gpus.log("lock", "unlock")] == [600, 600, 600, 46, ILLEGAL]


def test_scripted_lack_of_memory(gpus: FakeGpus, driver: Driver, start: Start) -> None:
    workload = start()
    frozen(driver, workload)
    gpus.script("restore 1 2")
    assert driver.restore(workload.pid) == 2
    assert driver.state(workload.pid) == FAILED


def test_the_process_dies_under_a_call(gpus: FakeGpus, driver: Driver, start: Start) -> None:
    workload = start()
    gpus.script("checkpoint 1 kill-target")
    assert (driver.lock(workload.pid), driver.checkpoint(workload.pid)) == (0, GONE)


CALLER = "import ctypes, sys; sys.exit(ctypes.CDLL(sys.argv[1]).cuCheckpointProcessLock(int(sys.argv[2]), bytes(64)))"


def test_the_caller_dies_and_calls_are_counted_over_all_callers(gpus: FakeGpus, driver: Driver, start: Start) -> None:
    """Without a word in the environment, as a runtime may be called: the library knows its directory."""
    pid = start().pid
    gpus.script("lock 2 kill-caller", "lock 3 46")
    words = [sys.executable, "-c", CALLER, str(gpus.libcuda), str(pid)]
    ends = [subprocess.run(words, env={}, timeout=SECONDS).returncode for _ in range(3)]
    assert ends == [0, -signal.SIGKILL, 46]
    assert len({call.caller for call in gpus.log("lock")}) == 2


def test_calls_of_threads_are_side_by_side_in_the_log(gpus: FakeGpus, driver: Driver, start: Start) -> None:
    workload = start(CHILDREN="3")
    pids = [workload.pid, *children(workload.pid)]
    gpus.script("lock * sleep 200")
    threads = [threading.Thread(target=driver.lock, args=(pid,)) for pid in pids]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    calls = gpus.log("lock")
    assert sorted(call.pid for call in calls) == sorted(pids)
    assert all(one.overlaps(other) for one in calls for other in calls)


# --- the libraries


def test_errors_have_names(driver: Driver) -> None:
    assert driver.name(801) == b"CUDA_ERROR_NOT_SUPPORTED"
    assert driver.name(12345) is None


def test_versions(gpus: FakeGpus, driver: Driver) -> None:
    version = ctypes.c_int()
    gpus.node([], cuda=13040)
    assert (driver.library.cuDriverGetVersion(ctypes.byref(version)), version.value) == (0, 13040)
    old = ctypes.CDLL(str(gpus.too_old))
    assert (old.cuDriverGetVersion(ctypes.byref(version)), version.value) == (0, 12020)
    assert not hasattr(old, "cuCheckpointProcessLock")
    with pytest.raises(OSError):
        ctypes.CDLL(str(gpus.foreign))
