"""Several hooks in one process: as a restore starts them, and what becomes of the others when one fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rewarm import hook
from rewarm_hooks import series
from support.tars import END, file, symlink

STATE = {"ociVersion": "1.0.2", "id": "c", "status": "creating", "pid": 1}


class Call:
    """A root filesystem, a layer for it, and a container whose GPUs are none: what both hooks need."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.root = directory / "rootfs"
        self.record = directory / "map.json"
        self.root.mkdir()
        (directory / "layer").write_bytes(file(b"new") + END)
        (directory / "bundle").mkdir()
        (directory / "bundle/config.json").write_text("{}")
        for name in ("sources", "node"):
            (directory / f"{name}.json").write_text("[]")
        self.diff = ["rootfs-diff", "apply"]
        self.diff += ["--layer", f"{directory}/layer", "--root", str(self.root), "--undo", f"{directory}/undo"]
        self.remap = ["device-remap", "--sources", f"{directory}/sources.json", "--node", f"{directory}/node.json"]
        self.remap += ["--record", str(self.record)]

    def run(self, *hooks: list[str]) -> subprocess.CompletedProcess[str]:
        state = json.dumps({**STATE, "bundle": str(self.directory / "bundle"), "annotations": {"a": "x" * 100_000}})
        words = hook.words(*hooks)
        return subprocess.run(words, input=state, capture_output=True, text=True, check=False, timeout=60, cwd="/")


@pytest.fixture
def call(tmp_path: Path) -> Call:
    return Call(tmp_path)


def test_both(call: Call) -> None:
    done = call.run(call.diff, call.remap)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (call.root / "new").read_text() == "planted"
    assert json.loads(call.record.read_text()) == {"version": 1, "devices": []}


@pytest.mark.parametrize("which", ["diff", "remap"])
def test_one(call: Call, which: str) -> None:
    done = call.run(getattr(call, which))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (call.root / "new").exists() == (which == "diff")
    assert call.record.exists() == (which == "remap")


def test_the_first_failure_ends_it(call: Call) -> None:
    (call.directory / "layer").write_bytes(symlink(b"evil", b"/etc") + file(b"evil/passwd") + END)
    done = call.run(call.diff, call.remap)
    assert done.returncode == 1
    assert done.stderr == "rootfs-diff: evil/passwd: an entry in evil, which the layer makes a file of\n"
    assert not call.record.exists()


def test_a_later_failure_is_the_status(call: Call) -> None:
    (call.directory / "node.json").write_text("{")
    done = call.run(call.diff, call.remap)
    assert done.returncode == 1
    assert done.stderr.startswith(f"device-remap: {call.directory}/node.json: ")
    assert (call.root / "new").exists()  # who asked for the restore undoes it


@pytest.mark.parametrize("name", ["", "rootfs_diff", "--", "apply"])
def test_a_hook_that_is_none(call: Call, name: str) -> None:
    done = call.run([name, *call.diff[1:]], call.remap)
    shown = "" if name == "--" else name
    assert done.returncode == 1
    assert done.stderr == f"series: no hook {shown!r}; device-remap and rootfs-diff are known\n"
    assert os.listdir(call.root) == []


@pytest.mark.parametrize(
    ("arguments", "hooks"),
    [
        ([], [[""]]),
        (["a"], [["a"]]),
        (["a", "b", "--", "c", "--d"], [["a", "b"], ["c", "--d"]]),
        (["a", "--"], [["a"], [""]]),
        (["--", "a"], [[""], ["a"]]),
    ],
)
def test_splitting(arguments: list[str], hooks: list[list[str]]) -> None:
    assert series.split(arguments) == hooks


def test_only_what_is_asked_for_is_imported(call: Call) -> None:
    """It stands in the path of every restore; `-S` has to leave the hooks all that they need."""
    for one, other in ((call.diff, "device_remap"), (call.remap, "rootfs_diff")):
        words = hook.words(one)
        assert words[:4] == [sys.executable, "-I", "-S", "-c"]
        words[4] = f"import atexit, sys; atexit.register(lambda: print(*sys.modules)); {words[4]}"
        state = json.dumps({**STATE, "bundle": str(call.directory / "bundle")})
        done = subprocess.run(words, input=state, capture_output=True, text=True, check=True, timeout=60)
        found = set(done.stdout.split())
        assert f"rewarm_hooks.{one[0].replace('-', '_')}" in found
        heavy = {"site", "typing", "dataclasses", "pathlib", "subprocess", "rewarm"}
        assert not found & {f"rewarm_hooks.{other}", *heavy}
