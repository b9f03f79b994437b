"""A server and a program that it started by fork and exec, both on the GPU; they speak over two pipes."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from support.workloads.gpu import base, tensors
from support.workloads.gpu.server import Server

CHILD = "child"


def child() -> None:
    """A method's name a line in, its result as JSON a line out."""
    server = Server(0.25, seed=3)
    server.reset()
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        print(json.dumps(getattr(server, line.strip())()), flush=True)


class Pair(base.Case):
    def __init__(self) -> None:
        words = [sys.executable, "-u", "-m", "support.workloads.gpu.child", CHILD]
        self.child = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.own = Server(0.25, seed=1)
        assert self._answer() == "ready"

    def _answer(self) -> Any:
        assert self.child.stdout is not None
        return json.loads(self.child.stdout.readline())

    def _both(self, method: str) -> list[Any]:
        assert self.child.stdin is not None
        self.child.stdin.write(method + "\n")
        self.child.stdin.flush()
        return [getattr(self.own, method)(), self._answer()]

    def reset(self) -> None:
        self._both("reset")

    def step(self) -> Any:
        return self._both("step")

    def checksum(self) -> Any:
        return self._both("checksum")


def main() -> None:
    tensors.set_up()
    if sys.argv[1:] == [CHILD]:
        child()
    else:
        tensors.serve(Pair())


if __name__ == "__main__":
    main()
