"""The server of gpu_fake.py with device memory by cudaMalloc beside it, as far as the device memory library serves it.

GET /probe as there, the digest is of both; GET /held -> bytes of that memory. Environment beside that of gpu_fake.py:
SERVED_MIB, sizes of allocations with commas between (8,4,2); those of an odd number are left zeros but for their last
page. CREATED_MIB, the same of memory that it creates itself, after those: every probe maps the first of these anew, and
of the others it keeps no handle; GET /unmap leaves the first unmapped until the next probe. CHURN_MIB: the same of
memory that a thread maps anew all the time, with no lock but the driver's, and looks into; GET /churn -> how often it
has done that, and what it has found wrong. The libraries are looked for in FAKE_CUDA_DIR.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import random
import threading
import time
from typing import Any

from support.workloads import gpu_fake, raw, virtual, web

ZERO_BYTES = 4096


class Memory:
    """Allocations of the program's own. Device memory can be read and written by its address: it is a fake's."""

    def __init__(self, seed: int) -> None:
        directory = os.environ["FAKE_CUDA_DIR"]
        # As Python loads PyTorch's: for itself alone. Who calls is bound to the preloaded library first.
        runtime = ctypes.CDLL(f"{directory}/libcudart.so.12", mode=os.RTLD_LOCAL | os.RTLD_NOW)
        own = ctypes.CDLL(None) if "device-memory" in os.environ.get("LD_PRELOAD", "") else runtime
        self.sizes = _sizes("SERVED_MIB", "8,4,2")
        self.addresses = []
        for size in self.sizes:
            found = ctypes.c_void_p()
            result = own.cudaMalloc(ctypes.byref(found), ctypes.c_size_t(size))
            assert result == 0, result
            assert found.value is not None
            self.addresses.append(found.value)
        self._calls = virtual.Calls(f"{directory}/libcuda.so.1")
        self._first: tuple[int, int, int] | None = None
        self._mapped = True
        for size in _sizes("CREATED_MIB", ""):
            handle, address = self._calls.create(size), self._calls.reserve(size)
            self._calls.map(address, size, handle)
            if self._first is None:
                self._first = address, size, handle
            else:
                self._calls.release(handle)
            self.sizes.append(size)
            self.addresses.append(address)
        for number, (address, size) in enumerate(zip(self.addresses, self.sizes, strict=True)):
            data = random.Random(seed * 100 + number).randbytes(ZERO_BYTES if number % 2 else size)
            ctypes.memmove(address + size - len(data), data, len(data))

    def unmap(self) -> None:
        assert self._first is not None
        self._calls.unmap(*self._first[:2])
        self._mapped = False

    def step(self, number: int) -> str:
        if self._first is not None:
            if self._mapped:
                self.unmap()
            self._calls.map(*self._first)
            self._mapped = True
        digest = hashlib.blake2b(digest_size=16)
        for address, size in zip(self.addresses, self.sizes, strict=True):
            ctypes.memmove(address + number * 5 * raw.PAGE % size, number.to_bytes(8, "little"), 8)
            digest.update(ctypes.string_at(address, size))
        return digest.hexdigest()


class Churn:
    """Every piece is known by its first bytes, also by what handle it has."""

    def __init__(self, own: gpu_fake.Context) -> None:
        self._own = own
        self._calls = virtual.Calls(f"{os.environ['FAKE_CUDA_DIR']}/libcuda.so.1")
        self._pieces = []
        for number, size in enumerate(_sizes("CHURN_MIB", ""), 1):
            handle, address = self._calls.create(size), self._calls.reserve(size)
            self._calls.map(address, size, handle)
            raw.write(address, number.to_bytes(8, "little"))
            self._pieces.append((address, size, handle))
        self.rounds = 0
        self.wrong: list[str] = []
        if self._pieces:
            threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        try:
            while True:
                for number, (address, size, handle) in enumerate(self._pieces, 1):
                    self._calls.unmap(address, size)
                    self._calls.map(address, size, handle)
                    with self._own.call():  # else it would not be there at times
                        found = int.from_bytes(raw.read(address, 8), "little")
                    if found != number:
                        self.wrong.append(f"piece {number} is {found}")
                    time.sleep(0.001)  # the rest is what captures are to find it in
                self.rounds += 1
        except RuntimeError as error:
            self.wrong.append(str(error))

    def state(self, _body: bytes) -> dict[str, Any]:
        return {"rounds": self.rounds, "wrong": self.wrong}


def _sizes(name: str, default: str) -> list[int]:
    return [int(word) * raw.MIB for word in os.environ.get(name, default).split(",") if word]


def serve() -> None:
    own = gpu_fake.context(0)
    memory = Memory(int(os.environ.get("SEED", "1")))

    def probe(_body: bytes) -> dict[str, Any]:
        answers = [own.probe()]
        with own.call():
            answers.append(memory.step(own.step))
        return {"step": own.step, "answers": answers}

    def unmap(_body: bytes) -> dict[str, Any]:
        with own.call():
            memory.unmap()
        return {}

    def fail(_body: bytes) -> dict[str, Any]:
        """The second access that is set from now on fails, and the third mapping."""
        driver = ctypes.CDLL(f"{os.environ['FAKE_CUDA_DIR']}/libcuda.so.1")
        driver.fake_set(b"fail_access", 2)
        driver.fake_set(b"fail_map", 3)
        return {}

    paths = {"/fail": fail, "/probe": probe, "/held": lambda _body: {"bytes": sum(memory.sizes)}, "/unmap": unmap}
    web.run(web.port(), {**paths, "/churn": Churn(own).state})


if __name__ == "__main__":
    serve()
