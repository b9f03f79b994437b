"""Other tools read our layers, and we read theirs: Python's tarfile and GNU tar stand for all."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from rewarm_hooks.layer import apply_layer, write_layer
from support.layers import difference, picture


@pytest.fixture
def upper(tmp_path: Path) -> Path:
    path = tmp_path / "upper"
    (path / "dir").mkdir(parents=True)
    (path / "dir/file").write_text("content")
    (path / "dir/file").chmod(0o4755)
    os.link(path / "dir/file", path / "other")
    os.setxattr(path / "dir/file", "user.bytes", b"\0\xff=\n")
    os.setxattr(path / "dir", "user.a=b", b"c")
    (path / "link").symlink_to("dir/" + "long" * 40)
    os.mkfifo(path / "fifo")
    (path / ("n" * 150)).write_bytes(b"")
    os.chown(path / "fifo", 5_000_000, 4_000_000_000)
    with open(os.fsencode(path) + b"/\xff\xc3\xa9", "wb") as file:
        file.write(b"name")
    (path / "ünï").write_text("name")
    for name, parts, size in (
        ("mid", ((100_000, b"m"), (5_000_000, b"e" * 10_000)), 0),
        ("tail", ((0, b"t"),), 9_000_001),
        ("hole", (), 5 << 20),
    ):
        with (path / name).open("wb") as file:
            for offset, data in parts:
                file.seek(offset)
                file.write(data)
            if size:
                file.truncate(size)
    for found in sorted(path.rglob("*")):
        os.utime(found, ns=(1, 1_234_567_890_123_456_789), follow_symlinks=False)
    os.utime(path / "other", ns=(1, -1_500_000_000))
    return path


def layer_of(upper: Path) -> io.BytesIO:
    out = io.BytesIO()
    write_layer(upper, out)
    out.seek(0)
    return out


def test_tarfile_reads_ours(upper: Path) -> None:
    with tarfile.open(fileobj=layer_of(upper)) as archive:
        found = {os.fsencode(member.name): member for member in archive.getmembers()}
        assert found.keys() == {path or b"." for path in picture(upper)}
        for path, member in found.items():
            status = os.lstat(os.fsencode(upper) + b"/" + path)
            assert (member.mode, member.uid, member.gid) == (status.st_mode & 0o7777, status.st_uid, status.st_gid)
            assert abs(member.mtime - status.st_mtime) < 1e-5
            if member.isreg():
                data = archive.extractfile(member)
                assert data is not None
                assert data.read() == (upper / os.fsdecode(path)).read_bytes()
        assert (found[b"other"].type, found[b"other"].linkname) == (tarfile.REGTYPE, "")
        assert (found[b"dir/file"].type, found[b"dir/file"].linkname) == (tarfile.LNKTYPE, "other")
        assert found[b"link"].linkname == "dir/" + "long" * 40
        assert found[b"tail"].sparse
        assert found[b"dir"].pax_headers["SCHILY.xattr.user.a%3Db"] == "c"


def test_gnu_tar_reads_ours(upper: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    command = ["tar", "-x", "-p", "--xattrs", "--xattrs-include=*", "--numeric-owner", "-C", str(tmp_path / "out")]
    result = subprocess.run(command, input=layer_of(upper).getvalue(), capture_output=True, check=False)
    assert result.returncode == 0, result.stderr
    assert difference(picture(upper), picture(tmp_path / "out")) == {}
    assert (tmp_path / "out/hole").stat().st_blocks == 0


@pytest.mark.parametrize("sparse", [[], ["--sparse", "--sparse-version=1.0"]])
def test_we_read_what_gnu_tar_makes(upper: Path, tmp_path: Path, sparse: list[str]) -> None:
    command = [
        "tar",
        "-c",
        "--format=posix",
        "--xattrs",
        "--xattrs-include=*",
        "--numeric-owner",
        *sparse,
        "-C",
        str(upper),
        ".",
    ]
    made = subprocess.run(command, capture_output=True, check=True)
    (tmp_path / "out").mkdir()
    fd = os.open(tmp_path / "out", os.O_RDONLY)
    apply_layer(io.BytesIO(made.stdout), fd, None)
    os.close(fd)
    assert difference(picture(upper), picture(tmp_path / "out")) == {}


def test_we_read_what_tarfile_makes(upper: Path, tmp_path: Path) -> None:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=tarfile.PAX_FORMAT) as archive:
        archive.add(upper, arcname=".")
    (tmp_path / "out").mkdir()
    fd = os.open(tmp_path / "out", os.O_RDONLY)
    apply_layer(made, fd, None)
    os.close(fd)
    # tarfile knows no xattrs, and times only as floats
    left, right = (
        {path: (*seen[:3], seen[4], *seen[6:]) for path, seen in picture(root).items()}
        for root in (upper, tmp_path / "out")
    )
    assert difference(left, right) == {}
