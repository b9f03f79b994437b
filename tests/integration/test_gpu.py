"""GPU containers with a driver that is not there: which calls are made, in which order, and what if one fails.

The driver is tests/support/fake_cuda.c. What a real one does with a real GPU is tests/gpu.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support import fake_gpu, faults
from support.fake_gpu import CHECKPOINTED, FakeGpu, gpus, uuid
from support.gpu_containers import Place, place
from support.outcomes import said
from support.proc import command_line, descendants, kill, reap, wait_for

CALLS = ("lock", "checkpoint", "restore", "unlock")


@pytest.fixture
def here(nothing_left_behind: None, tmp_path: Path, prefix: Path) -> Iterator[Place]:
    with place(tmp_path, prefix) as found:
        yield found


@pytest.fixture
def source(here: Place) -> Place:
    """A place with a source of two processes that has answered once."""
    here.start("source", here.bundle("source", CHILDREN="1"))
    assert here.ask()["step"] == 1
    here.gpus.clear_log()
    return here


def capture(where: Place, *flags: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return where.node.rewarm("capture", "source", "--name", "model", *flags, check=check)


def calls(where: Place, *names: str) -> list[str]:
    return [one.name for one in where.gpus.log(*(names or CALLS))]


def states(where: Place) -> list[int]:
    return [one["state"] for one in where.ask("/where")]


def says(text: str, *parts: str) -> None:
    assert all(part in text for part in parts), f"{parts} in: {text}"


def pids(where: Place) -> list[int]:
    """Host pids of the source's processes, its init's first."""
    init = where.node.runtime.containers["source"].pid
    assert init is not None
    return [init, *descendants(init)]


def goes_on(where: Place, step: int) -> None:
    """The source answers its next question, on the GPU as before."""
    assert where.ask()["step"] == step
    assert states(where) == [0, 0]


# Capture.


def test_capture_leaves_the_source_running(source: Place) -> None:
    said_ = json.loads(capture(source, "--json").stdout)
    goes_on(source, 2)
    log = source.gpus.log(*CALLS)
    assert [one.name for one in log] == ["lock"] * 2 + ["checkpoint"] * 2 + ["restore"] * 2 + ["unlock"] * 2 or [
        one.name for one in log
    ] == ["lock"] * 2 + ["checkpoint"] * 2 + ["restore", "unlock"] * 2, log
    locks, checkpoints = source.gpus.log("lock"), source.gpus.log("checkpoint")
    assert max(one.ended for one in locks) < min(one.began for one in checkpoints), "one was not locked yet"
    assert {one.pid for one in locks} == {one.pid for one in checkpoints}
    assert all(one.result == 0 for one in log)
    assert all(one.map == {} for one in source.gpus.log("restore"))
    document = source.node.json("inspect", "model")
    assert document["requires"]["driver"] == "580.159.04"
    assert [gpu["uuid"] for gpu in document["requires"]["gpus"]] == [uuid(0)]
    assert document["cuda"]["processes"] and document["cuda"]["processes"][0] == 1
    assert said_["paused_seconds"] > 0
    shown = source.node.rewarm("inspect", "model").stdout
    says(shown, fake_gpu.H100, uuid(0), "/dev/nvidia0", "580.159.04", "device memory", "2 processes")


def test_processes_are_checkpointed_at_once(source: Place) -> None:
    source.gpus.script("checkpoint * sleep 500", "restore * sleep 500")
    capture(source)
    for name in ("checkpoint", "restore"):
        one, other = source.gpus.log(name)
        assert one.overlaps(other), name


def test_capture_and_stop(source: Place) -> None:
    """What is killed needs no device memory any more."""
    capture(source, "--stop")
    assert calls(source) == ["lock"] * 2 + ["checkpoint"] * 2
    assert source.node.runtime.state("source")["status"] == "stopped"


@pytest.mark.parametrize(
    ("script", "expected", "operation"),
    [
        ("lock 2 999", "CUDA_ERROR_UNKNOWN", "lock CUDA in process"),
        ("checkpoint 2 999", "CUDA_ERROR_UNKNOWN", "checkpoint GPU memory of process"),
        ("checkpoint * 801", "CUDA_ERROR_NOT_SUPPORTED", "checkpoint GPU memory of process"),
        ("lock * 600", "its GPU was still busy after 2 s; it runs on", "lock CUDA in process"),
    ],
)
def test_one_that_fails(source: Place, script: str, expected: str, operation: str) -> None:
    """All others are given back what they had, and nothing is left of the capture."""
    source.gpus.script(script)
    done = capture(source, check=False)
    assert done.returncode == 1
    said(done.stderr.strip().splitlines()[-1], operation, expected, "python3")
    goes_on(source, 2)
    assert source.node.json("ls") == []
    source.gpus.script()
    capture(source)
    goes_on(source, 3)


def test_dump_fails(source: Place) -> None:
    """After the checkpoint: the device memory is given back."""
    source.node.configure(
        libcuda=str(source.gpus.libcuda),
        gpu_lock_timeout=2,
        criu=str(faults.criu(source.node, 'case "$*" in *swrk*|*dump*) exit 1;; esac\nexec $REAL "$@"')),
    )
    assert capture(source, check=False).returncode == 1
    goes_on(source, 2)


def test_source_dies_in_the_middle(source: Place) -> None:
    source.gpus.script("checkpoint 1 kill-target")
    done = capture(source, check=False)
    assert done.returncode == 1
    said(done.stderr.strip().splitlines()[-1], "process", "capture" if "capture" in done.stderr else "CUDA")
    assert source.node.json("ls") == []


@pytest.mark.parametrize("moment", ["lock", "checkpoint"])
def test_killed_while_it_holds_the_device_memory(source: Place, moment: str) -> None:
    """A guard lets the source go on, whatever call was made last."""
    source.gpus.script(f"{moment} 2 kill-caller")
    assert capture(source, check=False).returncode == -signal.SIGKILL
    goes_on(source, 2)
    assert source.node.json("ls") == []


def test_killed_during_the_dump(source: Place) -> None:
    source.node.configure(
        libcuda=str(source.gpus.libcuda),
        gpu_lock_timeout=2,
        criu=str(faults.criu(source.node, 'case "$*" in *swrk*) sleep 2;; esac\nexec $REAL "$@"')),
    )
    words = [str(source.node.prefix / "bin/rewarm"), "capture", "source", "--name", "model"]
    with subprocess.Popen(words, env={**os.environ, **source.node.env}) as running:
        wait_for("the checkpoint", lambda: len(source.gpus.log("checkpoint")) == 2)
        time.sleep(0.5)
        running.kill()
    wait_for("the unlock", lambda: len(source.gpus.log("unlock")) == 2, timeout=40)
    goes_on(source, 2)


def test_a_signal_waits_for_the_driver(source: Place) -> None:
    source.gpus.script("checkpoint * sleep 1500")
    words = [str(source.node.prefix / "bin/rewarm"), "capture", "source", "--name", "model"]
    with subprocess.Popen(words, env={**os.environ, **source.node.env}, stderr=subprocess.PIPE, text=True) as running:
        wait_for("the lock", lambda: len(source.gpus.log("lock")) == 2)
        time.sleep(0.2)
        running.terminate()
        error = running.communicate(timeout=60)[1]
    assert running.returncode != 0
    assert "when it is done with moving GPU memory" in error
    goes_on(source, 2)
    assert source.node.json("ls") == []


def helper_of(pid: int) -> int:
    [found] = [one for one in descendants(pid) if "rewarm.lifeline" in command_line(one)]
    return found


def test_what_ends_a_whole_cgroup(source: Place) -> None:
    """`systemctl stop` sends SIGTERM to rewarm and its helper, and SIGKILL to what has not ended by then: rewarm."""
    source.node.configure(
        libcuda=str(source.gpus.libcuda),
        gpu_lock_timeout=2,
        criu=str(faults.criu(source.node, 'case "$*" in *swrk*) sleep 2;; esac\nexec $REAL "$@"')),
    )
    words = [str(source.node.prefix / "bin/rewarm"), "capture", "source", "--name", "model"]
    with subprocess.Popen(words, env={**os.environ, **source.node.env}, stderr=subprocess.DEVNULL) as running:
        wait_for("the checkpoint", lambda: len(source.gpus.log("checkpoint")) == 2)
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            os.kill(helper_of(running.pid), number)
        running.terminate()
        time.sleep(0.3)
        running.kill()
    wait_for("the unlock", lambda: len(source.gpus.log("unlock")) == 2, timeout=40)
    goes_on(source, 2)


def test_killed_during_a_dump_that_hangs(source: Place) -> None:
    """The dump outlives rewarm, and has its pipe to the helper: the helper gives it so long, and no longer."""
    hanging = 'case "$*" in *swrk*) exec sleep 1000;; esac\nexec $REAL "$@"'
    source.node.configure(
        libcuda=str(source.gpus.libcuda),
        gpu_lock_timeout=2,
        capture_timeout=3,
        criu=str(faults.criu(source.node, hanging)),
    )
    words = [str(source.node.prefix / "bin/rewarm"), "capture", "source", "--name", "model"]
    with subprocess.Popen(words, env={**os.environ, **source.node.env}) as running:
        wait_for("the checkpoint", lambda: len(source.gpus.log("checkpoint")) == 2)
        wait_for("the dump", lambda: any("sleep 1000" in command_line(one) for one in descendants(running.pid)))
        running.kill()
    wait_for("the unlock", lambda: len(source.gpus.log("unlock")) == 2, timeout=30)
    goes_on(source, 2)


@pytest.mark.parametrize("commands", ["resume", "resume state"])
def test_a_thaw_that_fails(source: Place, commands: str) -> None:
    """The driver would wait for the frozen processes: the helper thaws them first, and again until it works."""
    tried = source.node.directory / "tried"
    wrapper = source.node.directory / "failing-runc"
    real = shutil.which("runc")
    wrapper.write_text(
        f'#!/bin/sh\nfor word in {commands}; do case " $* " in *" $word "*)\n'
        f'[ "$word" = resume ] && echo x >>{tried}\n'
        f'[ ! -e {tried} ] || [ "$(wc -l <{tried})" -gt 4 ] || exit 1;; esac; done\n'
        f'exec {real} "$@"\n'
    )
    wrapper.chmod(0o755)
    source.gpus.script("patience 60000")
    source.node.configure(libcuda=str(source.gpus.libcuda), gpu_lock_timeout=2, runtimes=[str(wrapper)])
    began = time.monotonic()
    done = capture(source, check=False)
    assert done.returncode == 1
    assert time.monotonic() - began < 30
    said(done.stderr.strip().splitlines()[-1], "resume container source")
    goes_on(source, 2)


def test_a_process_beside_the_containers_own(source: Place) -> None:
    """By exec: CRIU would not dump it, and what it has of the GPU would be nowhere."""
    env = [
        word for pair in source.gpus.container_environment(PORT="8123").items() for word in ("--env", "=".join(pair))
    ]
    command = "exec python3 -u -m support.workloads.gpu_fake </dev/null >/dev/null 2>&1"
    file = source.node.directory / "pid"
    source.node.runtime.run("exec", "--detach", "--pid-file", file, *env, "source", "sh", "-c", command)

    def answers() -> bool:
        try:
            return bool(source.network.json(8123, "/probe", timeout=5))
        except OSError:
            return False  # it does not listen yet

    wait_for("its answer", answers, timeout=20)
    source.gpus.clear_log()
    done = capture(source, check=False)
    assert done.returncode == 1
    said(done.stderr.strip().splitlines()[-1], "process", "exec", "end it before the capture")
    assert calls(source) == []
    # The container's pid namespace ends when all of it is reaped, and this is our child.
    kill(int(file.read_text()))
    reap(int(file.read_text()), timeout=10)
    goes_on(source, 2)


def test_two_captures_at_once(source: Place) -> None:
    source.gpus.script("checkpoint * sleep 1500")
    words = [str(source.node.prefix / "bin/rewarm"), "capture", "source", "--name", "model"]
    with subprocess.Popen(words, env={**os.environ, **source.node.env}) as running:
        wait_for("the lock", lambda: len(source.gpus.log("lock")) == 2)
        done = capture(source, check=False)
        assert done.returncode == 1
        said(done.stderr.strip().splitlines()[-1], "another capture of it is going on")
        assert running.wait(60) == 0
    goes_on(source, 2)


def test_a_driver_that_does_not_answer(source: Place) -> None:
    source.gpus.script("checkpoint 1 sleep 20000")
    source.node.configure(libcuda=str(source.gpus.libcuda), gpu_lock_timeout=2, capture_timeout=3)
    began = time.monotonic()
    done = capture(source, check=False)
    assert done.returncode == 1 and time.monotonic() - began < 15
    said(done.stderr.strip().splitlines()[-1], "checkpoint GPU memory of process", "not answered within 3 s")
    goes_on(source, 2)


def test_nvml_that_does_not_answer(source: Place) -> None:
    """Asked while the processes are held, how much of the GPU became free."""
    source.gpus.script("checkpoint * sleep 1500")
    source.node.configure(libcuda=str(source.gpus.libcuda), gpu_lock_timeout=2, capture_timeout=3)
    words = [str(source.node.prefix / "bin/rewarm"), "capture", "source", "--name", "model"]
    with subprocess.Popen(words, env={**os.environ, **source.node.env}, stderr=subprocess.PIPE, text=True) as running:
        wait_for("the lock", lambda: len(source.gpus.log("lock")) == 2)
        source.gpus.node(gpus(1), delay_ms=20000)
        error = running.communicate(timeout=15)[1]
    assert running.returncode == 1
    said(error.strip().splitlines()[-1], "ask the driver about the GPUs", "no answer within 3 s")
    goes_on(source, 2)


def test_a_lock_that_does_not_answer(source: Place) -> None:
    """It is left in the driver, and may do its work yet: whoever undoes it then is still there."""
    source.gpus.script("lock 1 sleep 20000")
    source.node.configure(libcuda=str(source.gpus.libcuda), gpu_lock_timeout=1)
    began = time.monotonic()
    done = capture(source, check=False)
    assert done.returncode == 1 and time.monotonic() - began < 30
    said(done.stderr.strip().splitlines()[-1], "lock CUDA in process", "not answered within 6 s")
    goes_on(source, 2)


@pytest.mark.parametrize("killed", [False, True])
def test_others_take_the_memory(source: Place, killed: bool) -> None:
    """While the source's is off the GPU. The driver would lose the process: it waits until there is room again."""
    source.gpus.script("checkpoint * sleep 1500")
    source.node.configure(libcuda=str(source.gpus.libcuda), gpu_lock_timeout=2, capture_timeout=20)
    source.gpus.node(gpus(1), processes=[(uuid(0), source.node.runtime.containers["source"].pid or 0, 3 << 30)])
    words = [str(source.node.prefix / "bin/rewarm"), "capture", "source", "--name", "model"]
    with subprocess.Popen(words, env={**os.environ, **source.node.env}) as running:
        wait_for("the lock", lambda: len(source.gpus.log("lock")) == 2)
        time.sleep(0.5)
        source.gpus.node([gpus(1)[0]._replace(free=1 << 30)])
        wait_for("the checkpoint", lambda: len(source.gpus.log("checkpoint")) == 2)
        time.sleep(4)
        if killed:
            running.kill()
            time.sleep(2)
        assert source.gpus.log("restore") == []
        source.gpus.node(gpus(1))
        assert running.wait(30) == (-signal.SIGKILL if killed else 0)
    wait_for("the unlock", lambda: len(source.gpus.log("unlock")) == 2, timeout=20)
    goes_on(source, 2)


