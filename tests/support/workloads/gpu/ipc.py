"""Device memory that a process exports by CUDA IPC and its worker imports (torch.multiprocessing)."""

from __future__ import annotations

from typing import Any

from support.workloads.gpu import base, tensors
from support.workloads.gpu.tensors import torch

SIZE = 64 << 20


def work(pipe: Any) -> None:
    """The importer: changes the exporter's memory."""
    tensors.set_up()
    numbers = pipe.recv()
    pipe.send("ready")
    while True:
        pipe.recv()
        tensors.advance(numbers)
        torch.cuda.synchronize()
        pipe.send("done")


class Shared(base.Case):
    def __init__(self) -> None:
        import torch.multiprocessing as processes  # type: ignore[import-not-found, unused-ignore]

        context = processes.get_context("spawn")
        self.pipe, there = context.Pipe()
        self.worker = context.Process(target=work, args=(there,), daemon=True)
        self.worker.start()
        self.numbers = tensors.counted(SIZE, 9)
        torch.cuda.synchronize()
        self.pipe.send(self.numbers)
        assert self.pipe.recv() == "ready"

    def reset(self) -> None:
        self.numbers.copy_(tensors.counted(SIZE, 9))
        torch.cuda.synchronize()

    def step(self) -> Any:
        self.pipe.send("next")
        assert self.pipe.recv() == "done"
        return tensors.digest(self.numbers)


def main() -> None:
    tensors.set_up()
    tensors.serve(Shared())


if __name__ == "__main__":
    main()
