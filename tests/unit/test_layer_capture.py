"""What a capture of an upper directory refuses, what it leaves out, and files that come from elsewhere."""

from __future__ import annotations

import io
import os
import socket
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from rewarm_hooks.layer import LayerError, LayerStats, apply_layer, write_layer
from support.layers import Overlays


@pytest.fixture
def upper(tmp_path: Path) -> Path:
    path = tmp_path / "upper"
    (path / "dir").mkdir(parents=True)
    (path / "dir/file").write_text("content")
    return path


def names_in(upper: Path, extra: list[tuple[str, Path]] | None = None) -> tuple[list[str], LayerStats, bytes]:
    out = io.BytesIO()
    stats = write_layer(upper, out, extra=extra or [])
    out.seek(0)
    with tarfile.open(fileobj=out) as archive:
        return archive.getnames(), stats, out.getvalue()


def refused(upper: Path, extra: list[tuple[str, Path]] | None = None) -> LayerError:
    with pytest.raises(LayerError) as caught:
        write_layer(upper, io.BytesIO(), extra=extra or [])
    return caught.value


@pytest.fixture
def overlays(tmp_path: Path) -> Iterator[Overlays]:
    made = Overlays(tmp_path)
    (made.lower / "d").mkdir()
    (made.lower / "d/f").write_text("lower")
    (made.lower / "big").write_bytes(b"b" * 8192)
    yield made
    made.close()


def test_a_renamed_lower_directory(overlays: Overlays) -> None:
    overlay = overlays.new(",redirect_dir=on")
    (overlay.merged / "d").rename(overlay.merged / "moved")
    error = refused(overlay.upper)
    assert (error.entry, "redirect_dir=off" in error.cause) == ("moved", True)


def test_a_file_whose_data_was_not_copied_up(overlays: Overlays) -> None:
    overlay = overlays.new(",metacopy=on")
    (overlay.merged / "big").chmod(0o600)
    error = refused(overlay.upper)
    assert (error.entry, "metacopy=off" in error.cause) == ("big", True)
    with (overlay.merged / "big").open("a") as file:
        file.write("now it is")
    assert "big" in names_in(overlay.upper)[0]


def test_deletions_in_the_form_of_extended_attributes(upper: Path) -> None:
    """The form of Linux 6.7 for layers that cannot hold device nodes, and the marks of a mount with userxattr."""
    (upper / "dir/gone").write_bytes(b"")
    os.setxattr(upper / "dir/gone", "user.overlay.whiteout", b"")
    os.setxattr(upper / "dir", "user.overlay.opaque", b"y")
    (upper / "x").mkdir()
    os.setxattr(upper / "x", "trusted.overlay.opaque", b"x")
    found, stats, _ = names_in(upper)
    assert found == [".", "dir", "dir/.wh..wh..opq", "dir/file", "dir/.wh.gone", "x"]
    assert (stats.whiteouts, stats.opaque, stats.entries) == (1, 1, 4)


def test_the_marks_of_overlayfs_and_labels_are_not_carried(upper: Path) -> None:
    os.setxattr(upper / "dir", "trusted.overlay.origin", b"x")
    os.setxattr(upper / "dir", "trusted.overlay.impure", b"y")
    os.setxattr(upper / "dir/file", "trusted.overlay.nlink", b"U+1")
    os.setxattr(upper / "dir/file", "trusted.mine", b"m")
    _, _, data = names_in(upper)
    assert b"overlay" not in data
    assert b"SCHILY.xattr.trusted.mine=m" in data


@pytest.mark.parametrize("name", [".wh.x", ".wh.", ".wh..wh..opq", ".wh..wh.x"])
def test_names_that_would_mean_a_deletion(upper: Path, name: str) -> None:
    (upper / "dir" / name).write_text("real")
    error = refused(upper)
    assert (error.entry, ".wh." in error.cause) == (f"dir/{name}", True)
    (upper / "dir" / name).unlink()
    (upper / "dir" / name).mkdir()
    assert refused(upper).entry == f"dir/{name}"
    (upper / "dir" / name).rmdir()
    os.mknod(upper / "dir" / name, stat.S_IFCHR, 0)
    assert refused(upper).entry == f"dir/{name}"


@pytest.mark.parametrize("kind", [stat.S_IFCHR, stat.S_IFBLK])
def test_device_nodes(upper: Path, kind: int) -> None:
    os.mknod(upper / "dir/device", kind | 0o600, os.makedev(1, 3))
    error = refused(upper)
    assert (error.entry, "device node" in error.cause) == ("dir/device", True)


