"""Device memory leaves running programs and comes back, whoever is in the way, and whoever is killed meanwhile."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rewarm.errors import GpuError
from rewarm.gpu import actions, descriptors, taking
from rewarm_native import cuda
from support.fake_gpu import FakeGpus
from support.lying_library import nothing_stays_open, open_files
from support.proc import wait_for
from support.served_capture import LIMIT, SIZES, Capture, Missed, Node, Taken, debugger, take
from support.served_workload import MANY, MIB, PIECE, Workload, killed_in_the_end

PIECES = 1101
FEW = 256
STEPS = 12
Check = Callable[[Workload, int], bool]


@pytest.fixture(scope="module")
def gpus(tmp_path_factory: pytest.TempPathFactory) -> FakeGpus:
    """Made once: a library that is loaded must not be written."""
    return FakeGpus(tmp_path_factory.mktemp("gpus"))


@pytest.fixture
def node(gpus: FakeGpus, prefix: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Node]:
    found = Node(gpus, prefix)
    for name, value in gpus.environment().items():
        monkeypatch.setenv(name, value)
    yield found
    found.close()


@pytest.fixture
def program(node: Node) -> Workload:
    return node.start()


@pytest.fixture
def many(node: Node) -> Workload:
    return node.start(MANY, PIECES=str(PIECES))


_references: dict[str, list[Any]] = {}


@pytest.fixture
def expected(node: Node) -> Check:
    """Whether a program's answer to its probe with this number is that of one that nobody has touched."""

    def check(program: Workload, step: int) -> bool:
        module = str(program.process.args[-1])  # type: ignore[index]
        if module not in _references:
            other = node.start(module, PIECES=str(PIECES))
            _references[module] = [other.probe() for _ in range(STEPS)]
            other.close()
        answer = program.probe()
        assert answer["step"] == step
        return bool(answer == _references[module][step - 1])

    return check


def test_memory_that_the_program_creates_itself(node: Node) -> None:
    """Beside the other, with and without a handle that it keeps, and uses with every step."""
    program, other = (node.start(CREATED_MIB="6,2,4") for _ in range(2))
    found = node.contexts(program)
    for _ in range(3):
        assert program.probe() == other.probe()
        with nothing_stays_open():
            assert taking.look(found, LIMIT) == {program.pid: (sum(SIZES) + 12) * MIB}
            places = take(node, found)
            assert len(places[program.pid]) == len(SIZES) + 3
            actions.checkpoint(node.driver, found, LIMIT)
            taking.put(node.driver, found, places, LIMIT)
            descriptors.close(places)
        assert node.away(program) == 0


def churned(program: Workload, rounds: int) -> int:
    """So many at least, and nothing wrong in any."""
    wait_for("the thread", lambda: program.get("/churn")["rounds"] >= rounds)
    state = program.get("/churn")
    assert state["wrong"] == []
    return int(state["rounds"])


def test_calls_while_the_memory_is_out(node: Node) -> None:
    """The program is locked, and not stopped: a thread that maps memory all the time does it before or after."""
    program = node.start(CHURN_MIB="6,6,6")
    found = node.contexts(program)
    rounds = 0
    for _ in range(5):
        places = take(node, found)
        time.sleep(0.05)
        actions.checkpoint(node.driver, found, LIMIT)
        time.sleep(0.05)
        assert node.away(program) == len(SIZES) + 3
        taking.put(node.driver, found, places, LIMIT)
        descriptors.close(places)
        rounds = churned(program, rounds + 3)


def test_brought_and_not_mapped(node: Node) -> None:
    """Nobody but the program has it, and only for as long as it is not checkpointed."""
    program, other = (node.start(SERVED_MIB="1", CREATED_MIB="6") for _ in range(2))
    found = node.contexts(program)
    places = take(node, found)
    taking.put(node.driver, found, places, LIMIT)
    descriptors.close(places)
    program.get("/unmap")
    assert taking.look(found, LIMIT) == {program.pid: 0}, "it is known, though there is no piece"
    places = {program.pid: []}
    with pytest.raises(Missed):
        take(node, found, places, timeout=0.2)
    with pytest.raises(GpuError, match=f"{6 * MIB} bytes of it are not mapped, .* that of a restore"):
        taking.check_own(found, LIMIT)
    taking.put(node.driver, found, places, LIMIT)
    assert program.probe() == other.probe()
    places = take(node, found)
    taking.put(node.driver, found, places, LIMIT)
    descriptors.close(places)
    assert program.probe() == other.probe()


def test_a_copy_that_can_be_put_nowhere(node: Node) -> None:
    """The piece is lost, and the program that would run without it stays stopped."""
    program = node.start(SERVED_MIB="1", CREATED_MIB="6")
    found = node.contexts(program)
    places = take(node, found)
    taking.put(node.driver, found, places, LIMIT)
    descriptors.close(places)
    program.get("/fail")
    places = {program.pid: []}
    with pytest.raises(GpuError, match=r"make its own memory in .* the GPU has not enough free memory"):
        take(node, found, places)
    for _ in range(2):
        with pytest.raises(GpuError, match=f"process {program.pid} .*: a piece of it is lost; restart the container"):
            taking.put(node.driver, found, places, LIMIT)
        assert program.stopped


