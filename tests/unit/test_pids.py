"""Where the process ids of a container begin that shares a pid namespace."""

from __future__ import annotations

import subprocess
from pathlib import Path

from rewarm import pids

LOWEST_LIMIT = 32768
"""Of process ids that a node can have: kernel.pid_max where there are few processors."""


def test_places_are_within_what_every_node_has() -> None:
    found = {pids.first(f"snapshot-{number}") for number in range(1000)}
    assert len(found) == 28 and min(found) > 1000 and max(found) + 1024 < LOWEST_LIMIT
    assert pids.first("llama") == pids.first("llama") != pids.first("ocr"), "other places for other names"


def test_the_nodes_own_namespace_is_left_alone() -> None:
    before = int(Path("/proc/sys/kernel/ns_last_pid").read_text())
    place = pids.first("llama")
    for namespaces in ([], [{"type": "pid"}], [{"type": "pid", "path": "/proc/self/ns/pid"}]):
        pids.begin({"linux": {"namespaces": namespaces}}, "llama")
    with subprocess.Popen(["true"]) as child:
        assert child.pid != place or before in range(place - 50, place), "the node's next process is at the place"
