"""Device memory whose handle is exported as a descriptor, which stays open."""

from __future__ import annotations

from support.workloads.gpu import base
from support.workloads.gpu.driver_api import Cuda
from support.workloads.gpu.plain import SIZE, Filled


def main() -> None:
    cuda = Cuda()
    address, _descriptor = cuda.exported(SIZE)
    base.serve(Filled(cuda, address))


if __name__ == "__main__":
    main()
