"""The cgroup that a container will have, as runc works it out."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from rewarm.errors import OciError
from rewarm.oci import cgroups

V1 = [("/sys/fs/cgroup/pids", 1, frozenset({"rw", "pids"})), ("/sys/fs/cgroup/unified", 2, frozenset({"rw"}))]
V2 = [("/sys/fs/cgroup", 2, frozenset({"rw", "nsdelegate"}))]


@pytest.fixture(params=[V1, V2], ids=["v1", "v2"])
def mounted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(cgroups, "_hierarchies", lambda: request.param)
    monkeypatch.setattr(cgroups, "_own", lambda version, controllers: "/own/scope")
    return [mount for mount, _, _ in request.param]


def expected(wanted: str | None, systemd: bool = False) -> list[str]:
    return cgroups.expected({"linux": {} if wanted is None else {"cgroupsPath": wanted}}, "id", systemd)


ID, POD = "0d9862f778f89b5b11856ea7161e514499757c64876bb59539749d184037731e", "46bc83af" * 8
SLICE = "/kubepods.slice/kubepods-pod0b13_7f.slice"


@pytest.mark.parametrize(
    "path",
    [
        f"/kubepods/besteffort/pod0b13-7f/{ID}",
        f"{SLICE}/cri-containerd-{ID}.scope",
        f"/../../../{SLICE}/cri-containerd-{ID}.scope",
        f"/system.slice/containerd.service/kubepods-pod0b13_7f.slice:cri-containerd:{ID}",
        f"{SLICE}/crio-{ID}.scope",
        f"{SLICE}/crio-{ID}.scope/container",
        f"/kubepods/pod0b13-7f/crio-{ID}",
        f"/machine.slice/machine-libpod_pod_{POD}.slice/libpod-{ID}.scope",
        f"/machine.slice/machine-libpod_pod_{POD}.slice/libpod-{ID}.scope/container/init.scope",
        f"/libpod_parent/{POD}/libpod-{ID}",
        f"/libpod_parent/{POD}/libpod-{ID}/system.slice/dbus.service",
        f"/docker/{POD}/kubelet/kubepods/pod0b13-7f/{ID}",
        f"/system.slice/docker-{ID}.scope",
    ],
)
def test_the_container_that_a_cgroup_is_of(path: str) -> None:
    assert cgroups.container(path) == ID


@pytest.mark.parametrize(
    "path",
    ["/", f"{SLICE}", "/user.slice/session-1.scope", f"/machine.slice/machine-libpod_pod_{POD}.slice", f"/{ID}a"],
)
def test_a_cgroup_of_no_container(path: str) -> None:
    assert cgroups.container(path) == ""


def test_the_containers_that_a_process_is_in() -> None:
    assert all(len(one) == len(ID) for one in cgroups.containers(os.getpid()))
    with pytest.raises(FileNotFoundError):
        cgroups.containers(4194305)


@pytest.mark.parametrize("wanted", ["/kubepods/pod1/id", "/kubepods//pod1/./id/", "/kubepods/x/../pod1/id"])
def test_absolute(mounted: list[str], wanted: str) -> None:
    assert expected(wanted) == [f"{mount}/kubepods/pod1/id" for mount in mounted]


def test_relative_to_the_callers_own(mounted: list[str]) -> None:
    for wanted, name in (("a/b", "a/b"), (None, "id"), ("", "id")):
        for found, mount in zip(expected(wanted), mounted, strict=True):
            v2 = mount != "/sys/fs/cgroup/pids"
            assert found == (f"{mount}/own/{name}" if v2 else f"{mount}/own/scope/{name}")


@pytest.mark.parametrize(
    ("wanted", "path"),
    [
        ("system.slice:cri-containerd:id", "system.slice/cri-containerd-id.scope"),
        (
            "kubepods-burstable-pod1.slice:cri-containerd:id",
            "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice/cri-containerd-id.scope",
        ),
        ("-.slice:docker:id", "docker-id.scope"),
        (":docker:id", "system.slice/docker-id.scope"),
        ("", "system.slice/runc-id.scope"),
    ],
)
def test_systemd(mounted: list[str], wanted: str, path: str) -> None:
    assert expected(wanted, systemd=True) == [f"{mount}/{path}" for mount in mounted]


@pytest.mark.parametrize("wanted", ["/", "/..", "/../../..", "//"])
def test_never_a_whole_hierarchy(wanted: str) -> None:
    """Every process of the machine is below it, and what is in these directories gets killed."""
    assert expected(wanted) == []


def test_never_above_a_hierarchy(mounted: list[str]) -> None:
    assert all(os.path.dirname(path) in mounted for path in expected("/../../etc"))


def test_killing_waits_until_nobody_is_left(tmp_path: Path) -> None:
    """By a directory that looks like a cgroup, with a process that will not die: the caller itself is none."""
    process = subprocess.Popen(["sleep", "100"])
    (tmp_path / "cgroup.procs").write_text(f"{process.pid}\n")
    cgroups.kill([str(tmp_path)])
    assert process.wait(5) == -9
    cgroups.kill([str(tmp_path / "nowhere")])


def test_a_cgroup_that_stays_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OciError, match="remove cgroup"):
        cgroups.remove([str(tmp_path)], timeout=0.1)


def limited(tmp_path: Path, files: dict[str, dict[str, object]]) -> list[tuple[int, str]]:
    """The rooms of a/b/c, of which some directories have files as a memory controller's."""
    (tmp_path / "a/b/c").mkdir(parents=True)
    for place, found in files.items():
        for name, text in found.items():
            (tmp_path / place / name).write_text(f"{text}\n")
    rooms = cgroups.memory_rooms([str(tmp_path / "a/b/c")])
    return [(room, where.removeprefix(f"{tmp_path}/")) for room, where in rooms if where.startswith(str(tmp_path))]


