"""What storage is like: in memory, on the network, faster with O_DIRECT."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from rewarm.store import probe
from support.packs import drop
from support.snapshots import MIB, tmpfs


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    path.write_bytes(os.urandom(4 * MIB))
    return path


def test_data_just_written_is_resident_and_not_after_it_was_dropped(data: Path) -> None:
    with data.open("rb") as file:
        assert probe.resident(file.fileno(), 3 * MIB)
        drop(data)
        assert not probe.resident(file.fileno(), 2 * MIB)
        file.seek(2 * MIB)
        file.read(4096)
        assert probe.resident(file.fileno(), 2 * MIB)


def test_past_the_end_nothing_is_resident(data: Path) -> None:
    with data.open("rb") as file:
        assert not probe.resident(file.fileno(), 100 * MIB)


def test_type_of_mounted_file_systems(tmp_path: Path) -> None:
    assert probe.file_system(os.stat("/proc").st_dev) == "proc"
    mount = tmp_path / "mount"
    with tmpfs(mount, "size=1m"):
        assert probe.file_system(mount.stat().st_dev) == "tmpfs"
    assert probe.file_system(os.makedev(4095, 4095)) == ""


@pytest.mark.parametrize(
    "kind, network",
    [
        *((kind, True) for kind in ("nfs4", "nfs", "fuse.bindfs", "fuse", "virtiofs", "ceph", "9p")),
        *((kind, False) for kind in ("ext4", "tmpfs", "overlay", "btrfs", "", "fusectl")),
    ],
)
def test_network_file_systems(kind: str, network: bool) -> None:
    assert probe.is_network(kind) is network


def test_direct_descriptor_reads_the_same_bytes(data: Path) -> None:
    import mmap

    with data.open("rb") as file:
        fd = probe.open_direct(file.fileno())
        if fd < 0:
            pytest.skip("this file system has no O_DIRECT")
        buffer = memoryview(mmap.mmap(-1, MIB))
        try:
            assert os.preadv(fd, [buffer], 2 * MIB) == MIB
        finally:
            os.close(fd)
        assert buffer == data.read_bytes()[2 * MIB : 3 * MIB]


def test_direct_descriptor_of_a_file_system_without_it() -> None:
    fd = os.open("/proc/self/mountinfo", os.O_RDONLY)
    try:
        assert probe.open_direct(fd) == -1
    finally:
        os.close(fd)


class Clock:
    """A device that reads so many bytes a second, by turns."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, buffered: float, direct: float) -> None:
        self.now = 1.0
        self.rates = (buffered, direct)
        monkeypatch.setattr("rewarm.store.probe.time.monotonic", lambda: self.now)

    def read(self, way: probe.Way, size: int = 8 * MIB) -> bool:
        turn = way.take()
        direct = way.direct
        self.now += size / self.rates[direct]
        way.done(turn, size)
        return direct


@pytest.mark.parametrize("buffered, direct, chosen", [(1e9, 3e9, True), (1e9, 1.1e9, False), (3e9, 1e9, False)])
def test_direct_is_chosen_only_where_it_is_clearly_faster(
    monkeypatch: pytest.MonkeyPatch, buffered: float, direct: float, chosen: bool
) -> None:
    clock, way = Clock(monkeypatch, buffered, direct), probe.Way()
    used = [clock.read(way) for _ in range(100)]
    assert way.settled
    assert way.direct is chosen
    assert not used[0]
    assert True in used
    assert set(used[50:]) == {chosen}


def test_refusal_of_direct_settles_it() -> None:
    way = probe.Way()
    turn = way.take()
    way.refuse()
    way.done(turn, 1 << 40)
    assert way.settled
    assert not way.direct


def test_many_threads_settle_on_one_way() -> None:
    way = probe.Way()

    def work() -> None:
        for _ in range(500):
            way.done(way.take(), MIB)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert way.settled
