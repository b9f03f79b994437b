"""What of rewarm's own a container gets: when it starts cold all that is there, else what its snapshot had."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rewarm import additions, installation
from rewarm.errors import RestoreError
from rewarm.request import Request

WANTED = Request("model", "default")


def destinations(made: dict[str, Any]) -> list[str]:
    return [mount["destination"] for mount in made["mounts"]]


@pytest.fixture
def hooks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "hooks"
    path.mkdir()
    monkeypatch.setattr(installation, "hooks", lambda: str(path))
    return path


def test_a_cold_start_has_the_hook(hooks: Path, tmp_path: Path) -> None:
    made = additions.cold({"process": {"env": []}}, WANTED, str(tmp_path))
    assert destinations(made) == ["/run/rewarm", "/run/rewarm-hooks"]
    assert made["process"]["env"] == ["PYTHONPATH=/run/rewarm-hooks"]


def test_none_where_it_is_not_installed_or_could_not_be_mounted(hooks: Path, tmp_path: Path) -> None:
    users = {"linux": {"namespaces": [{"type": "user"}]}}
    assert destinations(additions.cold(users, WANTED, str(tmp_path))) == ["/run/rewarm"]
    hooks.rmdir()
    assert destinations(additions.cold({}, WANTED, str(tmp_path))) == ["/run/rewarm"]


def test_a_restore_has_what_the_snapshots_tree_has(hooks: Path, tmp_path: Path) -> None:
    for there in ([], ["/run/rewarm"], ["/run/rewarm", "/run/rewarm-hooks"]):
        assert destinations(additions.restored({}, [*there, "/proc"], str(tmp_path))) == there


def test_what_a_restore_lacks_is_named(hooks: Path, tmp_path: Path) -> None:
    hooks.rmdir()
    with pytest.raises(RestoreError, match=r"mount /run/rewarm-hooks: .* is not there; install rewarm again"):
        additions.restored({}, ["/run/rewarm-hooks"], str(tmp_path))
