"""Managed memory, which the driver cannot checkpoint."""

from __future__ import annotations

from support.workloads.gpu import base
from support.workloads.gpu.driver_api import Cuda
from support.workloads.gpu.plain import SIZE, Filled


def main() -> None:
    cuda = Cuda()
    base.serve(Filled(cuda, cuda.managed(SIZE)))


if __name__ == "__main__":
    main()
