"""A container's user by the node's numbers, and the node's by the container's."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from rewarm.oci import users
from rewarm.oci.users import User

MAPPED = {
    "linux": {
        "uidMappings": [{"containerID": 0, "hostID": 100000, "size": 1000}],
        "gidMappings": [{"containerID": 0, "hostID": 200000, "size": 65536}],
    }
}


def test_of_a_spec() -> None:
    process = {"user": {"uid": 5, "gid": 6, "additionalGids": [7]}}
    assert users.of({}) == User(0, 0, frozenset([0]), False)
    assert users.of({"process": process}) == User(5, 6, frozenset([6, 7]), False)
    assert users.of({"process": process, **MAPPED}) == User(100005, 200006, frozenset([200006, 200007]), False)


@pytest.mark.parametrize(
    ("uid", "kind", "mapped", "privileged"),
    [
        (0, "effective", {}, True),
        (0, "bounding", {}, False),
        (0, "effective", MAPPED, False),
        (5, "effective", {}, False),  # containerd writes it, and execve(2) takes it away
        (5, "ambient", {}, True),
    ],
)
def test_privileged(uid: int, kind: str, mapped: Any, privileged: bool) -> None:
    process = {"user": {"uid": uid}, "capabilities": {kind: ["CAP_DAC_OVERRIDE"]}}
    assert users.of({"process": process, **mapped}).privileged is privileged


@pytest.mark.parametrize(("there", "here"), [((100005, 200006), (5, 6)), ((0, 0), None), ((101000, 200006), None)])
def test_inside(there: tuple[int, int], here: tuple[int, int] | None) -> None:
    assert users.inside({}, *there) == there
    assert users.inside(MAPPED, *there) == here
    assert users.inside({"linux": {"namespaces": [{"type": "user", "path": "/proc/1/ns/user"}]}}, *there) is None


@pytest.mark.parametrize(
    ("owner", "mode", "may"),
    [
        ((1000, 0), 0o700, True),
        ((1000, 0), 0o077, False),
        ((0, 2000), 0o070, True),
        ((0, 2000), 0o707, False),
        ((0, 0), 0o703, True),
        ((0, 0), 0o775, False),
        ((0, 0), 0o702, False),
    ],
)
def test_may_make(tmp_path: Path, owner: tuple[int, int], mode: int, may: bool) -> None:
    os.chown(tmp_path, *owner)
    tmp_path.chmod(mode)
    assert User(1000, 1000, frozenset([1000, 2000]), False).may_make(tmp_path.stat()) is may
    assert User(1000, 1000, frozenset([1000, 2000]), True).may_make(tmp_path.stat())
