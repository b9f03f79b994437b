"""What a new pod has not as its source's had it: the image behind its tag, what was on its volumes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from support import image, rootfs
from support.leftovers import Leftovers
from support.pods import KubeNode
from support.proc import wait_for

TAG = "rewarm.test/moving:latest"
PROGRAM = """
import sys, time
sys.path.insert(0, '/app')
import version
open('/run/rewarm/ready', 'w').close()
while True:
    print(version.V, flush=True)
    time.sleep(0.05)
"""


@pytest.fixture(scope="module")
def kube(tmp_path_factory: pytest.TempPathFactory, prefix: Path) -> Iterator[KubeNode]:
    before = Leftovers.now()
    with KubeNode(tmp_path_factory.mktemp("kube"), prefix) as made:
        made.import_image(image.workload("pod_server")[0])
        made.remove(made.pod("first"))  # the engine's cgroup stays, and is none that a test leaves
        yield made
    before.check()


@pytest.fixture
def clean(kube: KubeNode) -> Iterator[KubeNode]:
    yield kube
    kube.remove_all()


def moved(kube: KubeNode, directory: Path, version: str) -> None:
    """The tag names an image of this version from now on; its file has the size and mode of the others."""
    layer = directory / version
    (layer / "app").mkdir(parents=True)
    (layer / "app/version.py").write_text(f"V = {version!r}\n")
    os.utime(layer / "app/version.py", (0, 1_700_000_000 + int(version)))
    layers = [*rootfs.layers("pod_server"), layer]
    archive = image.pack(directory / f"{version}.tar", TAG, layers, env=rootfs.env("pod_server"))
    kube.import_image(archive)


def test_a_moved_tag(clean: KubeNode, tmp_path: Path) -> None:
    """Each version's own snapshot, also when the tag is back at the first."""
    outcomes = {}
    for turn, version in enumerate(["1", "2", "2", "1"]):
        if turn in (0, 1, 3):
            moved(clean, tmp_path / str(turn), version)
        pod = clean.pod(f"moving-{turn}", annotations={"rewarm.dev/snapshot": "auto", "rewarm.dev/capture": "on-ready"})
        container = clean.container(pod, "server", TAG, ["python3", "-u", "-c", PROGRAM])
        outcomes[turn] = clean.outcome(container)
        wait_for("a line", partial(clean.log, pod, "server"))
        assert set(clean.log(pod, "server").split()) == {version}
        if outcomes[turn]["outcome"] == "cold":
            clean.wait_captured(container)
        clean.remove(pod)
    assert [outcomes[turn]["outcome"] for turn in range(4)] == ["cold", "cold", "warm", "warm"], outcomes
    assert "snapshot was taken of another image of that name" in outcomes[1]["reason"]
