"""Which views of the file system the processes of a restored GPU container may have: on real processes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rewarm import devices
from rewarm.errors import RestoreError

# An init with a child that does argv[2] in its place, then waits.
TREE = """
import os, sys
pid = os.fork()
if pid == 0:
    exec(sys.argv[1])
    print("ready", flush=True)
    sys.stdin.read()
    os._exit(0)
os.waitpid(pid, 0)
"""


@contextmanager
def tree(child: str) -> Iterator[int]:
    words = [sys.executable, "-c", TREE, child]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as init:
        assert init.stdout is not None and init.stdout.readline() == "ready\n"
        yield init.pid
        assert init.stdin is not None
        init.stdin.close()


def test_one_view() -> None:
    with tree("pass") as init:
        devices._check_view(init, "/")


def test_a_zombie_has_none() -> None:
    with tree("os.fork() or os._exit(0)") as init:
        devices._check_view(init, "/")


@pytest.mark.parametrize(
    "child",
    ["os.chroot('/tmp'); os.chdir('/')", "import ctypes; assert ctypes.CDLL(None).unshare(0x20000) == 0"],
    ids=["root", "mounts"],
)
def test_another_view(child: str) -> None:
    with tree(child) as init, pytest.raises(RestoreError, match="it has a root or mounts of its own"):
        devices._check_view(init, "/")


def test_an_init_in_another_root(tmp_path: Path) -> None:
    """What the bundle says is its root is not where it is."""
    with tree("pass") as init, pytest.raises(RestoreError, match=f"process {init}"):
        devices._check_view(init, str(tmp_path))
