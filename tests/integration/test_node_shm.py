"""The node's own /dev/shm, which containers with `--ipc=host` share with every program of the node."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import counter, proc
from support.bundle import Bundle, bind
from support.node import Node

pytestmark = pytest.mark.alone

SHM = Path("/dev/shm")
LOOP = "\nimport time\nn = 0\nwhile True: n += 1; print(n, 'x', flush=True); time.sleep(0.05)\n"


@pytest.fixture
def names() -> Iterator[tuple[str, str]]:
    """Of a file of the container's, and of one of another program's, in the node's own /dev/shm."""
    own, other = (f"rewarm-test-{os.getpid()}-{kind}" for kind in ("own", "other"))
    (SHM / other).write_text("secret")
    yield own, other
    for path in SHM.glob(f"rewarm-test-{os.getpid()}-*"):
        path.unlink()


def shm_user(node: Node, name: str, source: Path, own: str, **more: str) -> Bundle:
    """Of a program that keeps a file in /dev/shm open, which is `source` on the node."""
    opened = more.get("opened", own)
    program = f"file = open('/dev/shm/{opened}', 'w+'); file.write('mine'); file.flush()"
    args = ["python3", "-c", program + LOOP]
    return counter.bundle(node.directory / name, args=args, mounts=[bind(source, "/dev/shm")])


def stopped(node: Node, name: str) -> None:
    node.runtime.kill(name, "KILL")
    node.runtime.wait_stopped(name)
    node.runtime.delete(name)


def test_the_nodes_own_dev_shm_is_not_carried(node: Node, tmp_path: Path, names: tuple[str, str]) -> None:
    """But what the program has open: by a path of its own, as a `hostPath` may name it."""
    own, other = names
    path = tmp_path / "link"
    path.symlink_to(SHM)
    counter.run(node.runtime, "source", shm_user(node, "source", path, own))
    node.rewarm("capture", "source", "--name", "counter")
    stopped(node, "source")
    # A directory of a container's own gets all that there is in a snapshot.
    directory = tmp_path / "shm"
    directory.mkdir(mode=0o1777)
    node.runtime.create("elsewhere", shm_user(node, "elsewhere", directory, own))
    assert node.outcome("elsewhere")["outcome"] == "warm", node.outcome("elsewhere")
    assert [one.name for one in directory.iterdir()] == [own]
    # Another's that is there already may be anybody's.
    (SHM / own).write_text("another's")
    node.runtime.create("taken", shm_user(node, "taken", SHM, own))
    found = node.outcome("taken")
    assert found["outcome"] == "cold" and f"{own}: it is there already" in found["reason"], found
    assert (SHM / own).read_text() == "another's" and (SHM / other).read_text() == "secret"
    (SHM / own).unlink()
    copy = node.runtime.create("copy", shm_user(node, "copy", SHM, own))
    node.runtime.start("copy")
    assert node.outcome("copy")["outcome"] == "warm", node.outcome("copy")
    assert (SHM / own).read_text() == "mine" and (SHM / other).read_text() == "secret"
    proc.wait_for("it to count", lambda: len(counter.numbers(copy)) > 2)


def test_of_a_snapshot_with_more_the_nodes_own_gets_what_is_open(
    node: Node, tmp_path: Path, names: tuple[str, str]
) -> None:
    """The source had a directory, with files that nobody has open in it."""
    own, _ = names
    directory = tmp_path / "shm"
    directory.mkdir(mode=0o1777)
    more = directory / f"{own}-more"
    more.write_text("closed")
    counter.run(node.runtime, "source", shm_user(node, "source", directory, own))
    node.rewarm("capture", "source", "--name", "counter")
    node.runtime.create("copy", shm_user(node, "copy", SHM, own))
    assert node.outcome("copy")["outcome"] == "warm", node.outcome("copy")
    assert (SHM / own).read_text() == "mine" and not (SHM / more.name).exists()


def test_a_file_in_a_directory_of_the_nodes_own_is_refused(node: Node, names: tuple[str, str]) -> None:
    own, _ = names
    (SHM / own).mkdir()
    try:
        counter.run(node.runtime, "source", shm_user(node, "source", SHM, own, opened=f"{own}/file"))
        done = node.rewarm("capture", "source", "--name", "counter", check=False)
        assert done.returncode == 1 and f"/dev/shm/{own}/file" in done.stderr and "at its top" in done.stderr
    finally:
        (SHM / own / "file").unlink()
        (SHM / own).rmdir()
