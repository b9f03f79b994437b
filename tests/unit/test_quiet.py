"""When the engine of a source is told to go on, and when not. The calls themselves: test_engine.py."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from rewarm import engines, processes, waker
from rewarm.errors import CaptureError, RestoreError
from rewarm.lifeline import Lifeline
from rewarm.oci.runc import Container
from rewarm.quiet import Quiet
from rewarm.settings import Settings

CALLS: list[str] = []


class Helper(Lifeline):
    """Notes what it is told, among the calls of the engine."""

    def __init__(self) -> None:
        pass

    def quiet(self, engine: str, port: int, limit: float) -> None:
        CALLS.append(f"quiet {engine} {port} {limit:g}")

    def loud(self) -> None:
        CALLS.append("loud")


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Stands for the engine's calls; to be called with what they raise."""
    failures: dict[str, BaseException | None] = {}

    def make(name: str) -> None:
        def call(*_: object) -> list[str]:
            CALLS.append(name)
            if (failure := failures.get(name)) is not None:
                raise failure
            return [f"did {name}"]

        monkeypatch.setattr(engines, name, call)

    make("quiesce")
    make("resume")
    CALLS.clear()
    yield lambda **found: failures.update(found)


def quiet(engine: str = "vllm", start: int | None = None) -> Quiet:
    start = processes.start_time(os.getpid()) if start is None else start
    assert start is not None
    container = Container("/run/runc", "source", os.getpid(), start, "/b", "/b/rootfs", {}, (), "")
    annotations = {"rewarm.dev/snapshot": "engine", "rewarm.dev/engine": engine}
    spec: dict[str, Any] = {"annotations": annotations, "process": {"args": ["vllm", "--port", "7"]}}
    return Quiet(container, spec, Settings(engine_timeout=3), Helper())


def test_the_order() -> None:
    """The helper is told first, and last: whatever is in between it can undo."""
    with quiet() as made:
        assert CALLS == ["quiet vllm 7 3", "quiesce"]
        made.resume()
    assert CALLS == ["quiet vllm 7 3", "quiesce", "resume", "loud"], "and once only"
    assert made.notes == ["did quiesce", "did resume"]


def test_no_engine() -> None:
    with quiet("none") as made:
        pass
    assert CALLS == [] == made.notes


def test_an_engine_that_is_not_known() -> None:
    with pytest.raises(CaptureError, match=r"capture container source: .*rewarm\.dev/engine.*'tgi' is not one of"):
        quiet("tgi")


def test_a_container_that_was_stopped() -> None:
    with quiet(start=5):
        pass
    assert CALLS == ["quiet vllm 7 3", "quiesce", "loud"]


def test_one_that_goes_on_already(engine: Callable[..., None]) -> None:
    engine(quiesce=CaptureError("quiesce engine", "vllm", "busy"))
    with pytest.raises(CaptureError, match=r"^quiesce engine vllm: busy$"), quiet():
        raise AssertionError
    assert CALLS == ["quiet vllm 7 3", "quiesce", "loud"]


def test_one_that_may_be_paused_still(engine: Callable[..., None]) -> None:
    engine(quiesce=engines.StillPaused("quiesce engine", "vllm", "hangs", "wait"))
    with pytest.raises(CaptureError, match=r"^quiesce engine vllm: hangs; it goes on by now; wait$"), quiet():
        raise AssertionError
    assert CALLS == ["quiet vllm 7 3", "quiesce", "resume", "loud"]
    engine(
        quiesce=engines.StillPaused("quiesce engine", "vllm", "hangs"),
        resume=RestoreError("resume engine", "vllm", "hangs too"),
    )
    expected = "^quiesce engine vllm: hangs; the engine did not go on: resume engine vllm: hangs too$"
    with pytest.raises(CaptureError, match=expected), quiet():
        raise AssertionError


def test_a_signal(engine: Callable[..., None]) -> None:
    engine(quiesce=KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt), quiet():
        raise AssertionError
    assert CALLS == ["quiet vllm 7 3", "quiesce", "resume", "loud"]


def test_a_capture_that_fails_and_an_engine_that_does_not_go_on(engine: Callable[..., None]) -> None:
    engine(resume=RestoreError("resume engine", "vllm", "gone"))
    expected = "^dump container source: no; the engine did not go on: resume engine vllm: gone; see the log$"
    with pytest.raises(CaptureError, match=expected), quiet():
        raise CaptureError("dump container", "source", "no", "see the log")


def test_a_signal_while_it_is_told_to_go_on(engine: Callable[..., None]) -> None:
    """The helper is not told that it goes on, so it will see to that."""
    engine(resume=KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt), quiet():
        pass
    assert CALLS == ["quiet vllm 7 3", "quiesce", "resume"]


def test_one_that_is_still_told_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is begun."""
    monkeypatch.setattr(waker, "wait", lambda directory, limit: limit != 3)
    with pytest.raises(CaptureError, match="still being told to go on after its restore, for more than 3 s"), quiet():
        raise AssertionError
    assert CALLS == []
