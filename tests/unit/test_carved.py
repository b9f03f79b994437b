"""How much of a snapshot's memory may be read before there are processes for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from rewarm import carved, slots
from rewarm.oci import cgroups
from rewarm.settings import Settings


@pytest.mark.parametrize(
    ("rooms", "expected"), [([], 1000), ([5000], 1000), ([900, 5000], 300), ([300], 0), ([200, 900], 0)]
)
def test_half_of_what_a_limit_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rooms: list[int], expected: int
) -> None:
    """rewarm may be in the pod's cgroup, where the container's memory is charged as well."""
    monkeypatch.setattr(cgroups, "memory_rooms", lambda directories: ((room, "x") for room in rooms))
    assert carved._ahead(Settings(state_dir=str(tmp_path), read_ahead=1000), 300) == expected


def test_nothing_without_a_slot(tmp_path: Path) -> None:
    settings = Settings(state_dir=str(tmp_path), read_ahead=1000)
    assert [carved._ahead(settings, 0) > 0 for _ in range(slots.COUNT + 1)] == [True] * slots.COUNT + [False]
