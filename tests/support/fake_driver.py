"""The fake CUDA driver without rewarm: its library by ctypes, and its workload as a process of this machine."""

from __future__ import annotations

import ctypes
import json
import os
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

from support import fake_gpu
from support.fake_gpu import FakeGpus

TESTS = Path(__file__).parents[1]
SECONDS = 20


class Driver:
    """The library by ctypes; each call returns its CUresult."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))

    def call(self, name: str, pid: int, argument: Any = None) -> int:
        found: int = getattr(self.library, f"cuCheckpointProcess{name}")(pid, argument)
        return found

    def state(self, pid: int) -> int:
        found = ctypes.c_int(-1)
        assert self.call("GetState", pid, ctypes.byref(found)) == 0
        return found.value

    def thread(self, pid: int) -> int:
        found = ctypes.c_int(-1)
        assert self.call("GetRestoreThreadId", pid, ctypes.byref(found)) == 0
        return found.value

    def lock(self, pid: int, timeout_ms: int = 5000) -> int:
        return self.call("Lock", pid, timeout_ms.to_bytes(64, "little"))

    def checkpoint(self, pid: int) -> int:
        return self.call("Checkpoint", pid, bytes(64))

    def restore(self, pid: int, *pairs: tuple[str, str]) -> int:
        array = b"".join(fake_gpu.uuid_bytes(one) for pair in pairs for one in pair)
        kept = ctypes.create_string_buffer(array, max(1, len(array)))
        address = ctypes.addressof(kept) if pairs else 0
        return self.call("Restore", pid, address.to_bytes(8, "little") + len(pairs).to_bytes(56, "little"))

    def unlock(self, pid: int) -> int:
        return self.call("Unlock", pid, bytes(64))

    def name(self, code: int) -> bytes | None:
        found = ctypes.c_char_p()
        self.library.cuGetErrorName(code, ctypes.byref(found))
        return found.value


class Workload:
    """gpu_fake.py as a process of this machine."""

    def __init__(self, gpus: FakeGpus, **environment: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-m", "support.workloads.gpu_fake"],
            env={**os.environ, **gpus.environment(), "PYTHONPATH": str(TESTS), "PORT": str(self.port),
                 "DEVICE_MIB": "1", **environment},
            stdout=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        self.pid = self.process.pid
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def get(self, path: str, timeout: float = SECONDS) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=timeout) as answer:
            return json.load(answer)

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