@pytest.mark.parametrize("killed", [False, True])
def test_others_take_the_memory_before_all_is_taken(source: Place, killed: bool) -> None:
    """Of two processes one has been checkpointed, the other cannot be: the first gets its memory when there is room."""
    source.gpus.script("checkpoint 2 sleep 2000", "checkpoint 2 801")
    source.node.configure(libcuda=str(source.gpus.libcuda), gpu_lock_timeout=2, capture_timeout=20)
    source.gpus.node(gpus(1), processes=[(uuid(0), pid, 3 << 30) for pid in pids(source)])
    words = [str(source.node.prefix / "bin/rewarm"), "capture", "source", "--name", "model"]
    with subprocess.Popen(words, env={**os.environ, **source.node.env}, stderr=subprocess.PIPE, text=True) as running:
        wait_for("a checkpoint", lambda: len(source.gpus.log("checkpoint")) == 1)
        source.gpus.node([gpus(1)[0]._replace(free=1 << 30)])
        if killed:
            running.kill()
        else:
            wait_for("the other checkpoint", lambda: len(source.gpus.log("checkpoint")) == 2)
        time.sleep(3)
        assert source.gpus.log("restore") == []
        source.gpus.node(gpus(1))
        error = running.communicate(timeout=30)[1]
    assert killed or "NOT_SUPPORTED" in error
    wait_for("the unlock", lambda: len(source.gpus.log("unlock")) == 2, timeout=20)
    goes_on(source, 2)


