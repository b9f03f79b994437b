"""A restored tree is in the new container's cgroup, with its limits and device rules; the source's stays gone."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from support import cgroups
from support.gpu.fleet import Fleet, Running
from support.gpu.sources import GIB, probe_device

LIMIT = 40 * GIB


@contextmanager
def watched(path: str) -> Iterator[set[Path]]:
    """The directories of a cgroup that are seen meanwhile, on any hierarchy."""
    seen: set[Path] = set()
    done = threading.Event()
    places = [hierarchy / path.lstrip("/") for hierarchy in cgroups.hierarchies()]

    def watch() -> None:
        while not done.wait(0.001):
            seen.update(place for place in places if place.exists())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


def other_limit(spec: dict[str, Any]) -> None:
    spec["linux"]["resources"]["memory"] = {"limit": LIMIT}


@pytest.mark.parametrize("source", ["limited"], indirect=True)
def test_the_new_containers_cgroup(fleet: Fleet, source: Running, figures: dict[str, Any]) -> None:
    device = probe_device()
    rule = b""
    figures["device"] = "none here to try the rules with"
    if device is not None:
        number = device.stat().st_rdev
        rule = f"c {os.major(number)} {os.minor(number)}".encode()
        allowed = source.ask("/open", body=rule)["open"]
        figures["device"] = [str(device), allowed]
        assert allowed != "Operation not permitted", "the source cannot open it either"
    expected = source.answers(2)
    source.ask("/reset")
    fleet.capture(source, "limited")
    source.stop()
    assert cgroups.processes(source.bundle.cgroup) == set()

    with watched(source.bundle.cgroup) as seen:
        copy = fleet.restore("copy-limited", source, "limited", change=other_limit)
        assert copy.answers(2) == expected
    assert seen == set(), "a cgroup of the source's name was made again"

    pids = set(copy.pids())
    assert cgroups.processes(copy.bundle.cgroup) == pids
    for pid in pids:
        lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
        assert not any(source.bundle.name in line for line in lines), lines
    if rule:
        assert copy.ask("/open", body=rule)["open"] == "Operation not permitted"
        code = (
            f"import os; os.mknod('/dev/probe', 0o20600, {device.stat().st_rdev if device else 0}); open('/dev/probe')"
        )
        done = copy.node.runtime.run("exec", copy.name, copy.bundle.spec["process"]["args"][0], "-c", code, check=False)
        assert "PermissionError" in done.stderr, done.stderr
    unified = Path("/sys/fs/cgroup/cgroup.controllers")
    if not unified.exists():
        pytest.skip("not run: the memory controller of cgroup v2 is not here")
    directory = Path("/sys/fs/cgroup") / copy.bundle.cgroup.lstrip("/")
    assert (directory / "cgroup.procs").read_text().split()
    assert Path(f"/proc/{copy.container.pid}/cgroup").read_text().strip().endswith(copy.bundle.cgroup)
    if not (directory / "memory.max").exists():
        pytest.skip(f"not run: no memory controller below {unified.parent}: {unified.read_text().strip()}")
    assert int((directory / "memory.max").read_text()) == LIMIT
    private = sum(anonymous(pid) for pid in pids)
    figures["memory"] = {"charged": int((directory / "memory.current").read_text()), "anonymous": private}
    assert figures["memory"]["charged"] >= private * 3 // 4, figures
    figures["freezer"] = (directory / "cgroup.freeze").read_text().strip()
    # The kernel's own word that the limit holds for these processes: nothing of them is charged elsewhere.
    assert "oom_kill 0" in (directory / "memory.events").read_text()


def anonymous(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    return 0
