"""Whether a page is in the page cache: what is asked for is not read by asking."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from rewarm_native.page_cache import is_cached
from support.layers import Overlays
from support.packs import drop
from support.snapshots import MIB, tmpfs

SIZE = 4 * MIB
PLACES = (0, 2 * MIB, SIZE - 1)
TIMES = 100


def test_what_was_read_is_and_what_was_dropped_is_not(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(os.urandom(SIZE))
    with path.open("rb") as file:
        fd = file.fileno()
        assert all(is_cached(fd, offset) for offset in PLACES)
        for _ in range(TIMES):
            drop(path)
            # Twice: the first look must not bring what the second finds.
            assert not any(is_cached(fd, offset) for offset in (*PLACES, *PLACES))
        os.pread(fd, 4096, 2 * MIB)
        assert is_cached(fd, 2 * MIB + 4095)


def test_what_is_being_read_is_not_there_yet(tmp_path: Path) -> None:
    """By cachestat(2) it would be, in one of five looks."""
    path = tmp_path / "data"
    path.write_bytes(os.urandom(SIZE))
    early = 0
    with path.open("rb") as file:
        for _ in range(TIMES):
            drop(path)
            os.posix_fadvise(file.fileno(), 0, SIZE, os.POSIX_FADV_WILLNEED)
            if is_cached(file.fileno(), SIZE - 1):
                # Then a read that waits for nothing has it.
                early += os.preadv(file.fileno(), [bytearray(1)], SIZE - 1, os.RWF_NOWAIT) != 1
    assert early == 0


def test_past_the_end(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(b"x")
    with (tmp_path / "data").open("rb") as file:
        assert is_cached(file.fileno(), 4095)
        for offset in (4096, 100 * MIB, (1 << 63) - 8192):
            assert not is_cached(file.fileno(), offset)


def test_in_memory(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "mount", "size=1m") as mount:
        (mount / "data").write_bytes(b"x" * 8192)
        with (mount / "data").open("rb") as file:
            assert is_cached(file.fileno(), 4096)
            assert not is_cached(file.fileno(), 8192)


def test_on_an_overlay(tmp_path: Path) -> None:
    """A node that is a container itself: its store has the pages of the directories below."""
    overlays = Overlays(tmp_path)
    (overlays.lower / "data").write_bytes(os.urandom(SIZE))
    try:
        path = overlays.new().merged / "data"
        with path.open("rb") as file:
            assert len(file.read()) == SIZE
            assert all(is_cached(file.fileno(), offset) for offset in PLACES)
            drop(overlays.lower / "data")
            assert not any(is_cached(file.fileno(), offset) for offset in PLACES)
    finally:
        overlays.close()


def test_where_nobody_can_say(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(b"x")
    with path.open("rb") as file:
        for fd, offset, number in ((-1, 0, errno.EBADF), (file.fileno(), (1 << 64) - 1, errno.EINVAL)):
            with pytest.raises(OSError, match="look for a page of a file in the page cache") as caught:
                is_cached(fd, offset)
            assert caught.value.errno == number
