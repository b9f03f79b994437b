"""The checks of `rewarm doctor` of directories, and undoing what was left behind, on real directories."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest

from daemonset_verdict import checks_of, unwell
from rewarm import doctor, doctor_places
from rewarm.checks import FAILED, OK, WARNING, Node
from rewarm.oci import record
from rewarm.scratch import Scratch
from rewarm.store.directory import DirectoryStore
from support.nodes import killed_restore, says, well, with_settings
from support.proc import reap_orphans
from support.share import Share
from support.snapshots import tmpfs, write_snapshot


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return well(tmp_path)


def test_store_that_the_first_capture_will_make(node: Node, tmp_path: Path) -> None:
    says(doctor_places.store(node), OK, "not there yet")
    away = with_settings(node, store=str(tmp_path / "a" / "b"))
    says(doctor_places.store(away), FAILED, f"mkdir -p {tmp_path / 'a'}")


def test_store_with_snapshots(node: Node, tmp_path: Path) -> None:
    write_snapshot(DirectoryStore(node.settings.store), tmp_path / "w")
    says(doctor_places.store(node), OK, "1 snapshot,", "GiB free")
    Path(node.settings.store).chmod(0o777)
    says(doctor_places.store(node), WARNING, "others than root", "chmod 700")
    os.chown(node.settings.store, 1000, 1000)
    says(doctor_places.store(node), WARNING, "user 1000")


@pytest.mark.parametrize("kind", ["file", "broken link", "scheme"])
def test_store_that_is_none(node: Node, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "odd"
    if kind == "file":
        path.write_text("")
    elif kind == "broken link":
        path.symlink_to(tmp_path / "none")
    broken = with_settings(node, store="s3://bucket" if kind == "scheme" else str(path))
    found = {check.name: check for check in doctor.examine(broken)}
    says(found["store"], FAILED)


def test_store_whose_server_does_not_answer(node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said, of the store alone, and takes no pods away (the DaemonSet's verdict)."""
    monkeypatch.setattr(doctor, "PATIENCE", 0.5)
    (tmp_path / "served").mkdir()
    with Share(tmp_path / "served", tmp_path / "share") as share:
        node = with_settings(node, store=str(share.target / "store"), work_dir=str(share.target / "work"))
        says({check.name: check for check in doctor.examine(node)}["store"], OK)
        share.hang()
        found = {check.name: check for check in doctor.examine(node)}
        says(found["store"], FAILED, "no answer within 0.5 s", f"the server of {share.target}/store")
        assert all(
            found[name].status != FAILED for name in ("work directory", "state directory", "cache", "left-overs")
        )
        said = json.dumps({"checks": [asdict(found[name]) for name in doctor.SHARES]})
        engine = json.dumps({"checks": [{"name": "containerd", "status": "ok", "found": "", "mend": ""}]})
        assert unwell(checks_of("doctor", 1, said), checks_of("doctor --node", 0, engine)) == []
    reap_orphans()


def test_store_that_is_read_only_or_full(node: Node, tmp_path: Path) -> None:
    with tmpfs(tmp_path / "small", "size=1m,mode=700") as small:
        other = with_settings(node, store=str(small))
        says(doctor_places.store(other), WARNING, "0.0 GiB free", "as much as the container's memory")
        says(doctor_places.work_directory(other), WARNING, "not on the file system of the store")
        subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
        says(doctor_places.store(other), WARNING, "Read-only file system", "restores work without")
        says(doctor_places.work_directory(with_settings(node, work_dir=str(small))), FAILED, "Read-only")


def test_work_directory(node: Node) -> None:
    says(doctor_places.work_directory(node), OK, "on the file system of the store")


def test_state_directory(node: Node) -> None:
    path = Path(node.settings.state_dir)
    says(doctor_places.state_directory(node), OK, "made when it is needed")
    path.mkdir(mode=0o700)
    says(doctor_places.state_directory(node), OK, str(path))
    path.chmod(0o777)
    says(doctor_places.state_directory(node), FAILED, "chmod 700")
    path.rmdir()
    path.write_text("")
    says(doctor_places.state_directory(node), FAILED, "is not a directory")


def dead_capture(node: Node) -> Path:
    scratch = Path(node.settings.work_dir) / "capture-0123456789abcdef"
    (scratch / "checkpoint").mkdir(parents=True)
    (scratch / "checkpoint" / "pages-1.img").write_bytes(b"x")
    return scratch


def test_left_overs(node: Node, tmp_path: Path) -> None:
    says(doctor_places.left_overs(node), OK, "none")
    with Scratch(node.settings.work_dir) as live:
        path, dead = killed_restore(node, tmp_path), dead_capture(node)
        says(doctor_places.left_overs(node), WARNING, "restore of c1", str(dead), "--fix")
        assert doctor.fix(node) == []
        assert not os.path.exists(path) and not dead.exists() and live.path.exists()
        says(doctor_places.left_overs(node), OK, "none")


def test_a_restore_that_still_runs_is_no_left_over(node: Node, tmp_path: Path) -> None:
    path = killed_restore(node, tmp_path)
    kept = record.load(path)
    assert kept is not None
    record.save(path, kept.owned())
    says(doctor_places.left_overs(node), OK)
    assert doctor.fix(node) == [] and os.path.exists(path)


def test_a_record_that_cannot_be_read(node: Node, tmp_path: Path) -> None:
    path = killed_restore(node, tmp_path)
    Path(path, "record.json").write_text("{")
    says(doctor_places.left_overs(node), WARNING, "record.json", "remove the directory")
    problems = doctor.fix(node)
    assert len(problems) == 1 and "record.json" in problems[0]
