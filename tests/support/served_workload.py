"""Programs with the device memory library over the fake driver (fake_gpu.py), as processes of this machine.

As a program (`python -m support.served_workload`) it is gpu_served.py with many pieces, of which little is filled.
GET /probe -> {"step", "digest"}: of the first page of each, which every call changes; GET /hold begins a call that
only /let_go ends. Environment beside that of gpu_fake.py: PIECES, each of 2 MiB.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from support.fake_gpu import FakeGpus
from support.proc import state_of
from support.workloads import gpu_fake, raw, web

TESTS = Path(__file__).parents[1]
SECONDS = 20.0
MIB = 1 << 20
PIECE = 2 * MIB
GPU_SERVED, MANY = "support.workloads.gpu_served", "support.served_workload"


class Workload:
    """`module` is GPU_SERVED or MANY."""

    def __init__(self, gpus: FakeGpus, library: Path, module: str = GPU_SERVED, **environment: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        own = {"LD_PRELOAD": str(library), "PYTHONPATH": str(TESTS), "PORT": str(self._port), "DEVICE_MIB": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-m", module],
            env={**os.environ, **gpus.environment(), **own, **environment},
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self.process.pid
        assert self.process.stdout is not None
        if self.process.stdout.readline() != "ready\n":
            self.close()
            raise AssertionError(f"{module} has not started")

    def get(self, path: str, timeout: float = SECONDS) -> Any:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._port}{path}", timeout=timeout) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path}: {error.read().decode()}") from None

    def probe(self) -> Any:
        return self.get("/probe")

    def was_continued(self) -> bool:
        """Whether it was stopped and has gone on since the last time that this was asked."""
        return os.waitid(os.P_PID, self.pid, os.WCONTINUED | os.WNOHANG) is not None

    @property
    def stopped(self) -> bool:
        return state_of(self.pid) in ("T", "t")

    def close(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
            self.process.communicate()


@contextlib.contextmanager
def killed_in_the_end(process: int) -> Iterator[None]:
    """A child of this process."""
    try:
        yield
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


def serve() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # the fake has a file for each piece
    own = gpu_fake.context(0)
    runtime = ctypes.CDLL(None)  # the preloaded library comes first
    ctypes.CDLL(f"{os.environ['FAKE_CUDA_DIR']}/libcudart.so.12", mode=os.RTLD_LOCAL | os.RTLD_NOW)
    addresses: list[int] = []
    for _ in range(int(os.environ["PIECES"])):
        found = ctypes.c_void_p()
        assert runtime.cudaMalloc(ctypes.byref(found), ctypes.c_size_t(PIECE)) == 0 and found.value is not None
        addresses.append(found.value)
    held: list[contextlib.AbstractContextManager[None]] = []

    def probe(_body: bytes) -> dict[str, Any]:
        digest = hashlib.blake2b(digest_size=16)
        with own.call():
            own.step += 1
            for number, address in enumerate(addresses):
                word = (own.step << 32 | number).to_bytes(8, "little")
                ctypes.memmove(address + own.step * 8 % raw.PAGE, word, 8)
                digest.update(ctypes.string_at(address, raw.PAGE))
        return {"step": own.step, "digest": digest.hexdigest()}

    def hold(_body: bytes) -> dict[str, Any]:
        held.append(own.call())
        held[-1].__enter__()
        return {"thread": threading.get_native_id()}

    def let_go(_body: bytes) -> dict[str, Any]:
        held.pop().__exit__(None, None, None)
        return {}

    web.run(web.port(), {"/probe": probe, "/hold": hold, "/let_go": let_go})


if __name__ == "__main__":
    serve()