def test_memory_room_on_v2(tmp_path: Path) -> None:
    """Of the cgroup and of those above; page cache can be had."""
    stat = "anon 5\nactive_file 30\ninactive_file 20\nslab 7"
    files: dict[str, dict[str, object]] = {
        "a/b/c": {"memory.max": 1000, "memory.current": 700, "memory.stat": stat},
        "a/b": {"memory.max": "max", "memory.current": 900, "memory.stat": stat},
        "a": {"memory.max": 950, "memory.current": 1100, "memory.stat": stat},
    }
    assert limited(tmp_path, files) == [(350, "a/b/c"), (0, "a")]


def test_memory_room_on_v1(tmp_path: Path) -> None:
    """Its own numbers leave out what is below."""
    stat = "active_file 1\ninactive_file 1\ntotal_active_file 30\ntotal_inactive_file 20"
    files: dict[str, dict[str, object]] = {
        "a/b/c": {"memory.limit_in_bytes": 9223372036854771712, "memory.usage_in_bytes": 7, "memory.stat": stat},
        "a/b": {"memory.limit_in_bytes": 1000, "memory.usage_in_bytes": 700, "memory.stat": stat},
    }
    assert limited(tmp_path, files) == [(350, "a/b")]


def test_memory_room_where_there_is_none_to_know(tmp_path: Path) -> None:
    assert limited(tmp_path, {"a/b": {"memory.max": "x", "memory.current": 1, "memory.stat": ""}}) == []


def test_own_is_where_memory_is_accounted(monkeypatch: pytest.MonkeyPatch) -> None:
    places = [("/a", 1, frozenset({"cpu"})), ("/b", 1, frozenset({"memory"})), ("/c", 2, frozenset({"rw"}))]
    monkeypatch.setattr(cgroups, "_hierarchies", lambda: places)
    monkeypatch.setattr(cgroups, "_own", lambda version, controllers: f"/own{version}")
    assert cgroups.own() == ["/b/own1", "/c/own2"]