@pytest.mark.parametrize("moment", ["restore", "unlock"])
def test_killed_when_the_memory_is_back(source: Place, moment: str) -> None:
    """All of it, or that of one process: it takes the room itself that it took before. Nobody is to wait for that."""
    source.gpus.script("restore 2 sleep 3000" if moment == "restore" else "unlock * sleep 3000")
    source.gpus.node(gpus(1), processes=[(uuid(0), pid, 3 << 30) for pid in pids(source)])
    words = [str(source.node.prefix / "bin/rewarm"), "capture", "source", "--name", "model"]
    with subprocess.Popen(words, env={**os.environ, **source.node.env}) as running:
        restored = 1 if moment == "restore" else 2
        wait_for("the restore", lambda: len(source.gpus.log("restore")) == restored)
        source.gpus.node([gpus(1)[0]._replace(free=(4 if moment == "restore" else 1) << 30)])
        running.kill()
    source.gpus.script()
    wait_for("the unlock", lambda: len(source.gpus.log("unlock")) == 2, timeout=20)
    goes_on(source, 2)


def test_a_process_that_ends_before_the_freeze(source: Place) -> None:
    """Its device memory was taken, but it will not be in the snapshot."""
    child = pids(source)[1]
    wrapper = source.node.directory / "killing-runc"
    wrapper.write_text(
        f'#!/bin/sh\ncase " $* " in *" pause "*) kill -9 {child};; esac\nexec {shutil.which("runc")} "$@"\n'
    )
    wrapper.chmod(0o755)
    source.node.configure(libcuda=str(source.gpus.libcuda), gpu_lock_timeout=2, runtimes=[str(wrapper)])
    done = capture(source, check=False)
    assert done.returncode == 1
    said(done.stderr.strip().splitlines()[-1], f"process {child} ", "has ended since its device memory was taken")
    assert source.node.json("ls") == []


