"""What every integration test has: a node of its own, and the proof that nothing is left behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.bare_node import BareNode
from support.kube_api import KubeApi
from support.leftovers import Leftovers
from support.node import Node
from support.node_image import NodeImage


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Mounts, cgroups, network namespaces and processes after the test are those from before it."""
    before = Leftovers.now()
    yield
    before.check()


@pytest.fixture
def node(nothing_left_behind: None, tmp_path: Path, prefix: Path) -> Iterator[Node]:
    with Node(tmp_path / "node", prefix) as one:
        yield one


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory, prefix: Path) -> Iterator[NodeImage]:
    with NodeImage(Node(tmp_path_factory.mktemp("image") / "node", prefix)) as podman:
        podman.build()
        podman.first_container()
        yield podman


@pytest.fixture
def machine(nothing_left_behind: None, tmp_path: Path) -> Iterator[BareNode]:
    with BareNode(tmp_path / "machine") as one:
        yield one


@pytest.fixture
def api(nothing_left_behind: None, tmp_path: Path) -> Iterator[KubeApi]:
    with KubeApi(tmp_path / "account", "node-1", {"kubernetes.io/hostname": "node-1"}) as one:
        yield one
