"""The checks of `rewarm doctor` of what decides how fast memory comes back: the cache of packs, and huge pages."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rewarm import doctor_memory
from rewarm.checks import OK, WARNING, Node
from rewarm.store import cache
from support.nodes import says, well, with_settings
from support.snapshots import tmpfs


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return well(tmp_path)


def test_no_cache(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    says(doctor_memory.cache(node), OK, "none: the store is not on a network")
    says(doctor_memory.cache(with_settings(node, cache="off")), OK, "off in the settings")


def test_cache_of_its_own(node: Node, tmp_path: Path) -> None:
    with tmpfs(tmp_path / "local", "size=8m,mode=700") as local:
        good = with_settings(node, cache=str(local / "deep" / "cache"), cache_size=4 * 10**6)
        says(doctor_memory.cache(good), OK, "up to 0.0 GB", "made when it is needed")
        (local / "deep" / "cache").mkdir(parents=True, mode=0o700)
        check = doctor_memory.cache(good)
        says(check, OK)
        assert "made when" not in check.found
        # What it holds already is a part of what it may take.
        (local / "deep" / "cache" / "pack").write_bytes(b"x" * (6 << 20))
        says(doctor_memory.cache(good), OK)
        says(doctor_memory.cache(with_settings(good, cache_size=10**9)), WARNING, "room for 0.0 GB", "`cache_size`")
        (local / "deep" / "cache").chmod(0o777)
        says(doctor_memory.cache(good), WARNING, "others than root", "chmod 700")


def test_cache_that_cannot_be(node: Node, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    says(doctor_memory.cache(with_settings(node, cache=str(tmp_path / "file"))), WARNING, "is not a directory")
    with tmpfs(tmp_path / "read-only", "ro,mode=700") as path:
        says(doctor_memory.cache(with_settings(node, cache=str(path / "c"))), WARNING, "Read-only file system")


def test_cache_beside_the_store(node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would save the share no reading."""
    says(doctor_memory.cache(with_settings(node, cache=str(tmp_path / "c"))), WARNING, "the store's own", "local disk")
    os.mkdir(node.settings.store, 0o700)
    for module in (cache, doctor_memory):
        monkeypatch.setattr(module, "file_system", lambda device: "nfs4")
    monkeypatch.setattr(cache, "DEFAULT", tmp_path / "c")
    says(doctor_memory.cache(node), WARNING, "the store's own file system (nfs4)")
    with tmpfs(tmp_path / "other", "mode=700") as path:
        says(doctor_memory.cache(with_settings(node, cache=str(path))), WARNING, "a network file system (nfs4)")


@pytest.mark.parametrize(
    ("text", "status", "says_"),
    [
        ("always [madvise] never\n", OK, "madvise"),
        ("[always] madvise never\n", OK, "always"),
        ("always madvise [never]\n", WARNING, "only are slower"),
        (None, WARNING, "CONFIG_TRANSPARENT_HUGEPAGE"),
    ],
)
def test_huge_pages(
    node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, status: str, says_: str
) -> None:
    path = tmp_path / "enabled"
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr(doctor_memory, "_ENABLED", str(path))
    says(doctor_memory.huge_pages(node), status, says_)
