"""Device memory is verified where it has arrived, by the GPU itself, or else before it is sent; what is wrong is read
once more, and what stays wrong never runs. The driver is tests/support/fake_cuda.c; a real one is in tests/gpu.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support import fake_gpu, faults
from support.bundle import Bundle
from support.fake_gpu import MOUNT_POINT
from support.gpu_containers import Place, place
from support.outcomes import said

MIB = 1 << 20
ANSWERS = {"LD_LIBRARY_PATH": MOUNT_POINT}
CHUNKS = 4 + 2 + 1
"""Of 8, 4 and 2 MiB."""


def served(where: Place, name: str) -> Bundle:
    return where.bundle(name, workload="gpu_served", env=ANSWERS)


@pytest.fixture
def captured(nothing_left_behind: None, tmp_path: Path, prefix: Path) -> Iterator[tuple[Place, Any]]:
    """A snapshot, the node's cache empty, and what the source has answered after it."""
    with place(tmp_path, prefix, cache=str(tmp_path / "cache")) as where:
        where.start("source", served(where, "source"))
        where.ask()
        where.node.rewarm("capture", "source", "--name", "model")
        following = where.ask()
        where.end("source")
        yield where, following


def notes(where: Place, name: str) -> dict[str, Any]:
    path = where.node.container_directory(name) / "trace.json"
    found: dict[str, Any] = json.loads(path.read_text())["otherData"]
    return found


def node_is(where: Place, *lines: str) -> None:
    where.gpus.node(fake_gpu.gpus(1), more=lines)


def is_warm(where: Place, following: Any, name: str = "copy") -> dict[str, Any]:
    """Restored, and right; what its trace notes."""
    where.start(name, served(where, name))
    outcome = where.node.outcome(name)
    assert outcome["outcome"] == "warm", outcome
    assert where.ask() == following
    found = notes(where, name)
    where.end(name)
    return found


def is_cold(where: Place, name: str, *parts: str) -> None:
    where.start(name, served(where, name))
    outcome = where.node.outcome(name)
    assert outcome["outcome"] == "cold", outcome
    said(outcome["reason"], *parts)
    where.ask()
    where.end(name)


def cached_pack(directory: Path, store: Path) -> Path:
    """The cache's copy of the pack with the device memory."""
    pack, _ = faults.memory_pack(store)
    (found,) = (directory / "cache").rglob(pack.digest)
    return found


def test_by_the_gpu(captured: tuple[Place, Any]) -> None:
    where, following = captured
    found = is_warm(where, following)
    assert found["verified_on_gpu"] is True
    assert "read_again" not in found


def test_a_driver_without_its_compiler(captured: tuple[Place, Any]) -> None:
    """What is not verified by the GPU is verified before it is sent."""
    where, following = captured
    (where.gpus.directory / "libnvidia-ptxjitcompiler.so.1").unlink()
    found = is_warm(where, following)
    assert "verified_on_gpu" not in found
    pack, path = faults.memory_pack(where.node.store)
    faults.flip(path, MIB)
    (copy,) = (where.node.directory.parent / "cache").rglob(pack.digest)
    copy.unlink()
    is_cold(where, "later", "read memory chunk", "its bytes are not what its digest says")


def test_a_compiler_that_fails(captured: tuple[Place, Any]) -> None:
    """By then chunks are on their way: all are read once more, and verified before they are sent."""
    where, following = captured
    node_is(where, "compiler none")
    found = is_warm(where, following)
    assert found["verified_on_gpu"] is False
    assert found["read_again"] == CHUNKS


def test_a_damaged_copy_in_the_cache(captured: tuple[Place, Any], tmp_path: Path) -> None:
    """The store has it still."""
    where, following = captured
    is_warm(where, following, "first")  # fills the cache
    copy = cached_pack(tmp_path, where.node.store)
    faults.flip(copy, MIB)
    found = is_warm(where, following)
    assert found["read_again"] == 1
    assert not list((tmp_path / "cache").rglob(copy.name)), "a copy that is wrong stays in the cache"
    assert "read_again" not in is_warm(where, following, "later")


def test_damaged_in_the_store(captured: tuple[Place, Any]) -> None:
    where, _ = captured
    _, path = faults.memory_pack(where.node.store)
    faults.flip(path, MIB)
    is_cold(where, "copy", "read memory chunk", "its bytes are not what its digest says")


@pytest.mark.parametrize("kernel", ["idle", "wrong"])
def test_a_gpu_that_does_not_find_what_was_sent(captured: tuple[Place, Any], kernel: str) -> None:
    """Nor does one that ends without a result: digests of before do not count."""
    where, following = captured
    node_is(where, f"kernel {kernel}")
    is_cold(where, "copy", "load device memory of GPU-", "is not there as it was sent")
    node_is(where)
    is_warm(where, following, "later")
