"""What CRIU takes from the images, and the live spec says otherwise: OOM scores and resource limits."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rewarm import processes
from rewarm.limits import limit

# Two processes, one below the other, with scores and a limit of open files that the test chooses.
PROGRAM = """
import json, os, resource, subprocess, sys
scores, files = json.loads(sys.argv[1])
open("/proc/self/oom_score_adj", "w").write(str(scores.pop(0)))
resource.setrlimit(resource.RLIMIT_NOFILE, files)
if scores:
    subprocess.run([sys.executable, "-c", sys.argv[2], json.dumps([scores, files]), sys.argv[2]])
else:
    print("there", flush=True)
    sys.stdin.read()
"""


class Tree:
    def __init__(self, scores: list[int], files: tuple[int, int] = (512, 1024)) -> None:
        words = [sys.executable, "-c", PROGRAM, json.dumps([scores, files]), PROGRAM]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None and self.process.stdout.readline() == "there\n"
        self.pids = processes.tree(self.process.pid)

    def limit(self, **process: Any) -> list[str]:
        return limit({"process": process}, self.process.pid)

    @property
    def scores(self) -> list[int]:
        return [int(Path(f"/proc/{pid}/oom_score_adj").read_text()) for pid in self.pids]

    @property
    def files(self) -> set[tuple[int, int]]:
        return {resource.prlimit(pid, resource.RLIMIT_NOFILE) for pid in self.pids}

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@pytest.fixture
def made() -> Iterator[list[Tree]]:
    trees: list[Tree] = []
    yield trees
    for tree in trees:
        tree.end()


@pytest.mark.parametrize(
    ("before", "wanted", "after"),
    [
        ([500, 500], 700, [700, 700]),
        ([500, 500], 300, [300, 300]),  # a replica of a better class than the source
        ([500, 900], 700, [700, 900]),  # the program has given its child a worse one itself
        ([500, 600], 700, [700, 700]),  # none is better than the spec's
        ([500, 900], None, [500, 900]),
        ([500, 500], 0, [0, 0]),  # CRIU does not write it
    ],
)
def test_scores(made: list[Tree], before: list[int], wanted: int | None, after: list[int]) -> None:
    tree = Tree(list(before))
    made.append(tree)
    assert tree.limit(**({} if wanted is None else {"oomScoreAdj": wanted})) == []
    assert tree.scores == after


def test_a_score_that_takes_a_capability(made: list[Tree], monkeypatch: pytest.MonkeyPatch) -> None:
    tree = Tree([500, 500])
    made.append(tree)
    status = Path("/proc/self/status").read_text()
    allowed = int(status.split("CapEff:")[1].split()[0], 16) >> 24 & 1
    notes = tree.limit(oomScoreAdj=-1000)
    if allowed:
        assert notes == [] and tree.scores == [-1000, -1000]
    else:
        assert "has the OOM score 500, not the -1000 of its spec" in notes[0] and tree.scores == [500, 500]


@pytest.mark.parametrize(
    ("entries", "after"),
    [
        ([], (512, 1024)),
        ([{"type": "RLIMIT_NOFILE", "soft": 64, "hard": 4096}], (512, 1024)),  # the program may have fewer
        ([{"type": "RLIMIT_NOFILE", "soft": 64, "hard": 600}], (512, 600)),
        ([{"type": "RLIMIT_NOFILE", "soft": 64, "hard": 100}], (100, 100)),
        ([{"type": "RLIMIT_NOFILE", "soft": 64, "hard": 2**64 - 1}], (512, 1024)),
        ([{"type": "RLIMIT_OTHER", "soft": 1, "hard": 1}], (512, 1024)),
    ],
)
def test_open_files(made: list[Tree], entries: list[dict[str, Any]], after: tuple[int, int]) -> None:
    tree = Tree([500, 500])
    made.append(tree)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert tree.limit(rlimits=entries) == []
    assert tree.files == {after}
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == before


def test_what_the_spec_does_not_name_is_as_in_a_cold_start(made: list[Tree]) -> None:
    """What rewarm has itself: an image may ask for more."""
    tree = Tree([500, 500])
    made.append(tree)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    script = (
        "import resource, sys; from rewarm.limits import limit; "
        "resource.setrlimit(resource.RLIMIT_NOFILE, (100, 200)); limit({}, int(sys.argv[1]))"
    )
    subprocess.run(
        [sys.executable, "-c", script, str(tree.process.pid)], check=True, env={"PYTHONPATH": ":".join(sys.path)}
    )
    assert tree.files == {(200, 200)} and resource.getrlimit(resource.RLIMIT_NOFILE) == before


def test_without_a_score_in_the_spec_none_is_below_what_a_cold_start_inherits(made: list[Tree]) -> None:
    """An image may ask for -1000."""
    tree = Tree([500, 600])
    made.append(tree)
    script = (
        "import sys; from rewarm.limits import limit; "
        "open('/proc/self/oom_score_adj', 'w').write('550'); assert limit({}, int(sys.argv[1])) == []"
    )
    words = [sys.executable, "-c", script, str(tree.process.pid)]
    subprocess.run(words, check=True, env={"PYTHONPATH": ":".join(sys.path)})
    assert tree.scores == [550, 600]
