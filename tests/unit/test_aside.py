"""Work aside of the main thread, and what a signal that ends the wait leaves behind."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator

import pytest

from rewarm import aside


class Passed(Exception):
    """The deadline."""


@pytest.fixture(autouse=True)
def alarm() -> Iterator[None]:
    def passed(number: int, frame: object) -> None:
        raise Passed

    before = signal.signal(signal.SIGALRM, passed)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
    aside._left.clear()
    aside._begun.clear()


def test_gives_what_the_work_gives() -> None:
    assert aside.run(lambda: 7) == 7
    with pytest.raises(KeyError):
        aside.run(lambda: dict[str, int]()["x"])
    assert aside._left == []


def test_what_a_signal_has_left_is_waited_for() -> None:
    """Thread.join would not: it takes a thread whose wait a handler has ended for ended."""
    over: list[float] = []

    def work() -> None:
        time.sleep(0.6)
        over.append(time.monotonic())

    signal.setitimer(signal.ITIMER_REAL, 0.2)
    with pytest.raises(Passed):
        aside.run(work)
    assert over == []
    aside.settle()
    assert len(over) == 1


def test_no_more_than_so_long() -> None:
    go_on = threading.Event()
    with pytest.raises(TimeoutError, match=r"no answer within 0\.1 s"):
        aside.run(go_on.wait, 0.1)
    assert len(aside._left) == 1, "whoever cleans up waits for it, too"
    assert aside.hangs()
    go_on.set()
    assert aside.run(lambda: 7, 5) == 7
    aside.settle()
    assert not aside.hangs()


def test_what_hangs_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aside, "PATIENCE", 0.2)
    go_on = threading.Event()
    tasks = [aside.Task(go_on.wait, "hangs") for _ in range(5)]
    for task in tasks:
        task.start()
    began = time.monotonic()
    assert not aside.wait(tasks)
    assert time.monotonic() - began < 0.5
    go_on.set()
    assert aside.wait(tasks)


def test_failing_work_is_over_too() -> None:
    task = aside.Task(lambda: 1 // 0, "fails")
    previous, threading.excepthook = threading.excepthook, lambda args: None
    try:
        task.start()
        assert task.wait(5)
    finally:
        threading.excepthook = previous
