"""Captures, restores and gc killed at a hundred random moments, on one store and one cache: all of it stays right."""

from __future__ import annotations

import json
import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rewarm.store.directory import DirectoryStore
from support import carving, counter, faults
from support.bundle import Bundle
from support.carving import Snapshot, end, is_right, nothing_remains_of, works
from support.node import Node
from support.proc import command_line, descendants, reap_orphans, wait_for
from support.runtime import Container
from support.snapshots import tree

KILLS = 100
GONE = 15.0
"""Seconds after a kill within which what was begun is undone."""


class Killer:
    """A node with a snapshot to restore and a container to capture, and the length of what is to be killed."""

    def __init__(self, node: Node, seed: int) -> None:
        self.node = node
        self.random = random.Random(seed)
        self.store = DirectoryStore(str(node.store))
        self.snapshot: Snapshot = carving.captured(node, 8)
        made = counter.bundle(node.directory / "victim", {}, env={"PYTHONHASHSEED": "0", "MIB": "12"})
        made.spec["annotations"]["rewarm.dev/snapshot"] = "victim"
        made.write()
        self.victim: Container = counter.run(node.runtime, "victim", made)
        self.lengths = {"capture": self._timed("capture", "victim", "--name", "victim"), "gc": self._timed("gc")}
        began = time.monotonic()
        works(node, self.snapshot, "measured")
        # Without the program's own start and end.
        self.lengths["restore"] = (time.monotonic() - began) / 2
        self._forget_captures()

    def _timed(self, *words: str) -> float:
        began = time.monotonic()
        self.node.rewarm(*words)
        return time.monotonic() - began

    def _forget_captures(self) -> bool:
        """Remove what a capture that was complete has published, so that the next one has everything to write."""
        found = self.store.list()
        for ref in found:
            if ref.name == "victim":
                self.store.remove(ref)
        return len(found) > 1

    def kill(self, process: subprocess.Popen[bytes], kind: str) -> None:
        """At some moment of its length; or it has just ended."""
        time.sleep(self.lengths[kind] * self.random.random())
        process.kill()
        process.wait()

    def tool(self, *words: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [self.node.prefix / "bin" / "rewarm", *words],
            env={**os.environ, **self.node.env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def capture(self, number: int) -> str:
        """The source counts on, and holds what it held."""
        self.kill(self.tool("capture", "victim", "--name", "victim"), "capture")
        seen = counter.numbers(self.victim)[-1]
        self.victim.stdout.wait_text(f"\n{seen + 2} ")
        assert len(counter.hashes(self.victim)) == 1
        return "complete" if self.random.random() < 0.7 and self._forget_captures() else "killed"

    def restore(self, number: int) -> str:
        """Nothing is left of it, or it is complete and right; or the next create comes at once."""
        name = f"copy-{number}"
        made = self.snapshot.bundle(self.node.directory / name)
        before = faults.Before(made)
        process, _ = self.node.runtime.spawn("create", name, made)
        self.kill(process, "restore")
        at_once = number % 3 == 0 and process.returncode != 0 and not self.complete(name)
        if at_once:
            self.node.runtime.create(name, made)
            assert is_right(self.node, self.snapshot, name) == "warm", self.node.outcome(name)
            end(self.node, name)
        else:
            wait_for("the end of what was begun", lambda: self.settled(name, made), timeout=GONE)
            if not self.complete(name):
                if faults.remains(self.node, name, made):
                    # Killed before there was a guard: what a shim does next takes the container directory away.
                    self.node.runtime.run("delete", "--force", name, check=False)
                nothing_remains_of(self.node, made, name)
                before.check_files()
                before.check_config()
                return "killed"
            self.node.runtime.settle(self.node.runtime.containers[name])
            assert is_right(self.node, self.snapshot, name) == "warm"
            self.node.runtime.delete(name, force=True)
            reap_orphans()
        nothing_remains_of(self.node, made, name)
        return "at once" if at_once else "complete"

    def settled(self, name: str, made: Bundle) -> bool:
        reap_orphans()
        # Before the guard is there, nothing is changed but the container directory, which the next create takes away.
        left = [line for line in faults.remains(self.node, name, made) if not line.startswith(str(self.node.state))]
        return not self.guards(name) and (self.complete(name) or not left)

    def complete(self, name: str) -> bool:
        try:
            record = json.loads((self.node.container_directory(name) / "record.json").read_text())
        except FileNotFoundError:
            return False
        return record["phase"] == "restored" and not self.guards(name)

    def guards(self, name: str) -> list[int]:
        directory = str(self.node.container_directory(name))
        return [pid for pid in descendants(os.getpid()) if f"rewarm.recover {directory}" in command_line(pid)]

    def gc(self, number: int) -> str:
        """With packs of nobody's, beside what killed captures have left."""
        for index in range(50):
            path = self.store.root / "v1" / "packs" / "ab" / f"ab{number:04x}{index:058x}"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(b"nobody's")
        self.kill(self.tool("gc"), "gc")
        return "complete" if not path.exists() else "killed"


@pytest.fixture
def killer(nothing_left_behind: None, tmp_path: Path, prefix: Path) -> Iterator[Killer]:
    seed = int(os.environ.get("REWARM_TEST_SEED") or random.randrange(1 << 32))
    print(f"REWARM_TEST_SEED={seed}")
    with Node(tmp_path / "node", prefix, cache=str(tmp_path / "cache")) as node:
        yield Killer(node, seed)


def test_a_hundred_kills(killer: Killer, tmp_path: Path) -> None:
    node = killer.node
    kinds: tuple[Callable[[int], str], ...]
    kinds = (killer.capture, killer.restore, killer.gc, killer.restore, killer.capture)
    ended: dict[str, int] = {}
    for number in range(KILLS):
        kind = kinds[number % len(kinds)]
        how = f"{kind.__name__} {kind(number)}"
        ended[how] = ended.get(how, 0) + 1
        if number % 10 == 9:
            assert list(killer.store.verify()) == [], number
    print(ended)
    assert sum(count for how, count in ended.items() if how.endswith("killed")) > KILLS / 3
    assert node.rewarm("verify").returncode == 0
    # What they left goes, and all of it works.
    node.rewarm("capture", "victim", "--name", "victim")
    node.rewarm("gc")
    assert [path for path in tree(node.store) if path.startswith("v1/tmp")] == []
    _check_packs(killer.store)
    assert list((node.directory / "work").iterdir()) == []
    works(node, killer.snapshot, "last")
    made = counter.bundle(node.directory / "again", {"rewarm.dev/snapshot": "victim"}, env=killer.snapshot.env)
    node.runtime.create("again", made)
    assert node.outcome("again")["outcome"] == "warm", node.outcome("again")
    node.runtime.start("again")
    node.runtime.containers["again"].stdout.wait_text("\n")
    assert counter.hashes(node.runtime.containers["again"]) == counter.hashes(killer.victim)
    end(node, "again")
    assert list((tmp_path / "cache" / "v1" / "tmp").iterdir()) == []
    assert list((tmp_path / "cache" / "v1" / "locks").iterdir()) == []


def _check_packs(store: DirectoryStore) -> None:
    """Every pack is one that a manifest names."""
    named = set()
    for ref in store.list():
        manifest = store.load(ref)
        named |= {entry.pack for entry in manifest.files} | {pack.digest for pack in manifest.packs}
    assert {path.name for path in (store.root / "v1" / "packs").glob("*/*")} == named
