"""The server of gpu_fake.py with device memory by cudaMalloc beside it, as far as the device memory library serves it.

GET /probe as there, the digest is of both; GET /held -> bytes that a cudaMalloc gave. Environment beside that of
gpu_fake.py: SERVED_MIB, sizes of allocations with commas between (8,4,2); those of an odd number are left zeros but for
their last page. The libraries are looked for in FAKE_CUDA_DIR.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import random
from typing import Any

from support.workloads import gpu_fake, raw, web

ZERO_BYTES = 4096


class Memory:
    """Allocations of the program's own. Device memory can be read and written by its address: it is a fake's."""

    def __init__(self, seed: int) -> None:
        directory = os.environ["FAKE_CUDA_DIR"]
        # As Python loads PyTorch's: for itself alone. Who calls is bound to the preloaded library first.
        runtime = ctypes.CDLL(f"{directory}/libcudart.so.12", mode=os.RTLD_LOCAL | os.RTLD_NOW)
        own = ctypes.CDLL(None) if "device-memory" in os.environ.get("LD_PRELOAD", "") else runtime
        self.sizes = [int(word) * raw.MIB for word in os.environ.get("SERVED_MIB", "8,4,2").split(",")]
        self.addresses = []
        for number, size in enumerate(self.sizes):
            found = ctypes.c_void_p()
            result = own.cudaMalloc(ctypes.byref(found), ctypes.c_size_t(size))
            assert result == 0, result
            assert found.value is not None
            self.addresses.append(found.value)
            data = random.Random(seed * 100 + number).randbytes(ZERO_BYTES if number % 2 else size)
            ctypes.memmove(found.value + size - len(data), data, len(data))

    def step(self, number: int) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for address, size in zip(self.addresses, self.sizes, strict=True):
            ctypes.memmove(address + number * 5 * raw.PAGE % size, number.to_bytes(8, "little"), 8)
            digest.update(ctypes.string_at(address, size))
        return digest.hexdigest()


def serve() -> None:
    own = gpu_fake.context(0)
    memory = Memory(int(os.environ.get("SEED", "1")))

    def probe(_body: bytes) -> dict[str, Any]:
        answers = [own.probe()]
        with own.call():
            answers.append(memory.step(own.step))
        return {"step": own.step, "answers": answers}

    web.run(web.port(), {"/probe": probe, "/held": lambda _body: {"bytes": sum(memory.sizes)}})


if __name__ == "__main__":
    serve()
