"""Whether a page is in the page cache, by both system calls: what is asked for is not read by asking."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rewarm_native.page_cache import is_cached
from support.packs import drop
from support.snapshots import MIB, tmpfs

SIZE = 4 * MIB
TIMES = 50

BY_MAPPING = """
import ctypes, os, struct, sys
sys.path[:0] = sys.argv[2:]
CACHESTAT, ENOSYS, ALLOW = 451, 38, 0x7FFF0000
code = [(0x20, 0, 0, 0), (0x15, 0, 1, CACHESTAT), (0x06, 0, 0, 0x50000 | ENOSYS), (0x06, 0, 0, ALLOW)]
program = b"".join(struct.pack("HBBI", *line) for line in code)
place = ctypes.create_string_buffer(program)
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, struct.pack("HxxxxxxP", len(code), ctypes.addressof(place)), 0, 0) == 0
assert libc.syscall(CACHESTAT, 0, None, None, 0) == -1 and ctypes.get_errno() == ENOSYS
import test_native_page_cache as tests
from pathlib import Path
tests.look(Path(sys.argv[1]))
"""


def look(directory: Path) -> None:
    path = directory / "data"
    path.write_bytes(os.urandom(SIZE))
    with path.open("rb") as file:
        fd = file.fileno()
        assert is_cached(fd, 0) and is_cached(fd, SIZE - 1)
        for offset in (SIZE, 100 * MIB, (1 << 63) - 8192):
            assert not is_cached(fd, offset)
        for _ in range(TIMES):
            drop(path)
            # Twice: the first look must not bring what the second finds.
            assert not any(is_cached(fd, offset) for offset in (0, 2 * MIB, 0, 2 * MIB, SIZE - 1))
        os.pread(fd, 4096, 2 * MIB)
        assert is_cached(fd, 2 * MIB + 4095)


def test_what_was_read_is_and_what_was_dropped_is_not(tmp_path: Path) -> None:
    look(tmp_path)


def test_on_kernels_without_cachestat(tmp_path: Path) -> None:
    places = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    done = subprocess.run(
        [sys.executable, "-c", BY_MAPPING, tmp_path, *places], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_in_memory(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "mount", "size=1m") as mount:
        (mount / "data").write_bytes(b"x" * 8192)
        with (mount / "data").open("rb") as file:
            assert is_cached(file.fileno(), 4096)
            assert not is_cached(file.fileno(), 8192)


def test_where_nobody_can_say(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(b"x")
    with path.open("rb") as file:
        for fd, offset, number in ((-1, 0, errno.EBADF), (file.fileno(), (1 << 64) - 1, errno.EINVAL)):
            with pytest.raises(OSError, match="look for a page of a file in the page cache") as caught:
                is_cached(fd, offset)
            assert caught.value.errno == number
