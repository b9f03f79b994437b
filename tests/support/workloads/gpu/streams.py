"""Three streams that wait for each other by events. Each step leaves the next one's work in flight behind it."""

from __future__ import annotations

from typing import Any

from support.workloads.gpu import base, tensors
from support.workloads.gpu.tensors import torch

SIZE = 32 << 20
DELAY = 0.02
"""Seconds that the work in flight takes at least."""


class Streams(base.Case):
    def __init__(self) -> None:
        self.streams = [torch.cuda.Stream(priority=priority) for priority in (0, -1, 0)]
        self.events = [torch.cuda.Event(enable_timing=timing) for timing in (False, True, False)]
        self.numbers = [tensors.counted(SIZE, seed) for seed in (1, 2, 3)]

    def reset(self) -> None:
        torch.cuda.synchronize()
        for seed, numbers in enumerate(self.numbers, 1):
            numbers.copy_(tensors.counted(SIZE, seed))
        torch.cuda.synchronize()
        self._launch()

    def _launch(self) -> None:
        """The last event of a round is the first thing that the next one waits for."""
        for at, stream in enumerate(self.streams):
            with torch.cuda.stream(stream):
                stream.wait_event(self.events[at - 1])
                tensors.spin(DELAY / len(self.streams))
                tensors.advance(self.numbers[at])
                self.numbers[at].add_(self.numbers[at - 1])
                self.events[at].record(stream)

    def step(self) -> Any:
        self.events[-1].synchronize()
        found = tensors.digest(*self.numbers)
        self._launch()
        return found


def main() -> None:
    tensors.set_up()
    tensors.serve(Streams())


if __name__ == "__main__":
    main()
