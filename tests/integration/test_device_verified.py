"""Device memory is verified where it has arrived, by the GPU itself, or else before it is sent; what is wrong is read
once more, and what stays wrong never runs. The driver is tests/support/fake_cuda.c; a real one is in tests/gpu.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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


def served(where: Place, name: str, env: Mapping[str, str] | None = None) -> Bundle:
    return where.bundle(name, workload="gpu_served", env={**ANSWERS, **(env or {})})


Made = tuple[Place, Any]


@contextmanager
def made(tmp_path: Path, prefix: Path, cache: str) -> Iterator[Made]:
    """A snapshot, the node's cache empty, and what the source has answered after it."""
    # Else it is the disk that decides which pack is the largest, and what is where in it.
    with place(tmp_path, prefix, cache=cache, compression="off") as where:
        where.start("source", served(where, "source"))
        where.ask()
        where.node.rewarm("capture", "source", "--name", "model")
        following = where.ask()
        where.end("source")
        yield where, following


@pytest.fixture
def captured(nothing_left_behind: None, tmp_path: Path, prefix: Path) -> Iterator[Made]:
    """On a node with a cache."""
    with made(tmp_path, prefix, str(tmp_path / "cache")) as found:
        yield found


@pytest.fixture
def uncached(nothing_left_behind: None, tmp_path: Path, prefix: Path) -> Iterator[Made]:
    """On a node without one: nothing is verified on its way into the cache."""
    with made(tmp_path, prefix, "off") as found:
        yield found


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
    (found,) = (directory / "cache").rglob(faults.device_pack(store).name)
    return found


def damage(where: Place) -> None:
    """In the store."""
    faults.flip(faults.device_pack(where.node.store), MIB)


DAMAGED = ("read memory chunk", "its bytes are not what its digest says")


def test_by_the_gpu(uncached: Made) -> None:
    found = is_warm(*uncached)
    assert found["verified_on_gpu"] is True
    assert "read_again" not in found


def test_more_than_the_buffers_hold(nothing_left_behind: None, tmp_path: Path, prefix: Path) -> None:
    """One thread, whose buffers are used again and again: none before it was sent, and no chunk counts before it is
    there (the fake's copies happen as late as they may)."""
    sizes = {"SERVED_MIB": "64,8,18"}
    with place(tmp_path, prefix, cache="off", threads=1) as where:
        where.start("source", served(where, "source", sizes))
        where.ask()
        where.node.rewarm("capture", "source", "--name", "model")
        following = where.ask()
        where.end("source")
        where.start("copy", served(where, "copy", sizes))
        assert where.node.outcome("copy")["outcome"] == "warm", where.node.outcome("copy")
        assert where.ask() == following
        found = notes(where, "copy")
        assert found["verified_on_gpu"] is True and "read_again" not in found


def test_damaged_in_the_store(uncached: Made) -> None:
    where, _ = uncached
    damage(where)
    is_cold(where, "copy", *DAMAGED)


def test_a_damaged_copy_in_the_cache(captured: Made, tmp_path: Path) -> None:
    """The store has it still."""
    where, following = captured
    is_warm(where, following, "first")  # fills the cache
    copy = cached_pack(tmp_path, where.node.store)
    faults.flip(copy, MIB)
    found = is_warm(where, following)
    assert found["verified_on_gpu"] is True
    assert found["read_again"] == 1
    assert not list((tmp_path / "cache").rglob(copy.name)), "a copy that is wrong stays in the cache"
    assert "read_again" not in is_warm(where, following, "later")


def without_compiler(where: Place) -> None:
    (where.gpus.directory / "libnvidia-ptxjitcompiler.so.1").unlink()


def test_without_the_compiler(uncached: Made) -> None:
    """What the GPU does not verify is verified before it is sent."""
    where, following = uncached
    without_compiler(where)
    assert "verified_on_gpu" not in is_warm(where, following)
    damage(where)
    is_cold(where, "later", *DAMAGED)


def test_without_the_compiler_and_a_damaged_copy(captured: Made, tmp_path: Path) -> None:
    where, following = captured
    without_compiler(where)
    is_warm(where, following, "first")
    copy = cached_pack(tmp_path, where.node.store)
    faults.flip(copy, MIB)
    assert "read_again" not in is_warm(where, following)
    assert not list((tmp_path / "cache").rglob(copy.name))


@pytest.mark.parametrize("line", ["compiler none", "kernel idle", "kernel wrong"])
def test_a_kernel_that_cannot_be_had_or_does_not_reckon_right(uncached: Made, line: str) -> None:
    """By then chunks are on their way: all are read once more, and verified before they are sent."""
    where, following = uncached
    node_is(where, line)
    shutil.rmtree(where.node.state / "kernels")  # the capture's
    found = is_warm(where, following)
    assert found["verified_on_gpu"] is False
    assert found["read_again"] == CHUNKS
    damage(where)
    is_cold(where, "later", *DAMAGED)


def test_a_kernel_that_the_capture_has_kept(uncached: Made) -> None:
    """Nobody has to compile it then. One that goes bad is thrown away, and made anew when that can be."""
    where, following = uncached
    node_is(where, "compiler none")
    assert is_warm(where, following, "first")["verified_on_gpu"] is True
    (kept,) = (where.node.state / "kernels").iterdir()
    faults.flip(kept, 100)
    node_is(where)
    assert is_warm(where, following, "second")["verified_on_gpu"] is True
    node_is(where, "compiler none")
    assert is_warm(where, following, "third")["verified_on_gpu"] is True


@pytest.mark.parametrize("kernel", ["idle-later", "wrong-later"])
def test_a_gpu_that_does_not_find_what_was_sent(uncached: Made, kernel: str) -> None:
    where, following = uncached
    node_is(where, f"kernel {kernel}")
    is_cold(where, "copy", "load device memory of GPU-", "is not there as it was sent")
    node_is(where)
    is_warm(where, following, "later")