@pytest.mark.parametrize("call", ["os.chroot('/tmp'); os.chdir('/')", "assert libc.unshare(0x20000) == 0"])
def test_a_process_with_a_view_of_its_own(here: Place, call: str) -> None:
    """It could see other devices than those that a restore puts right, so no restore takes it."""
    made = here.bundle("source")
    words = made.spec["process"]["args"]
    before = "import ctypes, os, sys, time; libc = ctypes.CDLL(None)\nif os.fork() == 0:\n"
    program = f"{before}    {call}\n    while True: time.sleep(1)\nos.execvp(sys.argv[1], sys.argv[1:])"
    made.spec["process"]["args"] = ["python3", "-c", program, *words]
    for names in made.spec["process"]["capabilities"].values():
        names += ["CAP_SYS_ADMIN", "CAP_SYS_CHROOT"]
    made.write()
    here.start("source", made)
    assert here.ask()["step"] == 1
    here.gpus.clear_log()
    done = capture(here, check=False)
    assert done.returncode == 1
    said(done.stderr.strip().splitlines()[-1], "(python3) has a root or mounts of its own", "run it without chroot")
    assert here.gpus.log("lock") == []
    assert here.ask()["step"] == 2


def test_more_device_memory_than_the_container_may_have(here: Place) -> None:
    """It would become the container's own memory, and the end of it."""
    made = here.bundle("source")
    made.spec["linux"].setdefault("resources", {})["memory"] = {"limit": 1 << 30}
    made.write()
    here.start("source", made)
    assert here.ask()["step"] == 1
    pid = here.node.runtime.containers["source"].pid
    here.gpus.node(gpus(1), processes=[(uuid(0), pid or 0, 3 << 30)])
    here.gpus.clear_log()
    done = capture(here, check=False)
    assert done.returncode == 1
    said(done.stderr.strip().splitlines()[-1], f"{3 << 30} bytes (3072 MiB)", "of its own", made.cgroup, "memory limit")
    assert here.gpus.log("lock") == []
    assert here.ask()["step"] == 2


