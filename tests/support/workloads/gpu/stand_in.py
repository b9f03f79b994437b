"""Any case on a machine without a GPU: the same routes and the same kind of answers, out of MIB (16) of memory."""

from __future__ import annotations

import hashlib
import os
import time
from typing import Any

from support.workloads.gpu import base
from support.workloads.memory import digest, fill_fast


class StandIn(base.Case):
    def __init__(self) -> None:
        self.memory = fill_fast(int(os.environ.get("MIB", "16")) << 20, 1)
        self.last = ""

    def reset(self) -> None:
        self.last = ""

    def step(self) -> Any:
        self.last = hashlib.blake2b(self.last.encode() + self.memory[:4096], digest_size=16).hexdigest()
        return self.last

    def checksum(self) -> Any:
        return digest(self.memory)

    def busy(self, seconds: float) -> None:
        time.sleep(0)


if __name__ == "__main__":
    base.serve(StandIn())
