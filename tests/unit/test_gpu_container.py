"""Which GPU containers are refused by their spec alone, before any driver is asked."""

from __future__ import annotations

from typing import Any

import pytest

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


def test_no_gpu_asks_nobody() -> None:
    spec = {"process": {"env": ["NVIDIA_VISIBLE_DEVICES=none"]}, "hooks": HOOKS}
    assert container.of_spec(spec, "runc", "/no/libcuda.so.1") == container.ContainerGpus()
