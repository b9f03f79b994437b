"""A program of the driver API with ordinary device memory. Under MPS it is a client of that."""

from __future__ import annotations

import hashlib
from typing import Any

from support.workloads.gpu import base
from support.workloads.gpu.driver_api import Cuda

SIZE = 64 << 20


class Filled(base.Case):
    """Fills its memory with another number at each step; what is read back depends on the number before as well."""

    def __init__(self, cuda: Cuda, address: int) -> None:
        self.cuda = cuda
        self.address = address
        self.value = 0

    def reset(self) -> None:
        self.value = 0
        self.cuda.fill(self.address, 0, SIZE // 4)

    def step(self) -> Any:
        before = self.cuda.read(self.address, 64)
        self.value = (self.value * 1664525 + 1013904223) % (1 << 32)
        self.cuda.fill(self.address, self.value, SIZE // 8)
        return hashlib.blake2b(before + self.cuda.read(self.address, SIZE), digest_size=16).hexdigest()


def main() -> None:
    cuda = Cuda()
    base.serve(Filled(cuda, cuda.allocate(SIZE)))


if __name__ == "__main__":
    main()
