"""Which GPU containers are refused by their spec alone, before any driver is asked."""

from __future__ import annotations

from typing import Any

import pytest

from rewarm import aside
from rewarm.errors import Unfit
from rewarm.gpu import container

ENV = {"process": {"env": ["NVIDIA_VISIBLE_DEVICES=all"]}}
NODES = {"linux": {"devices": [{"path": "/dev/nvidia0", "type": "c", "major": 195, "minor": 0}]}}
HOOKS = {"prestart": [{"path": "/usr/bin/nvidia-container-runtime-hook", "args": ["hook", "prestart"]}]}


@pytest.mark.parametrize(
    ("spec", "low_level", "cause"),
    [
        ({**ENV, "hooks": HOOKS}, "runc", "NVIDIA's hook adds them"),
        ({**ENV, **NODES, "hooks": HOOKS}, "runc", "NVIDIA's hook adds them"),
        ({**ENV, **NODES}, "/usr/bin/nvidia-container-runtime", "nvidia-container-runtime would add them"),
        (ENV, "/usr/bin/nvidia-container-runtime", "nvidia-container-runtime would add them"),
    ],
)
def test_gpus_that_somebody_else_adds(spec: dict[str, Any], low_level: str, cause: str) -> None:
    with pytest.raises(Unfit, match=cause) as caught:
        container.of_spec(spec, low_level, "/no/libcuda.so.1")
    assert "use CDI or device nodes" in str(caught.value)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What NVML was loaded for; loading it fails as nothing should."""
    found: list[str] = []

    def load(libcuda: str) -> None:
        found.append(libcuda)
        raise RuntimeError("broken")

    monkeypatch.setattr(container, "_nvml", load)
    return found


@pytest.mark.parametrize(
    ("spec", "low_level", "expected"),
    [
        (NODES, "runc", ["/no/libcuda.so.1"]),
        ({"process": {"env": ["NVIDIA_VISIBLE_DEVICES=none"]}}, "runc", []),
        ({**ENV, **NODES, "hooks": HOOKS}, "runc", []),
        ({**ENV, **NODES}, "/usr/bin/nvidia-container-runtime", []),
    ],
    ids=["GPU", "none", "hook", "runtime"],
)
def test_begin(
    spec: dict[str, Any],
    low_level: str,
    expected: list[str],
    loaded: list[str],
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Only for who will ask for it; what goes wrong is said to who asks, and not on the container's standard error."""
    container.begin(spec, low_level, "/no/libcuda.so.1")
    assert not aside.hangs()
    assert loaded == expected
    assert capfd.readouterr() == ("", "")
    if expected:
        with pytest.raises(RuntimeError, match="broken"):
            container.nvml("/no/libcuda.so.1")


def test_no_gpu_asks_nobody() -> None:
    spec = {"process": {"env": ["NVIDIA_VISIBLE_DEVICES=none"]}, "hooks": HOOKS}
    assert container.of_spec(spec, "runc", "/no/libcuda.so.1") == container.ContainerGpus()