# What is refused before anything is paused.


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({"MPS": "1"}, "it is a client of MPS"),
        ({"MANAGED": "1"}, "such as managed memory"),
        ({"BUSY": "1"}, "still busy"),
    ],
)
def test_refused(here: Place, env: dict[str, str], expected: str) -> None:
    here.start("source", here.bundle("source", env=env))
    here.ask()
    if "MPS" in env:
        [found] = here.ask("/where")
        here.gpus.node(fake_gpu.gpus(1), mps=[(uuid(0), here.node.runtime.containers["source"].pid or 0)])
        assert found["state"] == 0
    done = capture(here, check=False)
    assert done.returncode == 1
    said(done.stderr.strip().splitlines()[-1], "process", expected)
    assert here.ask()["step"] == 2
    if "MPS" in env:
        assert calls(here) == []


def with_node(*found: FakeGpu, **facts: str) -> Callable[[Place], None]:
    return lambda where: where.gpus.node(found, **facts)  # type: ignore[arg-type]


def with_library(name: str) -> Callable[[Place], None]:
    return lambda where: where.node.configure(libcuda=str(where.gpus.directory / name))


BROKEN: dict[str, tuple[Callable[[Place], None], tuple[str, ...]]] = {
    "missing": (with_library("nowhere.so"), ("read the NVIDIA driver", "No such file", "libcuda")),
    "too old": (with_library("too-old/libcuda.so.1"), ("570 or newer is needed",)),
    "wrong architecture": (with_library("foreign/libcuda.so.1"), ("it is built for aarch64, this machine is x86_64",)),
    "no library": (with_library("node"), ("it is not a shared library",)),
    "MIG": (with_node(FakeGpu(uuid(0), 0, mig=1)), ("MIG",)),
    "lost GPU": (
        with_node(FakeGpu(uuid(0), 0, mig="lost")),
        ("minor number 0", "NVML cannot read GPU 0 (GPU is lost)", "dmesg"),
    ),
    "no such GPU": (with_node(FakeGpu(uuid(5), 5)), ("/dev/nvidia0", "minor number 0")),
    "no driver": (lambda where: (where.gpus.directory / "node").unlink(), ("NVML says",)),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_capture_on_a_broken_node(source: Place, kind: str) -> None:
    break_it, expected = BROKEN[kind]
    break_it(source)
    done = capture(source, check=False)
    assert done.returncode == 1
    said(done.stderr.strip().splitlines()[-1], *expected)
    assert calls(source) == []
    goes_on(source, 2)


@pytest.fixture
def captured(source: Place) -> Place:
    """A place with a snapshot, whose source has ended after three answers."""
    capture(source)
    source.expected = [source.ask() for _ in range(2)]  # type: ignore[attr-defined]
    source.end("source")
    source.gpus.clear_log()
    return source


def expected(where: Place) -> list[object]:
    found: list[object] = where.expected  # type: ignore[attr-defined]
    return found


# Restore.


def test_restore(captured: Place) -> None:
    """In `create`, the device memory included: the answers go on as the source's did."""
    made = captured.bundle("copy", CHILDREN="1")
    captured.node.runtime.create("copy", made)
    outcome = captured.node.outcome("copy")
    assert outcome["outcome"] == "warm", outcome
    assert outcome["devices"] == []
    assert "restore.cuda" in outcome["seconds"]
    assert captured.node.runtime.state("copy")["status"] == "created"
    log = captured.gpus.log(*CALLS)
    assert [one.name for one in log] == ["restore"] * 2 + ["unlock"] * 2
    assert all(one.map == {} and one.result == 0 for one in log)
    captured.node.runtime.start("copy")
    assert [captured.ask() for _ in range(2)] == expected(captured)
    captured.end("copy")


def test_restore_with_an_nvml_that_does_not_answer(captured: Place) -> None:
    """It is asked from the beginning on, in a thread: `create` starts cold in time all the same."""
    captured.node.configure(libcuda=str(captured.gpus.libcuda), deadline=2)
    captured.gpus.node(gpus(1), delay_ms=20000)
    began = time.monotonic()
    captured.node.runtime.create("copy", captured.bundle("copy", CHILDREN="1"))
    assert time.monotonic() - began < 12
    outcome = captured.node.outcome("copy")
    assert outcome["outcome"] == "cold", outcome
    said(outcome["reason"], "the deadline of 2 s passed during find")
    captured.end("copy")


def test_twice(captured: Place) -> None:
    for name in ("copy", "other"):
        captured.start(name, captured.bundle(name, CHILDREN="1"))
        assert captured.node.outcome(name)["outcome"] == "warm"
        assert captured.ask() == expected(captured)[0]
        captured.end(name)


def test_captured_again(captured: Place) -> None:
    """A restored container can be captured like any other."""
    captured.start("copy", captured.bundle("copy", CHILDREN="1"))
    assert captured.ask() == expected(captured)[0]
    captured.node.rewarm("capture", "copy", "--name", "model", "--stop")
    captured.end("copy")
    captured.start("second", captured.bundle("second", CHILDREN="1"))
    assert captured.ask() == expected(captured)[1]
    captured.end("second")


def test_other_gpu(captured: Place) -> None:
    """The map is by what the GPUs are; the container has the nodes of its own spec, not the snapshot's."""
    captured.gpus.node(fake_gpu.gpus(2, first=2))
    captured.gpus.script("nodes")
    captured.start("copy", captured.bundle("copy", (3,), CHILDREN="1"))
    outcome = captured.node.outcome("copy")
    assert outcome["outcome"] == "warm", outcome
    assert outcome["devices"] == [{"source": uuid(0), "target": uuid(3), "source_minor": 0, "target_minor": 3}]
    assert [one.map for one in captured.gpus.log("restore")] == [{uuid(0): uuid(3)}] * 2
    assert [captured.ask() for _ in range(2)] == expected(captured)
    assert {one["gpu"] for one in captured.ask("/where")} == {uuid(3)}
    assert captured.node.runtime.exec("copy", "sh", "-c", "ls /dev | grep nvidia").split() == ["nvidia3", "nvidiactl"]
    shown = captured.node.rewarm("inspect", "--container", "copy").stdout
    says(shown, uuid(0), uuid(3), "/dev/nvidia3")
    assert captured.node.json("inspect", "--container", "copy")["devices"] == outcome["devices"]
    captured.end("copy")


def test_a_lost_gpu_of_others(source: Place) -> None:
    """Which still counts, first in the order of the bus, but cannot be asked for anything."""
    source.gpus.node([FakeGpu(uuid(1), 1, mig="lost"), FakeGpu(uuid(0), 0)])
    capture(source)
    answer = source.ask()
    source.end("source")
    source.start("copy", source.bundle("copy", CHILDREN="1"))
    outcome = source.node.outcome("copy")
    assert outcome["outcome"] == "warm", outcome
    assert source.ask() == answer
    source.end("copy")


UNFIT: dict[str, tuple[Callable[[Place], None], tuple[str, ...]]] = {
    **BROKEN,
    "other model": (
        with_node(FakeGpu(uuid(0), 0, model="NVIDIA H200")),
        ("NVIDIA H100 80GB HBM3", "NVIDIA H200"),
    ),
    "other memory": (with_node(FakeGpu(uuid(0), 0, total=94 << 30)), (str(94 << 30), "85520809984")),
    "other driver": (with_node(FakeGpu(uuid(0), 0), driver="575.57"), ("driver 580.159.04, this node has 575.57",)),
    "compute mode": (with_node(FakeGpu(uuid(0), 0, compute_mode=2)), ("mode default", "is in prohibited")),
    "too little memory": (with_node(FakeGpu(uuid(0), 0, free=1 << 20)), ("1 MiB) are free", "are needed")),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_restore_where_it_does_not_fit(captured: Place, kind: str) -> None:
    change, reasons = UNFIT[kind]
    if kind == "too little memory":
        # What it needs is what NVML said of the source's processes; the fake one says it only if it is told.
        path = faults.rewritten(captured.node.store, lambda one: one["cuda"].update(used_bytes=[8 << 20]))
        assert path.exists()
    change(captured)
    captured.node.runtime.create("copy", captured.bundle("copy", CHILDREN="1"))
    outcome = captured.node.outcome("copy")
    assert outcome["outcome"] == "cold", outcome
    said(outcome["reason"], *reasons)
    assert calls(captured) == [], "the driver was asked for something"
    captured.end("copy")


def test_gpu_of_one_process_that_is_in_use(here: Place) -> None:
    alone = FakeGpu(uuid(0), 0, compute_mode=3)
    here.gpus.node([alone])
    here.start("source", here.bundle("source"))
    here.ask()
    pid = here.node.runtime.containers["source"].pid or 0
    here.gpus.node([alone], processes=[(uuid(0), pid, 8 << 20)])
    capture(here, "--stop")
    here.end("source")
    assert here.node.json("inspect", "model")["cuda"]["used_bytes"] == [8 << 20]
    here.gpus.clear_log()
    here.gpus.node([alone], processes=[(uuid(0), 4711, 8 << 20)])
    here.node.runtime.create("copy", here.bundle("copy"))
    said(here.node.outcome("copy")["reason"], "compute mode exclusive process, and process 4711 uses it")
    assert calls(here) == []
    here.end("copy")
    here.gpus.node([alone])
    here.start("again", here.bundle("again"))
    assert here.node.outcome("again")["outcome"] == "warm"
    assert here.ask()["step"] == 2
    here.end("again")


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("restore 2 2", "CUDA_ERROR_OUT_OF_MEMORY"),
        ("restore 1 999", "CUDA_ERROR_UNKNOWN"),
        ("restore 1 1", "it has imported memory of another process by CUDA IPC, as it seems; restart"),
        ("unlock 1 999", "CUDA_ERROR_UNKNOWN"),
        ("restore 1 kill-target", "process"),
    ],
)
def test_restore_fails(captured: Place, script: str, reason: str) -> None:
    """Whatever runs by then is killed, and the program starts cold."""
    captured.gpus.script(script)
    made = captured.bundle("copy", CHILDREN="1")
    before = faults.Before(made)
    captured.node.runtime.create("copy", made)
    outcome = captured.node.outcome("copy")
    assert outcome["outcome"] == "cold", outcome
    said(outcome["reason"], reason)
    before.check_files(mount_points=True)
    captured.gpus.script()
    captured.node.runtime.start("copy")
    assert captured.ask()["step"] == 1
    captured.end("copy")


