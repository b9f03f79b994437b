"""A program whose threads count in a file: `python -m support.counting FILE NAME…`, a thread for each name, which it
has as the kernel knows it. That at position N counts in the Nth 8 bytes; after those SIGUSR1 is counted, by a handler.
A line "spawn N" on standard input has thread N make a new one, which counts in 8 bytes behind that. "sleep" sleeps.
"""

from __future__ import annotations

import ctypes
import mmap
import signal
import struct
import sys
import threading
import time

_PR_SET_NAME = 15
_libc = ctypes.CDLL(None)


def main(path: str, names: list[str]) -> None:
    with open(path, "r+b") as file:
        counts = mmap.mmap(file.fileno(), mmap.PAGESIZE)
    wanted = [threading.Event() for _ in names]

    def add(at: int) -> None:
        struct.pack_into("<Q", counts, 8 * at, struct.unpack_from("<Q", counts, 8 * at)[0] + 1)

    def count(at: int, name: str) -> None:
        _libc.prctl(_PR_SET_NAME, name.encode(), 0, 0, 0)
        while True:
            add(at)
            time.sleep(0.001)
            if at < len(names) and wanted[at].is_set():
                wanted[at].clear()
                threading.Thread(target=count, args=(len(names) + 1, "born"), daemon=True).start()

    def listen() -> None:
        for line in sys.stdin:
            wanted[int(line.split()[1])].set()

    signal.signal(signal.SIGUSR1, lambda *_: add(len(names)))
    for at, name in enumerate(names[1:], 1):
        threading.Thread(target=count, args=(at, name), daemon=True).start()
    threading.Thread(target=listen, daemon=True).start()
    print("ready", flush=True)
    count(0, names[0])


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
