"""In which order a restored GPU container gets its device memory and its processes go on: never the one without the
other."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from rewarm import processes
from rewarm.devices import Devices
from rewarm.errors import GpuError
from rewarm.gpu import actions, awake, taking
from rewarm.trace import Trace

INIT, USER = 100, 101
NUMBERS = {INIT: 1, USER: 7}


class Loaded:
    """A load that takes note of what is asked of it."""

    def __init__(self, happened: list[str], failure: Exception | None) -> None:
        self._happened, self._failure = happened, failure

    def sizes(self) -> dict[int, int]:
        return {}

    def join(self) -> dict[int, list[Any]]:
        self._happened.append("verified")
        if self._failure is not None:
            raise self._failure
        return {7: []}


@pytest.fixture
def happened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []

    @contextlib.contextmanager
    def held(*given: object) -> Iterator[None]:
        found.append("held")
        yield
        found.append("let go")

    monkeypatch.setattr(processes, "tree", lambda init: [INIT, USER])
    monkeypatch.setattr(processes, "namespace_pid", NUMBERS.get)
    monkeypatch.setattr(processes, "start_time", lambda pid: 5)
    monkeypatch.setattr(processes, "command", lambda pid: "server")
    monkeypatch.setattr(processes, "send", lambda pid, number: found.append(f"{number.name} {pid}"))
    monkeypatch.setattr(awake, "Awake", held)
    monkeypatch.setattr(actions, "restore", lambda *given: found.append("driver"))
    monkeypatch.setattr(taking, "fill", lambda *given, **more: found.append("mapped"))
    monkeypatch.setattr(Devices, "_check_room", lambda self, there: None)
    return found


def made(monkeypatch: pytest.MonkeyPatch) -> Devices:
    class Cuda:
        processes = (7,)

    class Manifest:
        cuda = Cuda()

    found = Devices.__new__(Devices)
    monkeypatch.setattr(found, "_manifest", Manifest(), raising=False)
    monkeypatch.setattr(found, "_driver", object(), raising=False)
    monkeypatch.setattr(found, "map", [], raising=False)
    return found


def test_all_of_it_is_there_before_anything_runs(monkeypatch: pytest.MonkeyPatch, happened: list[str]) -> None:
    load: Any = Loaded(happened, None)
    made(monkeypatch).resume(INIT, set(), load, Trace())
    assert happened == ["held", "driver", "verified", "mapped", "let go", "SIGCONT 101", "SIGCONT 100"]


def test_nothing_runs_or_is_handed_on_when_the_load_fails(monkeypatch: pytest.MonkeyPatch, happened: list[str]) -> None:
    load: Any = Loaded(happened, GpuError("load device memory of", "GPU-1", "a chunk is damaged"))
    with pytest.raises(GpuError, match="damaged"):
        made(monkeypatch).resume(INIT, set(), load, Trace())
    assert not {"mapped", "SIGCONT 100", "SIGCONT 101"} & set(happened)


def test_who_was_stopped_stays_so(monkeypatch: pytest.MonkeyPatch, happened: list[str]) -> None:
    load: Any = Loaded(happened, None)
    made(monkeypatch).resume(INIT, {1}, load, Trace())
    assert happened[-1] == "SIGCONT 101" and "SIGCONT 100" not in happened


def test_without_the_library_the_driver_needs_them_to_run(monkeypatch: pytest.MonkeyPatch, happened: list[str]) -> None:
    made(monkeypatch).resume(INIT, set(), None, Trace())
    assert happened == ["SIGCONT 101", "SIGCONT 100", "driver"]