def test_restore_that_hangs(captured: Place) -> None:
    captured.gpus.script("restore 1 sleep 30000")
    captured.node.configure(libcuda=str(captured.gpus.libcuda), deadline=4)
    began = time.monotonic()
    captured.node.runtime.create("copy", captured.bundle("copy", CHILDREN="1"))
    assert time.monotonic() - began < 12
    said(captured.node.outcome("copy")["reason"], "the deadline of 4 s passed during restore.cuda")
    captured.node.runtime.start("copy")
    assert captured.ask()["step"] == 1
    captured.end("copy")


def test_map_that_names_foreign_gpus(captured: Place) -> None:
    """The snapshot says what it had, never what it gets."""
    foreign = "GPU-deadbeef-0000-4000-8000-000000000000"
    faults.rewritten(captured.node.store, lambda one: one["requires"]["gpus"][0].update(uuid=foreign))
    captured.node.runtime.create("copy", captured.bundle("copy", CHILDREN="1"))
    # The driver refuses a map without the GPU that the process had.
    outcome = captured.node.outcome("copy")
    assert outcome["outcome"] == "cold"
    said(outcome["reason"], "CUDA_ERROR_INVALID_DEVICE")
    assert set(captured.gpus.log("restore")[0].map.values()) == {uuid(0)}
    captured.end("copy")


