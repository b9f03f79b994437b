"""The hook command as the runtime starts it: arguments, exit status, one line on stderr, and what it imports."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import rewarm_hooks
from support.layers import difference, picture
from support.tars import END, directory, file, header, symlink

HOOKS = str(Path(rewarm_hooks.__file__).parent.parent)
# -I leaves PYTHONPATH out of sight; an installed package needs none of this
START = f"""import sys, runpy; sys.path.insert(0, {HOOKS!r})
runpy.run_module('rewarm_hooks.rootfs_diff', run_name='__main__')"""
STATE = json.dumps({"ociVersion": "1.0.2", "id": "c", "status": "creating", "pid": 1, "bundle": "/b"}) + " " * 100_000


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-I", "-c", START, *map(str, arguments)]
    return subprocess.run(command, input=STATE, capture_output=True, text=True, check=False, timeout=60, cwd="/")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "rootfs"
    (root / "etc").mkdir(parents=True)
    (root / "etc/old").write_text("old")
    (tmp_path / "layer").write_bytes(
        directory(b"./") + file(b"new") + directory(b"etc/") + header(b"etc/.wh.old") + END
    )
    return root


def test_apply_and_undo(root: Path, tmp_path: Path) -> None:
    before = picture(root)
    done = run("apply", "--layer", tmp_path / "layer", "--root", root, "--undo", tmp_path / "undo")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (root / "new").read_text() == "planted"
    assert not (root / "etc/old").exists()
    done = run("undo", "--undo", tmp_path / "undo", "--root", root)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert difference(before, picture(root)) == {}
    assert not (tmp_path / "undo").exists()


def test_undo_without_an_undo_file_is_a_success(root: Path, tmp_path: Path) -> None:
    (tmp_path / "undo.tmp").write_text("half written when it was killed")
    before = picture(root)
    assert run("undo", "--root", root, "--undo", tmp_path / "undo").returncode == 0
    assert difference(before, picture(root)) == {}
    assert not (tmp_path / "undo.tmp").exists()


def test_a_hostile_layer_is_one_line(root: Path, tmp_path: Path) -> None:
    (tmp_path / "layer").write_bytes(symlink(b"evil\n", b"/etc") + file(b"evil\n/passwd") + END)
    before = picture(root)
    done = run("apply", "--layer", tmp_path / "layer", "--root", root, "--undo", tmp_path / "undo")
    assert done.returncode == 1
    assert done.stderr == "rootfs-diff: evil\\n/passwd: an entry in evil\\n, which the layer makes a file of\n"
    assert difference(before, picture(root)) == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "rootfs-diff: arguments: no command (empty name); apply and undo are known\n"),
        (["remove"], "rootfs-diff: arguments: no command remove; apply and undo are known\n"),
        (["apply"], "rootfs-diff: arguments: apply needs --layer, --root, --undo, each once and with a value\n"),
        (["apply", "--layer", "l", "--root", "r", "--undo"], None),
        (["apply", "--layer", "l", "--root", "r", "--root", "r"], None),
        (["undo", "--layer", "l", "--root", "r", "--undo", "u"], None),
        (["undo", "--root=r", "--undo=u"], None),
        (
            ["undo", "--root", "/nowhere", "--undo", "u"],
            "rootfs-diff: /nowhere: opening the root filesystem: No such file or directory\n",
        ),
        (
            ["undo", "--root", "/dev/null", "--undo", "u"],
            "rootfs-diff: /dev/null: opening the root filesystem: Not a directory\n",
        ),
        (
            ["apply", "--layer", "/no", "--root", "/", "--undo", "u"],
            "rootfs-diff: /no: opening the layer: No such file or directory\n",
        ),
    ],
)
def test_arguments(arguments: list[str], message: str | None) -> None:
    done = run(*arguments)
    assert done.returncode == 1
    assert done.stderr == message or (message is None and "each once and with a value" in done.stderr)
    assert done.stderr.count("\n") == 1


def test_layers_that_are_no_archive(root: Path, tmp_path: Path) -> None:
    before = picture(root)
    for content in (b"", b"not an archive" * 100, bytes(511)):
        (tmp_path / "layer").write_bytes(content)
        done = run("apply", "--layer", tmp_path / "layer", "--root", root, "--undo", tmp_path / "undo")
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert done.stderr.startswith("rootfs-diff: archive: ")
    done = run("apply", "--layer", tmp_path, "--root", root, "--undo", tmp_path / "undo")
    assert (done.returncode, done.stderr) == (1, f"rootfs-diff: {tmp_path}: opening the layer: not a regular file\n")
    os.mkfifo(tmp_path / "fifo")
    done = run("apply", "--layer", tmp_path / "fifo", "--root", root, "--undo", tmp_path / "undo")
    assert (done.returncode, done.stderr) == (
        1,
        f"rootfs-diff: {tmp_path / 'fifo'}: opening the layer: not a regular file\n",
    )
    assert difference(before, picture(root)) == {}


def test_killed_in_the_middle(root: Path, tmp_path: Path) -> None:
    """A real SIGKILL while a large file is written: the undo file is there, and undoing leaves nothing of it."""
    (tmp_path / "layer").write_bytes(
        directory(b"./") + file(b"a") + file(b"big", bytes(64 << 20)) + header(b"etc/.wh.old") + END
    )
    before = picture(root)
    code = START.replace(
        "runpy.run_module",
        "import os; from rewarm_hooks import place; real = place.metadata\n"
        "place.metadata = lambda member, fd: os.kill(os.getpid(), 9) if member.name == b'big' else real(member, fd)\n"
        "runpy.run_module",
    )
    command = [
        sys.executable,
        "-I",
        "-c",
        code,
        "apply",
        "--layer",
        str(tmp_path / "layer"),
        "--root",
        str(root),
        "--undo",
        str(tmp_path / "undo"),
    ]
    assert subprocess.run(command, input=b"{}", check=False, timeout=60).returncode == -signal.SIGKILL
    assert (tmp_path / "undo").exists()
    assert (root / "big").exists()
    assert not (root / "etc/old").exists()
    assert run("undo", "--root", root, "--undo", tmp_path / "undo").returncode == 0
    assert difference(before, picture(root)) == {}


def test_the_hook_imports_nothing_heavy() -> None:
    """It stands in the path of every restore; each of these takes longer to import than a small diff to apply."""
    code = f"import sys; sys.path.insert(0, {HOOKS!r}); before = set(sys.modules); import rewarm_hooks.rootfs_diff\n"
    code += "print(*(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True)
    heavy = {
        "argparse",
        "collections",
        "contextlib",
        "dataclasses",
        "inspect",
        "json",
        "pathlib",
        "re",
        "tarfile",
        "typing",
    }
    loaded = set(done.stdout.split())
    assert "rewarm_hooks.apply" in loaded
    assert not loaded & heavy
