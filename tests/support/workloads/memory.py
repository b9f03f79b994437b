"""A process that holds MIB mebibytes of private, incompressible memory, every page different.

GET /hash -> BLAKE2b of all of it; GET /probe -> of one page in 4 MiB; GET /state. Environment: MIB (64), SEED (1),
PORT (8000), FAST=1 takes seconds less for each GiB to get ready, TICK=1 prints "tick N" every 100 ms.
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
PAGE = mmap.PAGESIZE


def fill(size: int, seed: int) -> mmap.mmap:
    """Private anonymous memory of `size` bytes filled from a generator seeded with `seed`."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    source = random.Random(seed)
    for start in range(0, size, BLOCK):
        memory[start : min(start + BLOCK, size)] = source.randbytes(min(BLOCK, size - start))
    return memory


def fill_fast(size: int, seed: int) -> mmap.mmap:
    """As `fill`, out of one random block that is turned by another number of bytes for each."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    block = random.Random(seed).randbytes(BLOCK)
    twice = memoryview(block + block)
    for number, start in enumerate(range(0, size, BLOCK)):
        turn = number * 1021 % BLOCK
        memory[start : min(start + BLOCK, size)] = twice[turn : turn + min(BLOCK, size - start)]
    return memory


def probe(memory: mmap.mmap) -> str:
    """BLAKE2b-256 of one page of each block: cheap, and wrong if any block is missing."""
    state = hashlib.blake2b(digest_size=32)
    with memoryview(memory) as view:
        for start in range(0, len(view), BLOCK):
            state.update(view[start : start + PAGE])
    return state.hexdigest()


def digest(memory: mmap.mmap) -> str:
    """BLAKE2b-256 of the memory, in hexadecimal."""
    state = hashlib.blake2b(digest_size=32)
    with memoryview(memory) as view:
        for start in range(0, len(view), BLOCK):
            state.update(view[start : start + BLOCK])
    return state.hexdigest()


def main() -> None:
    size = int(os.environ.get("MIB", "64")) << 20
    make = fill_fast if os.environ.get("FAST") == "1" else fill
    memory = make(size, int(os.environ.get("SEED", "1")))
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

    routes: dict[str, web.Route] = {
        "/hash": lambda _body: {"hash": digest(memory), "size": size},
        "/probe": lambda _body: {"probe": probe(memory)},
        "/state": state,
    }
    web.run(web.port(), routes)


if __name__ == "__main__":
    main()
