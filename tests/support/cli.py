"""Calls of the `rewarm` command in this process, and a store for them to work on."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from click.testing import CliRunner, Result

import rewarm_hooks
from rewarm import cli
from rewarm.store.directory import DirectoryStore, SnapshotRef
from support.snapshots import FILES, write_snapshot


def filled_store(directory: Path) -> DirectoryStore:
    """A new store below `directory` with model (two snapshots), and other in namespace team."""
    store = DirectoryStore(str(directory / "store"))
    write_snapshot(store, directory / "w1", created="2026-01-01T00:00:00Z")
    write_snapshot(store, directory / "w2", {**FILES, "rootfs-diff.tar": b"new"}, created="2026-02-01T00:00:00Z")
    write_snapshot(store, directory / "w3", name="other", namespace="team")
    return store


def as_process(*words: str) -> list[str]:
    """The command line of `rewarm` as a process; it needs `environment()`."""
    return [sys.executable, "-m", "rewarm.cli", *words]


def environment() -> dict[str, str]:
    """This process's, in which a child imports the tree's sources as well, not those once installed beside pytest."""
    sources = (Path(cli.__file__).parents[2], Path(rewarm_hooks.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, sources))}


def call(*words: str) -> Result:
    return CliRunner().invoke(cli.main, words, prog_name="rewarm")


def on(store: DirectoryStore, *words: str) -> Result:
    return call(*words, "--store", str(store.root))


def newest(store: DirectoryStore) -> SnapshotRef:
    """The newest snapshot of model."""
    return store.candidates("default", "model")[0][0]


def spoil(path: Path, data: bytes) -> None:
    path.chmod(0o600)
    path.write_bytes(data)


def one_line(result: Result) -> str:
    """Standard error of a call that failed as a RewarmError does."""
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("rewarm: ") and result.stderr.count("\n") == 1
    return result.stderr
