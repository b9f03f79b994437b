"""Four processes with an engine's memory: a server and three workers, started anew as `spawn` does, not forked.

Each worker holds tensors (random data), a KV cache (zeros that were written, in one piece as it is before the first
requests, and zeros scattered by the page), and a heap of many small Python objects. Of all memory the share ZEROS is
zero pages. The server asks the workers over pipes; an answer is computed from every worker's tensors.

GET /state -> {"processes": [pids], "bytes", "answer"}: the first answer; GET /hash -> digest of all memory of each
process. Environment: PORT (8000), MIB (2560) in all, ZEROS (0.4), WORKERS (3).
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import random
import subprocess
import sys
import threading
from typing import Any

from support.workloads import web
from support.workloads.memory import BLOCK, digest

PAGE = mmap.PAGESIZE
MIB = 1 << 20


class Engine:
    """One process's share: `mib` mebibytes, of which the share `zeros` is zero pages that are present in memory."""

    def __init__(self, mib: int, zeros: float, seed: int) -> None:
        self.source = random.Random(seed)
        size = mib * MIB
        heap = min(size // 20, 64 * MIB)
        cache = int(size * zeros * 0.8) // PAGE * PAGE
        self.heap = {str(n): {"id": n, "text": f"token {n}" * 3} for n in range(heap // 400)}
        self.cache = self._memory(cache)
        for start in range(0, cache, PAGE):
            self.cache[start] = 0  # written, so that the page is there and holds zeros
        tensors = size - cache - heap
        scattered = (size * zeros - cache) / tensors
        self.tensors = [self._tensor(part, scattered) for part in _parts(tensors, 24 * MIB)]

    def _memory(self, size: int) -> mmap.mmap:
        return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    def _tensor(self, size: int, zeros: float) -> mmap.mmap:
        """Random data with runs of zero pages, 1 to 16 long."""
        made = self._memory(size)
        for start in range(0, size, BLOCK):
            made[start : min(start + BLOCK, size)] = self.source.randbytes(min(BLOCK, size - start))
        pages = size // PAGE
        left = int(pages * zeros)
        while left > 0:
            length = min(self.source.randint(1, 16), left)
            at = self.source.randrange(pages - length + 1) * PAGE
            made[at : at + length * PAGE] = bytes(length * PAGE)
            left -= length
        return made

    def state(self) -> dict[str, Any]:
        """A digest of one page of every tensor, and of one entry of the heap: what an answer would read."""
        found = hashlib.blake2b(digest_size=16)
        for tensor in self.tensors:
            found.update(tensor[len(tensor) // 2 : len(tensor) // 2 + PAGE])
        found.update(self.heap[str(len(self.heap) // 2)]["text"].encode())  # type: ignore[attr-defined]
        size = len(self.cache) + sum(map(len, self.tensors))
        return {"pid": os.getpid(), "bytes": size, "answer": found.hexdigest()}

    def hash(self) -> str:
        found = hashlib.blake2b(digest_size=16)
        for memory in (self.cache, *self.tensors):
            found.update(digest(memory).encode())
        found.update(json.dumps(self.heap).encode())
        return found.hexdigest()


def _parts(size: int, part: int) -> list[int]:
    """`size` in pieces of `part`, each a multiple of the page; the last one takes the rest."""
    count = max(size // part, 1)
    return [part] * (count - 1) + [(size - part * (count - 1)) // PAGE * PAGE]


class Worker:
    """The server's side of a worker process: one question at a time."""

    def __init__(self, number: int) -> None:
        command = [sys.executable, "-u", "-m", "support.workloads.vllm_like", str(number)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._lock = threading.Lock()

    def ask(self, what: str) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        with self._lock:
            self.process.stdin.write(what + "\n")
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline())


def make(number: int) -> Engine:
    """The engine of worker `number`, or of the server (0), which holds a tenth."""
    mib, workers = int(os.environ.get("MIB", "2560")), int(os.environ.get("WORKERS", "3"))
    own = mib // 10 if number == 0 else (mib - mib // 10) // workers
    return Engine(own, float(os.environ.get("ZEROS", "0.4")), 100 + number)


def work(number: int) -> None:
    engine = make(number)
    for line in sys.stdin:
        print(json.dumps(engine.hash() if line.strip() == "hash" else engine.state()), flush=True)


def main() -> None:
    if len(sys.argv) > 1:
        work(int(sys.argv[1]))
        return
    workers = [Worker(number + 1) for number in range(int(os.environ.get("WORKERS", "3")))]
    engine = make(0)
    for worker in workers:
        worker.ask("state")  # it answers once its memory is filled

    def state(_body: bytes) -> dict[str, Any]:
        found = [engine.state(), *(worker.ask("state") for worker in workers)]
        answer = hashlib.blake2b("".join(entry["answer"] for entry in found).encode(), digest_size=16).hexdigest()
        return {
            "processes": [entry["pid"] for entry in found],
            "bytes": sum(entry["bytes"] for entry in found),
            "answer": answer,
        }

    def hashes(_body: bytes) -> dict[str, str]:
        return {str(number): worker.ask("hash") for number, worker in enumerate(workers, 1)} | {"0": engine.hash()}

    web.run(web.port(), {"/state": state, "/hash": hashes})


if __name__ == "__main__":
    main()
