"""A server with GIB gibibytes of weights (DTYPE bfloat16 or float32), whose answers come from a captured CUDA graph.

Beside them KV_GIB of cache, made as vLLM and SGLang make theirs (zeros), of which a warm-up has used KV_USED_MIB.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

from support.workloads.gpu import base, tensors
from support.workloads.gpu.tensors import torch

WIDTH = 4096
LAYERS = 8
BATCH = 16
SETTINGS = (("GIB", "1"), ("KV_GIB", "0"), ("KV_USED_MIB", "0"))


class Server(base.Case):
    """A small network over matrices spread over all weights; its output is the next step's input."""

    def __init__(
        self,
        gib: float,
        seed: int = 1,
        dtype: str = "bfloat16",
        kv_gib: float = 0,
        kv_used_mib: int = 0,
        memory: contextlib.AbstractContextManager[None] | None = None,
    ) -> None:
        """`memory`: inside it weights and cache are made."""
        kind = getattr(torch, dtype)
        with memory or contextlib.nullcontext():
            self.weights = tensors.weights(int(gib * (1 << 30)), seed, kind)
            self.cache = [torch.zeros(1 << 29, dtype=torch.bfloat16, device="cuda") for _ in range(int(kv_gib))]
        matrices = [part[: WIDTH * WIDTH].view(WIDTH, WIDTH) for part in self.weights if part.numel() >= WIDTH * WIDTH]
        self.matrices = matrices[:: max(1, len(matrices) // LAYERS)][:LAYERS]
        for part, used in zip(self.cache, _shares(kv_used_mib << 20, len(self.cache)), strict=True):
            part[: used // 2].fill_(1.5)
        self.start = torch.linspace(-1, 1, BATCH * WIDTH, device="cuda").to(kind).view(BATCH, WIDTH)
        self.x = self.start.clone()
        self.sample = torch.zeros((), dtype=torch.int64, device="cuda")
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._forward()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._forward()

    def _forward(self) -> None:
        y = self.x
        for matrix in self.matrices:
            y = torch.tanh(y @ matrix)
        self.x.copy_(y)
        self.sample.copy_(tensors.samples(self.weights))

    def reset(self) -> None:
        self.x.copy_(self.start)
        # Memory comes and goes, as in a program that goes on for long.
        torch.zeros(96 << 20, dtype=torch.uint8, device="cuda").add_(1)
        torch.cuda.empty_cache()
        torch.cuda.synchronize()

    def step(self) -> Any:
        self.graph.replay()
        return tensors.digest(self.x, self.sample)

    def checksum(self) -> Any:
        return tensors.total([*self.weights, *self.cache])

    def busy(self, seconds: float) -> None:
        tensors.spin(seconds)

    def state(self) -> dict[str, Any]:
        return {
            "weights": sum(part.numel() * part.element_size() for part in self.weights),
            "kv_bytes": sum(part.numel() * part.element_size() for part in self.cache),
        }


def _shares(size: int, count: int) -> list[int]:
    return [size // count] * count if count else []


def settings() -> tuple[float, ...]:
    return tuple(float(os.environ.get(name, default)) for name, default in SETTINGS)


def main() -> None:
    tensors.set_up()
    gib, kv, used = settings()
    tensors.serve(Server(gib, dtype=os.environ.get("DTYPE", "bfloat16"), kv_gib=kv, kv_used_mib=int(used)))


if __name__ == "__main__":
    main()
