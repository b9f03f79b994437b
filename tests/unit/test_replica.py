"""What a restored container is told of itself: restored.json, and who may read it."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from rewarm import addresses, replica
from rewarm.oci.pod import pod


def told(directory: Path, spec: dict[str, Any]) -> tuple[dict[str, Any], os.stat_result]:
    replica.tell(str(directory), "id", "default/model/0123", spec)
    path = directory / replica.NAME
    return json.loads(path.read_text()), path.stat()


def test_a_spec_without_anything(tmp_path: Path) -> None:
    found, status = told(tmp_path, {})
    assert found.pop("reason") == f"restored from default/model/0123 at {found.pop('restored')}"
    assert found == {
        **{"snapshot": "default/model/0123", "container": "id", "pod": None, "hostname": os.uname().nodename},
        **{"addresses": addresses.addresses(os.getpid()), "environment": {}},
    }
    assert (status.st_mode & 0o777, status.st_uid, status.st_gid) == (0o400, 0, 0)


def test_the_programs_user_has_it(tmp_path: Path) -> None:
    user = {"process": {"user": {"uid": 1000, "gid": 1001}, "env": ["A=b=c", "none", "B=", "A=d"]}}
    found, status = told(tmp_path, user)
    assert (status.st_mode & 0o777, status.st_uid, status.st_gid) == (0o400, 1000, 1001)
    assert found["environment"] == {"A": "d", "B": ""}


def test_a_namespace_that_is_not_there_yet(tmp_path: Path) -> None:
    assert told(tmp_path, {"linux": {"namespaces": [{"type": "network"}]}})[0]["addresses"] == []


def test_by_the_nodes_numbers(tmp_path: Path) -> None:
    uids = [{"containerID": 0, "hostID": 100000, "size": 1000}, {"containerID": 1000, "hostID": 5000, "size": 10}]
    gids = [{"containerID": 0, "hostID": 200000, "size": 65536}]
    spec = {"process": {"user": {"uid": 1003, "gid": 7}}, "linux": {"uidMappings": uids, "gidMappings": gids}}
    _, status = told(tmp_path, spec)
    assert (status.st_uid, status.st_gid) == (5003, 200007)


def test_a_namespace_that_cannot_be_asked_has_no_addresses(tmp_path: Path) -> None:
    for path in ("/proc/self/ns/mnt", str(tmp_path / "none")):
        found, _ = told(tmp_path, {"linux": {"namespaces": [{"type": "network", "path": path}]}})
        assert found["addresses"] is None, "which is not none"


def test_addresses_of_this_machine() -> None:
    """Whatever it has, none of it is for itself or one link alone."""
    found = addresses.addresses(os.getpid())
    assert "127.0.0.1" not in found and "::1" not in found and not any(one.startswith("fe80:") for one in found)
    assert found == sorted(found, key=lambda one: ":" in one)
    with pytest.raises(ProcessLookupError):
        addresses.addresses(2**22 + 1)


def test_pods() -> None:
    cri = {f"io.kubernetes.cri.{key}": key for key in ("sandbox-namespace", "sandbox-name", "container-name")}
    found = pod({"annotations": cri})
    assert found == {"namespace": "sandbox-namespace", "name": "sandbox-name", "uid": "", "container": "container-name"}
    assert pod({"annotations": {**cri, "io.kubernetes.cri.sandbox-name": ""}}) is None
    assert pod({"annotations": []}) is None and pod({}) is None


@pytest.fixture
def programs() -> Iterator[Callable[[int], int]]:
    """Starts a process of a user, whose group is the next number."""
    with ExitStack() as stack:

        def start(uid: int) -> int:
            words = ["sleep", "60"]
            process = stack.enter_context(subprocess.Popen(words, user=uid, group=uid + 1, extra_groups=[]))
            stack.callback(process.kill)
            return process.pid

        yield start


DAC = {"capabilities": {"effective": ["CAP_DAC_OVERRIDE"]}}


@pytest.mark.parametrize(
    ("process", "users", "owner"),
    [
        (DAC, [0, 999], (999, 1000)),  # nginx; an init that is root, and gosu below it
        ({}, [0, 999], (0, 0)),  # such a root could no longer read it
        ({}, [999, 999], (999, 1000)),
        (DAC, [0, 0], (0, 0)),
        (DAC, [0, 998, 999], (0, 0)),
        ({}, [], (0, 0)),
        ({"user": {"uid": 1000, "gid": 1000}}, [1000], (1000, 1000)),
        ({"user": {"uid": 1000, "gid": 1000}, **DAC}, [1000, 0], (1000, 1000)),  # sudo
        ({"user": {"uid": 1000, "gid": 1000}, **DAC}, [999], (1000, 1000)),
    ],
)
def test_a_program_that_has_given_up_its_rights(
    tmp_path: Path, programs: Callable[[int], int], process: Any, users: list[int], owner: tuple[int, int]
) -> None:
    told(tmp_path, {"process": process})
    assert handed_over(tmp_path, [programs(user) for user in users], {"process": process}) == (0o400, *owner)


def handed_over(directory: Path, pids: list[int], spec: Any) -> tuple[int, int, int]:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        replica.hand_over(fd, pids, spec)
    finally:
        os.close(fd)
    status = (directory / replica.NAME).stat()
    return status.st_mode & 0o777, status.st_uid, status.st_gid


def test_moved_meanwhile(tmp_path: Path, programs: Callable[[int], int], monkeypatch: pytest.MonkeyPatch) -> None:
    """As `PID.signal` it would be a signal that its new owner wants."""
    told(tmp_path, {})
    chown = os.chown

    def moves(path: str, uid: int, gid: int) -> None:
        with suppress(FileNotFoundError):
            (tmp_path / replica.NAME).rename(tmp_path / "1.signal")
        chown(path, uid, gid)

    monkeypatch.setattr(os, "chown", moves)
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        replica.hand_over(fd, [programs(999)], {})
    finally:
        os.close(fd)
    assert (tmp_path / "1.signal").stat().st_uid == 0


@pytest.mark.parametrize("planted", ["symlink", "link", "fifo"])
def test_nothing_else_is_handed_over(tmp_path: Path, programs: Callable[[int], int], planted: str) -> None:
    """With a GPU the program runs already, and may have put anything there."""
    path, other = tmp_path / replica.NAME, tmp_path / "other"
    other.touch(0o400)
    if planted == "symlink":
        path.symlink_to("other")
    elif planted == "link":
        os.link(other, path)
    else:
        os.mkfifo(path, 0o400)
    assert handed_over(tmp_path, [programs(999)], {})[1:] == (0, 0) == (other.stat().st_uid, other.stat().st_gid)


def test_there_is_nothing_to_hand_over(tmp_path: Path, programs: Callable[[int], int]) -> None:
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        replica.hand_over(fd, [programs(999), 2**22 + 1], {})
    finally:
        os.close(fd)
