"""Libraries that are loaded while other threads go on."""

from __future__ import annotations

import ctypes
import subprocess
import threading
import time
from pathlib import Path

import pytest

from rewarm_native.cuda import preload

SLOW = """
#include <unistd.h>
int rewarm_test_loaded;
__attribute__((constructor)) static void begin(void) { usleep(400000); rewarm_test_loaded = 1; }
"""


def test_others_go_on_meanwhile(tmp_path: Path) -> None:
    source, library = tmp_path / "slow.c", tmp_path / "librewarm-test-slow.so"
    source.write_text(SLOW)
    subprocess.run(["gcc", "-shared", "-fPIC", "-Wl,-soname,librewarm-test-slow.so", "-o", library, source], check=True)
    thread = threading.Thread(target=preload, args=[str(library)])
    thread.start()
    longest, last = 0.0, time.monotonic()
    while thread.is_alive():
        time.sleep(0.005)
        now = time.monotonic()
        longest, last = max(longest, now - last), now
    thread.join()
    assert longest < 0.3
    # By its name: no path of the loader's has it.
    assert ctypes.c_int.in_dll(ctypes.CDLL("librewarm-test-slow.so"), "rewarm_test_loaded").value == 1


@pytest.mark.parametrize("content", [None, b"", b"no library"])
def test_what_cannot_be_loaded(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "library.so"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(OSError, match=r"library\.so"):
        preload(str(path))
