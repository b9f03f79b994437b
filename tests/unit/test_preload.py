"""Which containers get the device memory library, and that nothing is looked at for it that may not answer."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import pytest

from rewarm import installation, preload
from rewarm.request import Request
from rewarm_hooks import gpu_visible

GPU = {"type": "c", "major": 195}
WANTED = Request("model", "default")


def spec(*minors: int, **linux: Any) -> dict[str, Any]:
    devices = [{**GPU, "path": f"/dev/nvidia{minor}", "minor": minor} for minor in minors]
    return {"linux": {"devices": devices, **linux}}


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "installed.so"
    path.write_bytes(b"the library")
    monkeypatch.setattr(installation, "device_memory", lambda: str(path))
    return path


def test_one_gpu(library: Path, tmp_path: Path) -> None:
    found = preload.provide(spec(0, 255), WANTED, str(tmp_path))
    assert found == preload.file(str(tmp_path))
    assert Path(found).read_bytes() == b"the library"
    assert stat.S_IMODE(Path(found).stat().st_mode) == 0o444


@pytest.mark.parametrize(
    ("bundle", "wanted"),
    [
        (spec(), WANTED),
        (spec(0, 1), WANTED),
        (spec(0, namespaces=[{"type": "user"}]), WANTED),
        (spec(0, uidMappings=[{"containerID": 0}]), WANTED),
        (spec(0), Request("model", "default", device_memory="off")),
    ],
    ids=["no GPU", "two GPUs", "user namespace", "mappings", "off"],
)
def test_none(library: Path, tmp_path: Path, bundle: dict[str, Any], wanted: Request) -> None:
    assert preload.provide(bundle, wanted, str(tmp_path)) is None
    library.unlink()
    assert preload.provide(spec(0), WANTED, str(tmp_path)) is None


def test_no_volume_is_looked_at(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may take the question and not answer; and who starts a container cold waits for nobody."""
    seen = []

    def device_at(path: str) -> tuple[int, int] | None:
        seen.append(path)
        return 195, 0

    monkeypatch.setattr(gpu_visible, "device_at", device_at)
    sources = ["/srv/models", "/dev/../srv/models", "/dev/nvidia0"]
    mounts = [{"type": "bind", "source": source, "destination": "/x"} for source in sources]
    assert preload.provide({"mounts": mounts}, WANTED, str(tmp_path)) is not None
    assert seen == ["/dev/nvidia0"]
