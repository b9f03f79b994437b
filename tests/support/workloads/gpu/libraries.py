"""Handles and plans of cuBLAS, cuDNN and cuFFT, which keep state on the GPU and in the process."""

from __future__ import annotations

from typing import Any

from support.workloads.gpu import base, tensors
from support.workloads.gpu.tensors import torch


class Libraries(base.Case):
    def __init__(self) -> None:
        generator = torch.Generator(device="cuda")
        generator.manual_seed(7)
        self.matrix = torch.randn(1024, 1024, device="cuda", generator=generator) / 24
        self.kernel = torch.randn(16, 16, 3, 3, device="cuda", generator=generator) / 8
        self.start = torch.randn(4, 16, 64, 64, device="cuda", generator=generator)
        self.x = self.start.clone()
        assert torch.backends.cudnn.is_available()

    def reset(self) -> None:
        self.x.copy_(self.start)
        self._forward(self.start)  # so that every handle is there before the first capture

    def _forward(self, x: Any) -> Any:
        y = torch.nn.functional.conv2d(x, self.kernel, padding=1)
        y = torch.tanh(y.reshape(-1, 1024) @ self.matrix).view_as(x)
        return torch.tanh(torch.fft.irfft2(torch.fft.rfft2(y) * 1.5, s=(64, 64)))

    def step(self) -> Any:
        self.x.copy_(self._forward(self.x))
        return tensors.digest(self.x)

    def checksum(self) -> Any:
        return tensors.digest(self.matrix, self.kernel)


def main() -> None:
    tensors.set_up()
    tensors.serve(Libraries())


if __name__ == "__main__":
    main()
