"""What a capture looks at in a /dev/shm that other programs use, and what a restore puts into one."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from rewarm import devshm
from rewarm.errors import RestoreError
from rewarm.oci.spec import Spec


def test_files_of_others_that_go_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Semaphores and segments of the node's other programs come and go."""
    monkeypatch.setattr(devshm, "is_nodes", lambda directory: True)
    (tree := tmp_path / "tree").mkdir()
    over = threading.Event()

    def others() -> None:
        while not over.is_set():
            for number in range(64):
                (tree / str(number)).touch()
            for number in range(64):
                (tree / str(number)).unlink()

    thread = threading.Thread(target=others)
    thread.start()
    try:
        for _ in range(300):
            devshm.write(tmp_path / devshm.FILE, tmp_path, str(tree), [], [])
    finally:
        over.set()
        thread.join()


def live(source: Path, *options: str, uid: int = 1000) -> Spec:
    mount = {"destination": "/dev/shm", "type": "bind", "source": str(source), "options": ["rbind", *options]}
    return {"mounts": [mount], "process": {"user": {"uid": uid, "gid": uid}}}


@pytest.mark.parametrize("option", ["ro", "rro"])
def test_what_a_container_may_only_read(tmp_path: Path, option: str) -> None:
    """`hostPath` with `readOnly`: a directory of the node that such pods may not change."""
    with pytest.raises(RestoreError, match="no such mount that it may write to"):
        devshm.change(live(tmp_path, option), "name", str(tmp_path))
    assert devshm.own(live(tmp_path, option)) == ""
    assert devshm.own(live(tmp_path, "rw")) == str(tmp_path)


@pytest.mark.parametrize(
    ("uid", "mode", "made"),
    [(1000, 0o1777, ["mine"]), (1000, 0o755, []), (0, 0o755, ["roots"]), (0, 0o1777, ["roots"])],
)
def test_nothing_that_the_container_could_not_make_itself(tmp_path: Path, uid: int, mode: int, made: list[str]) -> None:
    for name in ("source", "target", "checkpoint"):
        (tmp_path / name).mkdir()
    (tmp_path / "source/mine").write_text("mine")
    os.chown(tmp_path / "source/mine", 1000, 1000)
    (tmp_path / "source/roots").write_text("roots")
    (tmp_path / "source/roots").chmod(0o4755)
    (tmp_path / "target").chmod(mode)
    layer, bundle_spec = tmp_path / devshm.FILE, live(tmp_path / "target", uid=uid)
    devshm.write(layer, tmp_path / "checkpoint", str(tmp_path / "source"), [], [])
    there = devshm.change(bundle_spec, "name", str(tmp_path))
    devshm.apply(str(layer), str(tmp_path / "checkpoint"), there, bundle_spec)
    assert [path.name for path in (tmp_path / "target").iterdir()] == made
