"""A model that torch.compile made kernels for, with Inductor's compile workers still there."""

from __future__ import annotations

import os
from typing import Any

# Two workers are as good as one for each processor, and there is a pool of processes.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "2")

from support.workloads.gpu import base, tensors
from support.workloads.gpu.tensors import torch

WIDTH = 1024


class Compiled(base.Case):
    def __init__(self) -> None:
        torch.manual_seed(11)
        layers = [
            torch.nn.Linear(WIDTH, WIDTH),
            torch.nn.GELU(),
            torch.nn.LayerNorm(WIDTH),
            torch.nn.Linear(WIDTH, WIDTH),
            torch.nn.Tanh(),
        ]
        self.model = torch.nn.Sequential(*layers).to("cuda")
        self.compiled = torch.compile(self.model)
        self.start = torch.randn(64, WIDTH, device="cuda")
        self.x = self.start.clone()
        self.compiled(self.x)

    def reset(self) -> None:
        self.x.copy_(self.start)

    def step(self) -> Any:
        self.x.copy_(self.compiled(self.x))
        return tensors.digest(self.x)

    def checksum(self) -> Any:
        return tensors.digest(*self.model.parameters())


def main() -> None:
    tensors.set_up()
    tensors.serve(Compiled())


if __name__ == "__main__":
    main()
