"""Pages that are there before they are written."""

from __future__ import annotations

import errno
import mmap
from pathlib import Path

import pytest

from rewarm_native import memory

SIZE = 8 << 20


def resident() -> int:
    """KiB of anonymous memory."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0])


def test_all_of_it_is_there() -> None:
    with mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as space:
        before = resident()
        memory.populate(space)
        assert resident() - before >= (SIZE >> 10) * 3 // 4  # the kernel counts in batches
        assert space[:] == bytes(SIZE)


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    """A hole at the end of a file, which no page can be found for."""
    file = tmp_path / "file"
    file.write_bytes(bytes(SIZE))
    with file.open("r+b") as opened, mmap.mmap(opened.fileno(), SIZE) as space:
        opened.truncate(0)
        with pytest.raises(OSError) as failed:
            memory.populate(space)
        assert failed.value.errno == errno.EFAULT
