"""A share that is slow, hangs, breaks off or vanishes, before and in the middle of a restore: a cold start in time."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support import carving, faults
from support.bundle import Bundle
from support.carving import Snapshot, end, goes_on_right, nothing_remains_of, stays_cold
from support.node import Node
from support.outcomes import said
from support.proc import descendants, state_of, wait_for
from support.share import Share
from support.snapshots import MIB

DEADLINE = 2.0
GRACE = 5.0
"""Seconds that clean-up and runc may take after the deadline, on a busy machine."""
RATE = 6 * MIB


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory, prefix: Path) -> Iterator[Snapshot]:
    """20 MiB to read, 3 seconds at RATE. Not to be changed."""
    with Node(tmp_path_factory.mktemp("captured"), prefix) as node:
        yield carving.captured(node, 10)


@pytest.fixture(scope="module")
def vast(tmp_path_factory: pytest.TempPathFactory, prefix: Path) -> Iterator[Snapshot]:
    """With a large file, which takes its time to be copied."""
    with Node(tmp_path_factory.mktemp("vast"), prefix) as node:
        yield carving.captured(node, 4, diff_mib=65)


@contextmanager
def shared(
    tmp_path: Path, prefix: Path, snapshot: Snapshot, rate: int = 0, cache: str = "off", deadline: float = DEADLINE
) -> Iterator[tuple[Share, Node]]:
    """A node that sees the snapshot's store as a share."""
    with (
        Share(snapshot.store, tmp_path / "share", rate=rate) as share,
        Node(tmp_path / "node", prefix, store=share.target, cache=cache, deadline=deadline) as node,
    ):
        yield share, node


@pytest.fixture(params=["no cache", "cache"])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return "off" if request.param == "no cache" else str(tmp_path / "cache")


def test_as_it_should_be(tmp_path: Path, prefix: Path, snapshot: Snapshot, cache: str) -> None:
    with shared(tmp_path, prefix, snapshot, RATE, cache, 30) as (_, node):
        carving.works(node, snapshot)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("hang", "the deadline of 2 s passed during find"),
        ("vanish", "find snapshot default/counter: there is none in the store"),
        ("break_off", "not connected"),
    ],
)
def test_before(tmp_path: Path, prefix: Path, snapshot: Snapshot, how: str, reason: str) -> None:
    with shared(tmp_path, prefix, snapshot) as (share, node):
        made = snapshot.bundle(node.directory / "copy")
        getattr(share, how)()
        began = time.monotonic()
        stays_cold(node, made, reason)
        assert time.monotonic() - began < DEADLINE + GRACE


@pytest.mark.parametrize("part", [0.02, 0.3, 0.7])
@pytest.mark.parametrize("how", ["hang", "vanish", "break_off"])
def test_in_the_middle(tmp_path: Path, prefix: Path, snapshot: Snapshot, how: str, part: float) -> None:
    with shared(tmp_path, prefix, snapshot, RATE, deadline=4) as (share, node):
        made = snapshot.bundle(node.directory / "copy")
        before = faults.Before(made)
        began = time.monotonic()
        process, container = node.runtime.spawn("create", "copy", made)
        wait_for("reading", lambda: share.read_so_far() > part * 20 * MIB, interval=0.001)
        getattr(share, how)()
        assert process.wait(30) == 0
        assert time.monotonic() - began < 4 + GRACE
        node.runtime.settle(container)
        outcome = node.outcome("copy")
        if how == "hang":
            said(outcome["reason"], "the deadline of 4 s passed during")
        elif how == "break_off":
            assert "pack" in outcome["reason"] or "open store" in outcome["reason"], outcome
        # What is open when its mount vanishes can be read to the end.
        assert outcome["outcome"] == "cold" or how == "vanish", outcome
        finish(node, snapshot, made, before)


def finish(node: Node, snapshot: Snapshot, made: Bundle, before: faults.Before) -> None:
    """Nothing of the store's is needed any more: the container is there, runs as it should, and goes."""
    container = node.runtime.containers["copy"]
    threads = [pid for pid in descendants(os.getpid()) if state_of(pid) == "D"]
    assert threads == [], "something still waits for the share"
    if node.outcome("copy")["outcome"] == "cold":
        before.check_files(mount_points=True)
        node.runtime.start("copy")
        assert container.stdout.wait_text("\n2 ").startswith("ready\n1 ")
    else:
        node.runtime.start("copy")
        goes_on_right(container, snapshot)
    end(node, "copy")
    nothing_remains_of(node, made, "copy")


def test_hangs_while_the_cache_is_filled(tmp_path: Path, prefix: Path, snapshot: Snapshot) -> None:
    """The pack that was being fetched is nobody's then; the next restore fetches it."""
    cache = tmp_path / "cache"
    with shared(tmp_path, prefix, snapshot, RATE, str(cache)) as (share, node):
        made = snapshot.bundle(node.directory / "copy")
        process, container = node.runtime.spawn("create", "copy", made)
        wait_for("fetching", lambda: list((cache / "v1" / "tmp").glob("*")), interval=0.001)
        share.hang()
        assert process.wait(DEADLINE + GRACE) == 0
        node.runtime.settle(container)
        said(node.outcome("copy")["reason"], "the deadline of 2 s passed during")
        share.go_on()
        end(node, "copy")
        node.configure(cache=str(cache), deadline=30)
        carving.works(node, snapshot, "next")
        assert list((cache / "v1" / "tmp").glob("*")) == []
        before = share.read_so_far()
        carving.works(node, snapshot, "last")
        assert share.read_so_far() - before < MIB


def test_too_slow(tmp_path: Path, prefix: Path, snapshot: Snapshot) -> None:
    """It does not hang, and what reads it goes on for a while: it must not write where others clean up."""
    with shared(tmp_path, prefix, snapshot, 256 << 10, deadline=1) as (_, node):
        stays_cold(node, snapshot.bundle(node.directory / "copy"), "the deadline of 1 s passed during")


def test_too_slow_for_files(tmp_path: Path, prefix: Path, vast: Snapshot) -> None:
    with shared(tmp_path, prefix, vast, 4 * MIB, deadline=1.5) as (_, node):
        stays_cold(node, vast.bundle(node.directory / "copy"), "the deadline of 1.5 s passed during")
