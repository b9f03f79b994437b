"""How much of a snapshot's memory may be read before there are processes for it, and the tables of device memory."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rewarm import aside, carved, slots
from rewarm.carved import CarvedMemory, DeviceMemory
from rewarm.errors import RestoreError, SnapshotDamaged
from rewarm.oci import cgroups
from rewarm.settings import Settings


@pytest.mark.parametrize(
    ("rooms", "expected"), [([], 1000), ([5000], 1000), ([900, 5000], 300), ([300], 0), ([200, 900], 0)]
)
def test_half_of_what_a_limit_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rooms: list[int], expected: int
) -> None:
    """rewarm may be in the pod's cgroup, where the container's memory is charged as well."""
    monkeypatch.setattr(cgroups, "memory_rooms", lambda directories: ((room, "x") for room in rooms))
    assert carved._ahead(Settings(state_dir=str(tmp_path), read_ahead=1000), 300) == expected


def test_nothing_without_a_slot(tmp_path: Path) -> None:
    settings = Settings(state_dir=str(tmp_path), read_ahead=1000)
    assert [carved._ahead(settings, 0) > 0 for _ in range(slots.COUNT + 1)] == [True] * slots.COUNT + [False]


class Begun:
    """An opening, or a load: what was done with it."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def start(self) -> None:
        self.calls.append("start")

    def abandon(self) -> None:
        self.calls.append("abandon")

    def close(self) -> None:
        self.calls.append("close")

    def raise_failure(self) -> None:
        self.calls.append("raise_failure")


def device_memory(make: Callable[[], Any]) -> tuple[DeviceMemory, Begun, threading.Event]:
    opening: Any = Begun()
    stop = threading.Event()
    return DeviceMemory(opening, make, stop), opening, stop


def test_the_load_begins_with_its_tables() -> None:
    load = Begun()
    device, opening, stop = device_memory(lambda: load)
    device.start()
    assert device.load() is load  # type: ignore[comparison-overlap]
    device.abandon()
    assert (load.calls, opening.calls, stop.is_set()) == (["start", "raise_failure", "abandon"], [], False)


def test_tables_that_are_damaged() -> None:
    """All threads of the restore end, and who waits for the load is told why."""

    def make() -> Any:
        raise SnapshotDamaged("read chunk table", "default/model", "chunk 3 is bad", "")

    device, opening, stop = device_memory(make)
    device.start()
    with pytest.raises(SnapshotDamaged, match="chunk 3 is bad"):
        device.load()
    with pytest.raises(SnapshotDamaged, match="chunk 3 is bad"):
        device.raise_failure()
    assert stop.is_set()
    device.abandon()
    assert opening.calls == ["close"]


def test_given_up_before_it_began() -> None:
    device, opening, _ = device_memory(Begun)
    device.abandon()
    assert opening.calls == ["close"]


def test_given_up_while_a_table_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU is let go of, and what is made of the table later is the load's, which sees that all is over."""
    monkeypatch.setattr(aside, "PATIENCE", 0.1)
    over, load = threading.Event(), Begun()

    def make() -> Any:
        assert over.wait(10)
        return load

    device, opening, stop = device_memory(make)
    device.start()
    stop.set()
    device.abandon()
    assert opening.calls == ["close"]
    over.set()
    assert device._task.wait(10)
    assert load.calls == []


def test_nothing_is_written_unchecked() -> None:
    with pytest.raises(RestoreError, match="have not been checked"):
        carved_memory(Filled()).release(1)


class Filled:
    """A fill, and the reader of its chunks."""

    def __init__(self, cold: bool = False, failure: Exception | None = None) -> None:
        self.cold, self.failure = cold, failure

    def start(self) -> None:
        pass

    hurry = close = start

    def join(self) -> None:
        if self.failure is not None:
            raise self.failure


def carved_memory(filled: Any, device: DeviceMemory | None = None) -> CarvedMemory:
    ref: Any = "default/model@123"
    manifest: Any = None
    return CarvedMemory(ref, manifest, [], filled, filled, device)


@pytest.mark.parametrize("cold", [False, True])
def test_when_device_memory_begins(cold: bool) -> None:
    """While CRIU works; before, where it waits for storage. Once in any case."""
    made: list[Begun] = []

    def make() -> Any:
        made.append(Begun())
        return made[-1]

    device, _, _ = device_memory(make)
    memory = carved_memory(Filled(cold), device)
    memory.start()
    assert device._begun == cold
    memory.hurry()
    memory.join()
    assert memory.device() is made[0]  # type: ignore[comparison-overlap]
    assert len(made) == 1


@pytest.mark.parametrize("failure", [None, RestoreError("fill memory", "9 of 10 chunks", "they were not written")])
def test_device_memory_that_cannot_begin_ends_all(failure: Exception | None) -> None:
    """And is the reason, also of what others did not do any more."""

    def make() -> Any:
        raise SnapshotDamaged("read device/pieces of", "default/model", "piece 3 is bad", "")

    device, _, _ = device_memory(make)
    memory = carved_memory(Filled(failure=failure), device)
    memory.start()
    memory.hurry()
    assert device._task.wait(10)
    with pytest.raises(SnapshotDamaged, match="piece 3 is bad"):
        memory.join()


def test_a_load_without_a_thread() -> None:
    """It has the opening, and lets go of it."""

    class Crowded(Begun):
        def start(self) -> None:
            raise RestoreError("start thread", "begin", "no more threads")

    load = Crowded()
    device, opening, stop = device_memory(lambda: load)
    device.start()
    with pytest.raises(RestoreError, match="no more threads"):
        device.load()
    assert stop.is_set()
    device.abandon()
    assert (load.calls, opening.calls) == (["abandon"], [])
