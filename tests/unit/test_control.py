"""The control directory's file system."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest

from rewarm.oci import record
from rewarm_native import process

LABEL = "system_u:object_r:container_file_t:s0:c1,c2"


def bound(path: Path, label: object) -> None:
    (path / "control").mkdir(exist_ok=True)
    control = record.bound_control(str(path), {"linux": {"mountLabel": label}})
    try:
        assert control == str(path / "control") and os.path.ismount(control)
    finally:
        subprocess.run(["umount", path / "control"], check=True)


@pytest.mark.parametrize("label", [LABEL, "", None])
def test_without_selinux_no_file_system_has_a_label(tmp_path: Path, label: object) -> None:
    if os.path.isdir("/sys/fs/selinux"):
        label = None
    bound(tmp_path, label)


@pytest.mark.parametrize(
    ("label", "given"), [(LABEL, LABEL), ("", ""), (None, ""), ('a"b', ""), ("a b", ""), ("a\nb", "")]
)
def test_with_selinux_it_has_the_containers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, label: object, given: str
) -> None:
    """container_t may not write to what is tmpfs_t."""
    seen: list[str] = []
    monkeypatch.setattr(record, "_SELINUX", str(tmp_path))
    monkeypatch.setattr(process, "mount_tmpfs", lambda path, **options: seen.append(options["label"]))
    record.bound_control(str(tmp_path), {"linux": {"mountLabel": label}})
    assert seen == [given]


def test_the_label_is_an_option_of_the_mount(tmp_path: Path) -> None:
    if os.path.isdir("/sys/fs/selinux"):
        pytest.skip("it would be accepted here")
    with pytest.raises(OSError, match="mount tmpfs at") as caught:
        process.mount_tmpfs(tmp_path, size=1 << 20, inodes=16, mode=0o1777, label=LABEL)
    assert caught.value.errno == errno.EINVAL
