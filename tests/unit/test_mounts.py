"""Where a mount point comes to lie in a container whose root filesystem has symbolic links."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rewarm.oci.mounts import destinations, resolved
from rewarm.oci.spec import OWN_DESTINATIONS


@pytest.fixture
def rootfs(tmp_path: Path) -> str:
    root = tmp_path / "rootfs"
    for directory in ("run", "usr/lib", "var", "a/b"):
        (root / directory).mkdir(parents=True)
    for name, target in (
        ("var/run", "/run"),
        ("lib", "usr/lib"),
        ("a/up", "../../../../run"),
        ("a/b/here", "."),
        ("outside", "/../../etc"),
        ("loop", "loop"),
        ("one", "/two"),
        ("two", "/one"),
    ):
        os.symlink(target, root / name)
    return str(root)


@pytest.mark.parametrize(
    ("destination", "place"),
    [
        ("/var/run/secrets/kubernetes.io/serviceaccount", "/run/secrets/kubernetes.io/serviceaccount"),
        ("/run/x", "/run/x"),
        ("/lib/x/", "/usr/lib/x"),
        ("lib", "/usr/lib"),
        ("/a/up/x", "/run/x"),
        ("/a/b/here/../up/x", "/run/x"),
        ("/outside/passwd", "/etc/passwd"),
        ("/not/there", "/not/there"),
        ("//run/./x", "/run/x"),
        ("/", "/"),
        ("/loop/x", ""),
        ("/one/x", ""),
    ],
)
def test_where_it_lies(rootfs: str, destination: str, place: str) -> None:
    assert resolved(rootfs, destination) == place


def test_all_mounts_of_a_spec(rootfs: str) -> None:
    mounts = [{"destination": "/var/run/x", "type": "bind"}, {"destination": "/proc", "type": "proc"}]
    spec = {"mounts": mounts, "root": {"path": "rootfs"}}
    assert destinations(os.path.dirname(rootfs), spec) == {"/run/x", "/proc", *OWN_DESTINATIONS}
