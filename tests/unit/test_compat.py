"""Snapshot x container: what matters is refused with both values, what does not matter fits."""

from __future__ import annotations

from typing import Any

import pytest

from rewarm import compat
from rewarm.errors import Unfit
from rewarm.settings import Settings
from rewarm.store.manifest import GpuDevice, Mount, Requires

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
    driver="",
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
    compat.check(BASE, BASE._replace(**here))


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
        (
            {"namespaces": ("mount", "pid (shared)")},
            "snapshot has namespaces ['mount', 'pid'], this container has ['mount', ",
        ),
        ({"namespaces": ("mount",)}, "snapshot has namespaces ['mount', 'pid'], this container has ['mount']"),
        ({"capabilities": ()}, "snapshot was taken with capability CAP_KILL, this container has it not"),
        ({"seccomp": "def"}, "another seccomp profile than this container's (abc, here def)"),
        ({"lsm": "docker-default"}, "snapshot has LSM label none, this container has docker-default"),
        (
            {"gpus": (GpuDevice("GPU-1", "H100", 80, 0, "default"),)},
            "snapshot needs no GPU, this container has 1 x H100 (80 bytes)",
        ),
    ],
)
def test_what_matters_is_refused_with_both_values(here: dict[str, Any], said: str) -> None:
    with pytest.raises(Unfit) as caught:
        compat.check(BASE, BASE._replace(**here))
    assert said in str(caught.value)


def on_gpus(*devices: GpuDevice, driver: str = "580.159.04") -> Requires:
    return BASE._replace(gpus=devices, driver=driver)


H100 = GpuDevice("GPU-1", "H100", 80, 0, "default")
OTHER = H100._replace(uuid="GPU-2", minor=3)


def test_gpus_that_fit() -> None:
    compat.check(on_gpus(H100), on_gpus(H100))
    compat.check(on_gpus(H100), on_gpus(OTHER))
    compat.check(on_gpus(H100, OTHER), on_gpus(OTHER._replace(minor=0), H100._replace(minor=1)))
    compat.check(on_gpus(H100, driver="570.10"), on_gpus(H100, driver="570.10"))


@pytest.mark.parametrize(
    ("here", "said"),
    [
        (on_gpus(), "snapshot needs 1 x H100 (80 bytes), this container has 0"),
        (on_gpus(H100, OTHER), "snapshot needs 1 x H100 (80 bytes), this container has 2"),
        (
            on_gpus(H100._replace(model="H200")),
            "snapshot needs 1 x H100 (80 bytes), this container has 1 x H200 (80 bytes)",
        ),
        (on_gpus(H100._replace(memory_bytes=94)), "this container has 1 x H100 (94 bytes)"),
        (on_gpus(H100._replace(uuid="GPU-9", memory_bytes=94)), "this container has 1 x H100 (94 bytes)"),
        (on_gpus(H100, driver="575.1"), "snapshot was taken with NVIDIA driver 580.159.04, this node has 575.1"),
        (
            on_gpus(H100._replace(compute_mode="prohibited")),
            "snapshot was taken with a GPU in compute mode default, GPU-1 here is in prohibited",
        ),
    ],
)
def test_gpus_that_do_not(here: Requires, said: str) -> None:
    with pytest.raises(Unfit) as caught:
        compat.check(on_gpus(H100), here)
    assert said in str(caught.value)


def test_other_gpus_need_a_driver_that_can_map_them() -> None:
    with pytest.raises(Unfit, match=r"driver 580 or newer is needed, this node has 570\.10"):
        compat.check(on_gpus(H100, driver="570.10"), on_gpus(OTHER, driver="570.10"))


def test_long_values_make_no_long_message() -> None:
    with pytest.raises(Unfit) as caught:
        compat.check(BASE, BASE._replace(args=tuple("x" * 1000 for _ in range(100))))
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
