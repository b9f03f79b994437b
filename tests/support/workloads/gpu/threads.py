"""Threads that launch kernels all the time, each on a stream of its own: a capture comes in the middle of them.

An answer has what every thread's memory was after so many rounds, whenever that was.
"""

from __future__ import annotations

import threading
from typing import Any

from support.workloads.gpu import base, tensors
from support.workloads.gpu.tensors import torch

THREADS = 4
SIZE = 32 << 20
ROUNDS = 400
"""Kernels of a round, two of them a step of the numbers."""
EVERY = 5
"""Rounds between two answers."""


class Loop:
    """One thread; `sums` are what it had after each round."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.changed = threading.Condition()
        self.sums: list[int] = []
        self.again = False
        threading.Thread(target=self._run, name=f"kernels-{seed}", daemon=True).start()

    def _run(self) -> None:
        torch.set_grad_enabled(False)
        with torch.cuda.stream(torch.cuda.Stream()):
            numbers = tensors.counted(SIZE, self.seed)
            while True:
                for _ in range(ROUNDS // 2):
                    tensors.advance(numbers)
                found = int(numbers.sum().item())
                with self.changed:
                    if self.again:
                        self.again = False
                        self.sums = []
                        numbers.copy_(tensors.counted(SIZE, self.seed))
                    else:
                        self.sums.append(found)
                    self.changed.notify_all()

    def reset(self) -> None:
        with self.changed:
            self.again = True
            self.changed.wait_for(lambda: not self.again)

    def after(self, rounds: int) -> int:
        with self.changed:
            self.changed.wait_for(lambda: len(self.sums) >= rounds)
            return self.sums[rounds - 1]


class Threads(base.Case):
    def __init__(self) -> None:
        self.loops = [Loop(seed + 1) for seed in range(THREADS)]
        self.number = 0

    def reset(self) -> None:
        self.number = 0
        for loop in self.loops:
            loop.reset()

    def step(self) -> Any:
        self.number += 1
        return [str(loop.after(self.number * EVERY)) for loop in self.loops]


def main() -> None:
    tensors.set_up()
    # Not `tensors.serve`: the threads never let the GPU rest.
    base.serve(Threads())


if __name__ == "__main__":
    main()
