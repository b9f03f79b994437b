"""Snapshot x container: what matters is refused with both values, what does not matter fits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from rewarm import compat
from rewarm.errors import Unfit
from rewarm.settings import Settings
from rewarm.store.manifest import Mount, Requires

BASE = Requires(
    arch="x86_64",
    cpu_features=("avx2", "sse2"),
    kernel="6.1.0",
    criu="4.1.1",
    runc="1.1.5",
    image="ocr:1",
    args=("serve",),
    env_keys=("A", "B"),
    mounts=(Mount("/models", "bind"), Mount("/proc", "proc")),
    user=(1000, 1000),
    capabilities=("CAP_KILL",),
    seccomp="abc",
    lsm="",
    namespaces=("mount", "pid"),
    gpus=(),
    cgroup_version=2,
)


def test_equal_fits() -> None:
    compat.check(BASE, BASE)


@pytest.mark.parametrize(
    "here",
    [
        {"cpu_features": ("avx2", "avx512f", "sse2")},
        {"kernel": "6.18.4"},
        {"kernel": "6.1.99"},
        {"criu": "4.2.1"},
        {"runc": "1.3.0"},
        {"image": ""},
        {"capabilities": ("CAP_CHOWN", "CAP_KILL")},
        {"mounts": (*BASE.mounts, Mount("/run/rewarm", "bind"))},
        {"namespaces": ("pid", "mount")},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_does_not_matter(here: dict[str, Any]) -> None:
    compat.check(BASE, replace(BASE, **here))


@pytest.mark.parametrize(
    ("here", "said"),
    [
        ({"arch": "aarch64"}, "snapshot has architecture x86_64, this container has aarch64"),
        ({"cpu_features": ("sse2",)}, "snapshot needs the CPU feature avx2, this node's CPU has not"),
        ({"cpu_features": ()}, "snapshot needs the CPU features avx2, sse2"),
        ({"kernel": "5.15.0"}, "snapshot was taken with kernel 6.1.0, this node has the older 5.15.0"),
        ({"criu": "4.1.0"}, "snapshot was taken with CRIU 4.1.1, this node has the older 4.1.0"),
        ({"criu": ""}, "this node has the older none"),
        ({"cgroup_version": 1}, "snapshot is of a node with cgroup v2, this node has v1"),
        ({"image": "ocr:2"}, "snapshot has image ocr:1, this container has ocr:2"),
        ({"args": ("serve", "-v")}, "snapshot has arguments ['serve'], this container has ['serve', '-v']"),
        ({"env_keys": ("A",)}, "snapshot was taken with environment variable B, this container has none"),
        ({"env_keys": ("A", "B", "C")}, "this container has environment variable C, the snapshot was taken without it"),
        ({"mounts": (Mount("/proc", "proc"),)}, "snapshot has a mount at /models, this container has none"),
        ({"mounts": (*BASE.mounts, Mount("/x", "bind"))}, "this container has a mount at /x, the snapshot has none"),
        (
            {"mounts": (Mount("/models", "tmpfs"), Mount("/proc", "proc"))},
            "snapshot has a mount of type bind at /models, this container one of tmpfs",
        ),
        ({"user": (0, 0)}, "snapshot has user 1000:1000, this container has 0:0"),
        ({"namespaces": ("mount",)}, "snapshot has namespaces ['mount', 'pid'], this container has ['mount']"),
        ({"capabilities": ()}, "snapshot was taken with capability CAP_KILL, this container has it not"),
        ({"seccomp": "def"}, "another seccomp profile than this container's (abc, here def)"),
        ({"lsm": "docker-default"}, "snapshot has LSM label none, this container has docker-default"),
        ({"gpus": ("GPU-1",)}, "snapshot needs 0 GPUs"),
    ],
)
def test_what_matters_is_refused_with_both_values(here: dict[str, Any], said: str) -> None:
    with pytest.raises(Unfit) as caught:
        compat.check(BASE, replace(BASE, **here))
    assert said in str(caught.value)


def test_long_values_make_no_long_message() -> None:
    with pytest.raises(Unfit) as caught:
        compat.check(BASE, replace(BASE, args=tuple("x" * 1000 for _ in range(100))))
    assert len(str(caught.value)) < 500


def test_both_sides_are_described_alike() -> None:
    """A container that rewarm prepared (control mount, io_uring denied) fits the same container before that."""
    from rewarm.oci.spec import prepared

    spec = {
        "process": {"args": ["serve"], "env": ["A=1"], "user": {"uid": 5, "gid": 6}},
        "mounts": [{"destination": "/models/", "type": "none", "options": ["rbind"], "source": "/x"}],
        "linux": {"namespaces": [{"type": "pid"}], "seccomp": {"defaultAction": "SCMP_ACT_ERRNO", "syscalls": []}},
    }
    settings = Settings()
    raw = compat.describe(spec, "1.1.5", "4.2.1", settings)
    compat.check(compat.describe(prepared(spec, "/control"), "1.1.5", "4.2.1", settings), raw)
    assert raw.mounts == (Mount("/models", "bind"),) and raw.user == (5, 6)