def test_a_path_too_long_for_an_archive(upper: Path) -> None:
    here = os.open(upper, os.O_RDONLY)
    for _ in range(20):
        os.mkdir("n" * 250, dir_fd=here)
        below = os.open("n" * 250, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    assert "at most 4095" in refused(upper).cause


def test_sockets_are_named_and_left_out(upper: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(upper / "dir/s"))
    found, stats, _ = names_in(upper)
    assert stats.sockets == ["dir/s"]
    assert found == [".", "dir", "dir/file"]


def test_no_upper_directory(upper: Path) -> None:
    assert "No such file" in refused(upper / "nowhere").cause
    assert "Not a directory" in refused(upper / "dir/file").cause


def test_a_full_disk_under_the_archive(upper: Path) -> None:
    (upper / "much").write_bytes(bytes(range(256)) * 4096)
    with Path("/dev/full").open("wb", buffering=0) as out, pytest.raises(OSError, match="No space left"):
        write_layer(upper, out)


def test_a_file_that_shrinks_while_it_is_read(upper: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (upper / "dir/file").write_bytes(b"x" * (3 << 20))
    real = os.pread

    def shrinking(fd: int, count: int, offset: int) -> bytes:
        os.truncate(upper / "dir/file", 1 << 20)
        return real(fd, count, offset)

    monkeypatch.setattr(os, "pread", shrinking)
    error = refused(upper)
    assert (error.entry, "shorter" in error.cause) == ("dir/file", True)


def test_a_file_that_becomes_a_link_or_pipe_while_it_is_read(upper: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open
    swaps = [lambda path: path.symlink_to("/etc/passwd"), os.mkfifo]
    for swap in swaps:
        with monkeypatch.context() as patch:

            def swapping(
                path: str | bytes, flags: int, mode: int = 0o777, *, dir_fd: int | None = None, swap: object = swap
            ) -> int:
                if path == b"file":
                    (upper / "dir/file").unlink()
                    assert callable(swap)
                    swap(upper / "dir/file")
                return real(path, flags, mode, dir_fd=dir_fd)

            patch.setattr(os, "open", swapping)
            assert refused(upper).entry == "dir/file"
        (upper / "dir/file").unlink()
        (upper / "dir/file").write_text("content")


def test_files_from_elsewhere(upper: Path, tmp_path: Path) -> None:
    """For instance a file that was deleted while a process has it open: /proc/PID/fd/N still leads to it."""
    deleted = tmp_path / "deleted"
    deleted.write_text("still open")
    deleted.chmod(0o640)
    os.utime(deleted, ns=(1, 1_000_000_007))
    os.mknod(upper / "dir/hidden", stat.S_IFCHR, 0)
    with deleted.open("rb") as still_open:
        deleted.unlink()
        source = Path(f"/proc/self/fd/{still_open.fileno()}")
        found, _, data = names_in(upper, [("dir/hidden", source), ("lower/link_remap.1", source), ("dir/file", source)])
    assert found == [".", "dir", "dir/file", "dir/hidden", "lower/link_remap.1"]
    root = tmp_path / "root"
    (root / "lower").mkdir(parents=True)
    fd = os.open(root, os.O_RDONLY)
    apply_layer(io.BytesIO(data), fd, None)
    os.close(fd)
    for name in ("dir/file", "dir/hidden", "lower/link_remap.1"):
        status = (root / name).stat()
        assert (status.st_mode & 0o7777, status.st_mtime_ns) == (0o640, 1_000_000_007)
        assert (root / name).read_text() == "still open"


@pytest.mark.parametrize("name", ["../x", "/x", "", "a//b", ".wh.x", "dir/.wh.x", "dir/.wh..wh..opq"])
def test_names_for_files_from_elsewhere(upper: Path, name: str) -> None:
    assert refused(upper, [(name, upper / "dir/file")]).entry in (name, "(empty name)")


def test_files_from_elsewhere_that_are_none(upper: Path, tmp_path: Path) -> None:
    assert "No such file" in refused(upper, [("x", tmp_path / "nothing")]).cause
    assert "no regular file" in refused(upper, [("x", tmp_path)]).cause
    os.mkfifo(tmp_path / "fifo")
    assert "no regular file" in refused(upper, [("x", tmp_path / "fifo")]).cause
    assert "place of a directory" in refused(upper, [("dir", upper / "dir/file")]).cause
