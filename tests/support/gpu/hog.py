"""Holds the GPU's memory but FREE MiB until its standard input ends: python3 -m support.gpu.hog FREE"""

from __future__ import annotations

import sys

from support.workloads.gpu.driver_api import Cuda

_LEAST = 64 << 20


def main() -> None:
    cuda = Cuda()
    leave = int(sys.argv[1]) << 20
    held = 0
    # In one piece: what is left is a number that a test can compare.
    free, _total = cuda.memory()
    if free - leave >= _LEAST:
        cuda.allocate(free - leave)
        held = free - leave
    print(held, cuda.memory()[0], flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
