"""What every integration test has: a node of its own, and the proof that nothing is left behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.leftovers import Leftovers
from support.node import Node


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
