"""A server and a worker process made by multiprocessing's `spawn`, both with a CUDA context and graphs of their own."""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection
from typing import Any

from support.workloads.gpu import base, tensors
from support.workloads.gpu.server import Server


def work(pipe: Connection) -> None:
    """The worker: a method's name in, its result out."""
    tensors.set_up()
    server = Server(0.25, seed=2)
    server.reset()
    pipe.send("ready")
    while True:
        pipe.send(getattr(server, pipe.recv())())


class Pair(base.Case):
    def __init__(self) -> None:
        here, there = multiprocessing.Pipe()
        self.pipe = here
        context = multiprocessing.get_context("spawn")
        self.worker = context.Process(target=work, args=(there,), daemon=True)
        self.worker.start()
        there.close()
        self.own = Server(0.25, seed=1)
        assert here.recv() == "ready"

    def _both(self, method: str) -> list[Any]:
        self.pipe.send(method)
        return [getattr(self.own, method)(), self.pipe.recv()]

    def reset(self) -> None:
        self._both("reset")

    def step(self) -> Any:
        return self._both("step")

    def checksum(self) -> Any:
        return self._both("checksum")


def main() -> None:
    tensors.set_up()
    tensors.serve(Pair())


if __name__ == "__main__":
    main()