@pytest.mark.parametrize("numbers", [[1, 999], [4000000]])
def test_processes_that_are_not_there(captured: Place, numbers: list[int]) -> None:
    faults.rewritten(captured.node.store, lambda one: one["cuda"].update(processes=numbers))
    captured.node.runtime.create("copy", captured.bundle("copy", CHILDREN="1"))
    outcome = captured.node.outcome("copy")
    assert outcome["outcome"] == "cold"
    said(outcome["reason"], "restore GPU memory of process", "not among the restored ones")
    captured.end("copy")


def test_killed_during_the_restore(captured: Place) -> None:
    """The tree runs by then: the guard kills it. The process that restores is not the one that the engine waits for."""
    captured.gpus.script("restore 1 kill-caller")
    captured.start("copy", captured.bundle("copy", CHILDREN="1"))
    outcome = captured.node.outcome("copy")
    assert outcome["outcome"] == "cold", outcome
    said(outcome["reason"], "its process was killed by signal 9")
    assert captured.ask()["step"] == 1
    captured.end("copy")


def test_engine_killed_during_the_restore(captured: Place) -> None:
    """As a shim does whose time is up."""
    captured.gpus.script("restore * sleep 20000")
    made = captured.bundle("copy", CHILDREN="1")
    process, _ = captured.node.runtime.spawn("create", "copy", made)
    wait_for("the restore", lambda: captured.gpus.begun("restore") > 0)
    process.kill()
    process.wait()
    wait_for("nothing is left", lambda: faults.remains(captured.node, "copy", made) == [], timeout=30)


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (999, ("CUDA_ERROR_UNKNOWN", "Xid")),
        (1, ("CUDA_ERROR_INVALID_VALUE", "imported memory", "restart the container")),
    ],
)
def test_what_cannot_go_on_is_tried_again(source: Place, result: int, expected: tuple[str, ...]) -> None:
    """The error is said at once; the helper goes on trying for a while."""
    source.gpus.script(f"restore * {result}")
    done = capture(source, check=False)
    assert done.returncode == 1
    said(done.stderr.strip().splitlines()[-1], "resume CUDA in process", *expected)
    assert set(states(source)) == {CHECKPOINTED}
    source.gpus.script()
    goes_on(source, 2)