def test_there_and_back(node: Node, program: Workload, expected: Check) -> None:
    assert expected(program, 1)
    found = node.contexts(program)
    for step in (2, 3):
        with nothing_stays_open():
            assert taking.look(found, LIMIT) == {program.pid: sum(SIZES) * MIB}
            places = take(node, found)
            assert sorted(span.size for span, _ in places[program.pid]) == sorted(size * MIB for size in SIZES)
            assert node.driver.state(program.pid) == cuda.LOCKED and not program.stopped
            assert node.away(program) == len(SIZES)
            taking.put(node.driver, found, places, LIMIT)
            descriptors.close(places)
        assert node.driver.state(program.pid) == cuda.RUNNING and node.away(program) == 0
        assert expected(program, step)


def test_there_and_back_by_way_of_a_checkpoint(node: Node, program: Workload, expected: Check) -> None:
    found = node.contexts(program)
    places = take(node, found)
    actions.checkpoint(node.driver, found, LIMIT)
    taking.put(node.driver, found, places, LIMIT)
    descriptors.close(places)
    assert expected(program, 1)
    places = take(node, found)
    actions.checkpoint(node.driver, found, LIMIT)
    taking.go_on(node.driver, found, places, 0.0, LIMIT)
    descriptors.close(places)
    assert expected(program, 2)


def test_put_twice_stops_nobody_who_runs(node: Node, program: Workload, expected: Check) -> None:
    found = node.contexts(program)
    places = take(node, found)
    assert program.was_continued()
    taking.put(node.driver, found, places, LIMIT)
    assert program.was_continued() and expected(program, 1)
    for _ in range(3):
        taking.put(node.driver, found, places, LIMIT)
        assert not program.was_continued() and not program.stopped
    assert expected(program, 2)
    descriptors.close(places)


def test_put_lets_a_stopped_one_go_on_that_has_all(node: Node, program: Workload, expected: Check) -> None:
    found = node.contexts(program)
    places = take(node, found)
    taking.put(node.driver, found, places, LIMIT)
    nothing: Taken = {program.pid: []}
    for given in (places, nothing):
        os.kill(program.pid, signal.SIGSTOP)
        wait_for("a stop", lambda: program.stopped)
        taking.put(node.driver, found, given, LIMIT)
        assert not program.stopped
    assert expected(program, 1)
    descriptors.close(places)


def test_the_second_has_ended(node: Node, program: Workload, expected: Check) -> None:
    other = node.start()
    found = node.contexts(program, other)
    other.close()
    places: Taken = {}
    with pytest.raises(GpuError, match=rf"take GPU memory of process {other.pid} .*: it has ended"):
        take(node, found, places)
    assert len(places[program.pid]) == len(SIZES) and places[other.pid] == []
    taking.put(node.driver, found, places, LIMIT)
    descriptors.close(places)
    assert expected(program, 1)


def test_the_second_ends_while_its_memory_is_out(node: Node, program: Workload, expected: Check) -> None:
    other = node.start()
    found = node.contexts(other, program)
    places = take(node, found)
    other.close()
    taking.put(node.driver, found, places, LIMIT)
    descriptors.close(places)
    assert expected(program, 1)


def driver_thread(node: Node, program: Workload) -> int:
    found = node.driver.restore_thread(program.pid)
    assert found is not None
    return found


