"""The wait for room on a GPU: who needs any, and that a process of which the driver says nothing holds up no other."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import pytest

from rewarm import processes
from rewarm.errors import GpuError
from rewarm.gpu import room
from rewarm.gpu.contexts import Context
from rewarm_native import cuda

if TYPE_CHECKING:
    from rewarm.gpu.nvml import Nvml
    from rewarm_native.cuda import Driver

GIB = 1 << 30
ONE, OTHER = os.getpid(), os.getppid()


class Answers:
    """Of the driver (states by pid) and of NVML (free bytes by UUID)."""

    def __init__(self, states: dict[int, int], free: dict[str, int]) -> None:
        self.states, self.free = states, free
        self.hangs: set[int] = set()
        self.go_on = threading.Event()

    def state(self, pid: int) -> int:
        if pid in self.hangs:
            self.go_on.wait()
        return self.states[pid]

    def free_bytes(self, uuid: str) -> int:
        return self.free[uuid]


@pytest.fixture
def answers() -> Iterator[Answers]:
    made = Answers({ONE: cuda.CHECKPOINTED, OTHER: cuda.CHECKPOINTED}, {"a": 10 * GIB, "b": 0})
    yield made
    made.go_on.set()


def wait(answers: Answers, needed: room.Needed, limit: float = 0.3) -> None:
    found = [Context(pid, processes.start_time(pid) or 0, "x") for pid in (ONE, OTHER)]
    gone = Context(2**22 + 1, 1, "x")
    room.wait(cast("Driver", answers), cast("Nvml", cast(Any, answers)), [*found, gone], needed, limit)


def test_all_that_are_off_need_room(answers: Answers) -> None:
    wait(answers, {"a": {ONE: 4 * GIB, OTHER: 6 * GIB}, "b": {}})
    with pytest.raises(GpuError, match=r"on a .*10240 MiB\) are free; end what has taken it"):
        wait(answers, {"a": {ONE: 4 * GIB, OTHER: 7 * GIB}, "b": {}})
    with pytest.raises(GpuError, match="on b "):
        wait(answers, {"a": {ONE: GIB}, "b": {OTHER: GIB}})


@pytest.mark.parametrize("state", [cuda.RUNNING, cuda.LOCKED])
def test_who_has_its_memory_needs_none(answers: Answers, state: int) -> None:
    answers.states[OTHER] = state
    wait(answers, {"a": {ONE: 4 * GIB, OTHER: 7 * GIB}})
    with pytest.raises(GpuError):
        wait(answers, {"a": {ONE: 11 * GIB, OTHER: GIB}})


def test_a_sum_is_that_of_all(answers: Answers) -> None:
    with pytest.raises(GpuError):
        wait(answers, {"a": {room.ALL: 11 * GIB}})
    answers.states[OTHER] = cuda.LOCKED
    wait(answers, {"a": {room.ALL: 11 * GIB}})
    answers.states[ONE] = cuda.LOCKED
    wait(answers, {"a": {room.ALL: 11 * GIB}})


def test_one_that_has_ended_needs_none(answers: Answers) -> None:
    wait(answers, {"a": {2**22 + 1: 11 * GIB}})


def test_one_that_does_not_answer(answers: Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others wait for room all the same, and no longer than for that."""
    monkeypatch.setattr(room, "_LONGEST_STATE", 0.5)
    answers.hangs.add(ONE)
    began = time.monotonic()
    wait(answers, {"a": {ONE: 4 * GIB, OTHER: 7 * GIB}}, 60)
    assert time.monotonic() - began < 20
    threads = threading.active_count()
    with pytest.raises(GpuError, match="on b "):
        wait(answers, {"b": {OTHER: GIB}}, 3)
    assert threading.active_count() - threads <= 1, "it is not asked again and again"


def test_room_that_comes(answers: Answers) -> None:
    timer = threading.Timer(0.5, answers.free.update, [{"b": GIB}])
    timer.start()
    wait(answers, {"b": {OTHER: GIB}}, 60)
    timer.join()


@pytest.mark.parametrize(
    ("told", "freed", "needed"),
    [
        # NVML has counted what was imported: 8 of 10 GiB were taken, 2 are the driver's part.
        (10, 2, 2),
        (10, 3, 2),
        # It has not: the 10 that it told are the driver's part.
        (10, 10, 10),
        # What others have freed meanwhile is not asked for, what they have taken is not known.
        (10, 12, 10),
        (10, 9, 9),
        (10, 7, 7),
        # As much was taken as it told, and was counted; or it was not.
        (8, 0, 0),
        (8, 8, 8),
    ],
)
def test_what_was_imported_is_counted_or_not(told: int, freed: int, needed: int) -> None:
    taken = {"GPU-0": {ONE: 8 * GIB}}
    found = room.with_imported({"GPU-0": {ONE: told * GIB}}, taken, taken, {"GPU-0": freed * GIB})
    assert found["GPU-0"][ONE] - 8 * GIB == needed * GIB


def test_a_part_was_imported() -> None:
    """5 of 8 that were taken."""
    told, taken, imported = ({"GPU-0": {ONE: size * GIB}} for size in (7, 8, 5))
    found = room.with_imported(told, taken, imported, {"GPU-0": 4 * GIB})
    assert found["GPU-0"][ONE] == 12 * GIB, "4 of the driver's beside the 8"
    assert room.with_imported(told, taken, {}, {"GPU-0": 4 * GIB}) == told
