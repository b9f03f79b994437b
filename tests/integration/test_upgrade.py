"""An upgrade while a restore runs: what has begun ends with the modules of its own version."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import faults
from support.node import Node
from support.proc import CommandFailed, command, wait_for

NATIVE = Path(__file__).parents[2] / "native"


@pytest.fixture
def upgradable(nothing_left_behind: None, tmp_path: Path, prefix: Path) -> Iterator[Node]:
    """A node with a prefix of its own, and this checkout's launcher."""
    own = tmp_path / "prefix"
    shutil.copytree(prefix, own, symlinks=True)
    command("make", "-s", "-C", NATIVE, f"BUILD={tmp_path / 'build'}", f"{tmp_path / 'build'}/rewarm-runc")
    shutil.copy2(tmp_path / "build/rewarm-runc", own / "bin/rewarm-runc")
    with Node(tmp_path / "node", own) as node:
        yield node


def upgrade(prefix: Path) -> None:
    """As install.sh does it: a directory beside the old one, and the link renamed. No module of it can be imported."""
    new = prefix / "venvs/0000000000000000"
    shutil.copytree((prefix / "venv").resolve(), new, symlinks=True)
    for package in ("rewarm", "rewarm_hooks", "rewarm_native"):
        (directory,) = new.glob(f"lib/python3*/site-packages/{package}")
        for module in directory.rglob("*.py"):
            module.write_text("raise SystemExit('a module of the new version')\n")
        for compiled in directory.rglob("__pycache__"):
            shutil.rmtree(compiled)
    link = prefix / "venv.new"
    link.symlink_to(f"venvs/{new.name}")
    os.replace(link, prefix / "venv")


def test_upgrade_in_the_middle_of_a_restore(upgradable: Node) -> None:
    node = upgradable
    faults.captured(node)
    begun, go_on = node.directory / "begun", node.directory / "go-on"
    wait = f'[ "$1" != swrk ] || {{ touch {begun}; while [ ! -e {go_on} ]; do sleep 0.02; done; }}'
    node.configure(criu=str(faults.criu(node, f'{wait}\nexec "$REAL" "$@"')))
    process, container = node.runtime.spawn("create", "copy", faults.bundle(node.directory / "copy"))
    wait_for("criu", begun.exists)
    old = os.readlink(node.prefix / "venv")
    upgrade(node.prefix)
    try:
        go_on.touch()
        assert process.wait(60) == 0
        node.runtime.settle(container)
        with pytest.raises(CommandFailed, match="a module of the new version"):
            command(node.prefix / "venv/bin/python3", "-I", "-c", "import rewarm")
        assert node.outcome("copy")["outcome"] == "warm", node.outcome("copy")
    finally:
        (node.prefix / "venv").unlink()
        (node.prefix / "venv").symlink_to(old)
    node.runtime.start("copy")
    container.stdout.wait_text("\n")
