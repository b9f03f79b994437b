"""A process that holds MIB mebibytes of private, incompressible memory, every page different.

GET /hash -> BLAKE2b of all of it; GET /state. Environment: MIB (64), SEED (1), PORT (8000), TICK=1 prints "tick N"
every 100 ms.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import random
import threading
import time
from typing import Any

from support.workloads import web

BLOCK = 4 << 20


def fill(size: int, seed: int) -> mmap.mmap:
    """Private anonymous memory of `size` bytes filled from a generator seeded with `seed`."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    source = random.Random(seed)
    for start in range(0, size, BLOCK):
        memory[start : min(start + BLOCK, size)] = source.randbytes(min(BLOCK, size - start))
    return memory


def digest(memory: mmap.mmap) -> str:
    """BLAKE2b-256 of the memory, in hexadecimal."""
    state = hashlib.blake2b(digest_size=32)
    with memoryview(memory) as view:
        for start in range(0, len(view), BLOCK):
            state.update(view[start : start + BLOCK])
    return state.hexdigest()


def main() -> None:
    size = int(os.environ.get("MIB", "64")) << 20
    memory = fill(size, int(os.environ.get("SEED", "1")))
    nonce = os.urandom(16).hex()
    ticks = 0

    def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            print(f"tick {ticks}", flush=True)
            time.sleep(0.1)

    if os.environ.get("TICK") == "1":
        threading.Thread(target=tick, name="tick", daemon=True).start()

    def state(_body: bytes) -> dict[str, Any]:
        return {"pid": os.getpid(), "size": size, "nonce": nonce, "ticks": ticks}

    web.run(web.port(), {"/hash": lambda _body: {"hash": digest(memory), "size": size}, "/state": state})


if __name__ == "__main__":
    main()
