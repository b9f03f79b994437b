"""Pinned host memory, as source and as target of asynchronous copies; some of it is mapped into the GPU's addresses."""

from __future__ import annotations

from typing import Any

from support.workloads.gpu import base, tensors
from support.workloads.gpu.tensors import torch

SIZE = 64 << 20


class Pinned(base.Case):
    def __init__(self) -> None:
        self.host = torch.empty(SIZE // 8, dtype=torch.int64, pin_memory=True)
        self.constant = torch.arange(SIZE // 8, dtype=torch.int64).mul_(tensors.MULTIPLY).pin_memory()
        # Memory that was there before is registered, as engines do with what they share.
        self.registered = torch.arange(SIZE // 8, dtype=torch.int64)
        runtime = torch.cuda.cudart()
        assert int(runtime.cudaHostRegister(self.registered.data_ptr(), SIZE, 0)) == 0
        self.device = torch.empty(SIZE // 8, dtype=torch.int64, device="cuda")

    def reset(self) -> None:
        self.host.copy_(tensors.counted(SIZE, 5))

    def step(self) -> Any:
        self.device.copy_(self.host, non_blocking=True)
        tensors.advance(self.device)
        self.device.add_(self.constant.to("cuda", non_blocking=True))
        self.device.add_(self.registered.to("cuda", non_blocking=True))
        self.host.copy_(self.device, non_blocking=True)
        torch.cuda.synchronize()
        return tensors.digest(self.host)

    def checksum(self) -> Any:
        return tensors.digest(self.constant, self.registered)

    def state(self) -> dict[str, Any]:
        return {"pinned": [bool(self.host.is_pinned()), bool(self.constant.is_pinned())]}


def main() -> None:
    tensors.set_up()
    tensors.serve(Pinned())


if __name__ == "__main__":
    main()