@pytest.mark.parametrize("keeps_awake", [False, True])
def test_a_debugger_during_take(
    node: Node, program: Workload, expected: Check, keeps_awake: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether or not it lets the thread stop with the others."""
    monkeypatch.setattr(taking, "_STOP", 0.5)
    found = node.contexts(program)
    tid = driver_thread(node, program)
    places: Taken = {}
    says = rf"thread {tid} of process {program.pid} .*no debugger may be attached"
    if keeps_awake:  # it stands still for a moment, which may be seen or not
        says += rf"|process {program.pid} .*: its thread {tid} has not stopped within 0\.5 s"
    tracer = debugger(program.pid, tid, keeps_awake=keeps_awake)
    with killed_in_the_end(tracer), pytest.raises(GpuError, match=says):
        take(node, found, places)
    assert places == {program.pid: []}
    taking.put(node.driver, found, places, LIMIT)
    assert not program.stopped and expected(program, 1)


def test_a_debugger_while_the_memory_is_out(node: Node, program: Workload, expected: Check) -> None:
    found = node.contexts(program)
    tid = driver_thread(node, program)
    places = take(node, found)
    with killed_in_the_end(debugger(program.pid, tid)):
        for _ in range(2):
            with pytest.raises(GpuError, match=f"thread {tid} of process {program.pid} "):
                taking.put(node.driver, found, places, LIMIT)
            assert program.stopped
    taking.put(node.driver, found, places, LIMIT)
    descriptors.close(places)
    assert expected(program, 1)


def test_one_that_is_stuck_holds_up_no_other(node: Node, program: Workload, expected: Check) -> None:
    other = node.start()
    found = node.contexts(program, other)
    places = take(node, found)
    with killed_in_the_end(debugger(program.pid, driver_thread(node, program))):
        with pytest.raises(GpuError, match=f"process {program.pid} "):
            taking.put(node.driver, found, places, LIMIT)
        assert expected(other, 1)
    taking.put(node.driver, found, places, LIMIT)
    descriptors.close(places)
    assert expected(program, 1)


def test_always_in_a_call(node: Node) -> None:
    """It is missed, has all of its memory, and runs on; that of others is taken."""
    busy, held = node.start(BUSY="1"), node.start(MANY, PIECES="3")
    held.get("/hold")
    found = node.contexts(busy, held)
    took: list[object] = []
    with nothing_stays_open():
        missed = taking.take(node.driver, found, 0.4, LIMIT, lambda *one: took.append(one))
    assert missed == found and took == []
    for one in (busy, held):
        assert one.was_continued() and not one.stopped
        assert node.driver.state(one.pid) == cuda.RUNNING and node.away(one) == 0
        assert one.probe()["step"] == 1
    held.get("/let_go")
    places = take(node, found[1:])
    assert len(places[held.pid]) == 3
    taking.put(node.driver, found[1:], places, LIMIT)
    descriptors.close(places)
    assert held.probe()["step"] == 2


def test_a_call_that_ends_is_waited_for(node: Node) -> None:
    held = node.start(MANY, PIECES="3")
    found = node.contexts(held)
    held.get("/hold")
    child = os.fork()
    if child == 0:
        try:
            time.sleep(0.3)
            while True:  # it is stopped now and then
                held.get("/let_go")
                os._exit(0)
        finally:
            os._exit(1)
    began = time.monotonic()
    places = take(node, found, timeout=LIMIT)
    assert time.monotonic() - began >= 0.2
    os.waitpid(child, 0)
    taking.put(node.driver, found, places, LIMIT)
    descriptors.close(places)
    assert held.probe()["step"] == 1


@pytest.fixture
def few_descriptors() -> Iterator[None]:
    """To begin with."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert hard > 2 * PIECES
    resource.setrlimit(resource.RLIMIT_NOFILE, (FEW, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_more_pieces_than_descriptors_at_first(
    few_descriptors: None, node: Node, many: Workload, expected: Check
) -> None:
    assert expected(many, 1)
    found = node.contexts(many)
    with nothing_stays_open():
        descriptors.allow()
        places = take(node, found)
        assert len(places[many.pid]) == PIECES and len(open_files()) > PIECES
        assert {span.size for span, _ in places[many.pid]} == {PIECE}
        taking.put(node.driver, found, places, LIMIT)
        descriptors.close(places)
    assert expected(many, 2)


PLACES = [
    *("holding", "taking", "took 0", "piece 0", "took 1", "piece 2", "unmapped", "locked", "taken"),
    *("checkpoint", "put", "released"),
]


def test_killed_at_every_place(node: Node, expected: Check, tmp_path: Path) -> None:
    """And the next one at another, with what the first has left in the process."""
    programs = [node.start() for _ in PLACES]
    for step, shift in enumerate((0, 5), 1):
        places = [*PLACES[shift:], *PLACES[:shift]]
        captures = [Capture(node, one, tmp_path, at) for one, at in zip(programs, places, strict=True)]
        for one in captures:
            one.wait()
            assert expected(one.program, step), one.at


def test_killed_at_any_moment(node: Node, expected: Check, tmp_path: Path) -> None:
    programs = [node.start() for _ in range(6)]
    for step in (1, 2):
        captures = []
        for one in programs:
            captures.append(Capture(node, one, tmp_path, ""))
            time.sleep(0.08 * random.random())
            captures[-1].kill()
        for each in captures:
            each.wait()
            assert expected(each.program, step)


def test_killed_with_many_pieces(few_descriptors: None, node: Node, expected: Check, tmp_path: Path) -> None:
    places = ("piece 550", "unmapped", "checkpoint")
    programs = [node.start(MANY, PIECES=str(PIECES)) for _ in places]
    captures = [Capture(node, one, tmp_path, at) for one, at in zip(programs, places, strict=True)]
    for each in captures:
        each.wait()
        assert expected(each.program, 1)


def test_fewer_descriptors_than_pieces(node: Node, many: Workload, expected: Check) -> None:
    """It is refused or left to the driver, and the program goes on."""
    found = node.contexts(many)
    child = os.fork()
    if child == 0:
        places: Taken = {many.pid: []}
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (FEW, FEW))
            with contextlib.suppress(GpuError, Missed):
                take(node, found, places)
            taking.go_on(node.driver, found, places, 0.0, LIMIT)
            os._exit(0)
        except BaseException as error:
            os.write(2, repr(error).encode())
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert (os.waitstatus_to_exitcode(status), many.stopped) == (0, False)
    assert expected(many, 1)
