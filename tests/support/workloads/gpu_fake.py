"""A server with "device memory", for the fake CUDA driver of tests/support/fake_cuda.c, which describes the page.

GET /probe -> {"step": N, "answers": […]}: one digest for each process, out of its device memory, which each call
changes. As a CUDA program's, it waits while the driver has locked any of the processes. GET /where -> for each
process its GPU, state and pid. Environment: FAKE_CUDA_DIR, GPUS (UUIDs with commas between; process N uses number N,
from the start again when there are fewer; default: the first of the node file), CHILDREN (0), DEVICE_MIB (8),
SEED (1), PORT (8000); MANAGED=1, MPS=1, BUSY=1: what the driver then refuses. UVM names a file to map as the real
driver maps /dev/nvidia-uvm: 2 MiB of it, more with MANAGED.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

from support.workloads import raw, web

PAGE_ADDRESS = 0x7CA000000000
MAP_FIXED_NOREPLACE = 0x100000
RUNNING = 0
FLAGS = {"MANAGED": 1, "MPS": 2, "BUSY": 4}


class Page(ctypes.Structure):
    """`struct page` of fake_cuda.h."""

    _fields_ = (
        ("magic", ctypes.c_char * 8),
        ("state", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("region", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
        ("beats", ctypes.c_uint32),
        ("thread", ctypes.c_uint32),
        ("in_flight", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
        ("uuid", ctypes.c_ubyte * 16),
        ("token", ctypes.c_char * 32),
    )

    @property
    def gpu(self) -> str:
        return f"GPU-{UUID(bytes=bytes(self.uuid))}"


class Context:
    """What a CUDA context is to this process: the page, the region, the device memory's file, the driver's thread."""

    def __init__(self, gpu: str, size: int, seed: int) -> None:
        self.devices: Path = Path(os.environ["FAKE_CUDA_DIR"]) / "devices"
        self.step = 0
        self._lock = threading.Lock()
        raw.memory(raw.PAGE, flags=MAP_FIXED_NOREPLACE, at=PAGE_ADDRESS)
        self.page = page = Page.from_address(PAGE_ADDRESS)
        page.flags = sum(bit for name, bit in FLAGS.items() if os.environ.get(name) == "1")
        page.region, page.size = raw.memory(size), size
        page.uuid[:] = UUID(gpu.removeprefix("GPU-")).bytes
        page.token = os.urandom(8).hex().encode()
        self.file.write_bytes(random.Random(seed).randbytes(size))
        if uvm := os.environ.get("UVM"):
            _map_uvm(uvm, (4 if page.flags & FLAGS["MANAGED"] else 2) * raw.MIB)
        threading.Thread(target=self._beat, name="cuda-restore", daemon=True).start()
        while not page.beats:
            time.sleep(0.001)
        page.magic = b"FAKECUDA"

    @property
    def file(self) -> Path:
        """Never kept open: the real driver leaves no descriptor behind at a checkpoint, either."""
        return self.devices / self.page.gpu / str(self.page.token, "ascii")

    def _beat(self) -> None:
        self.page.thread = threading.get_native_id()
        while True:
            self.page.beats += 1
            time.sleep(0.005)

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """A CUDA API call: begins when the process is not locked, and is over before it is."""
        while True:
            with self._lock:
                self.page.in_flight += 1
                if self.page.state == RUNNING:
                    break
                self.page.in_flight -= 1
            time.sleep(0.002)
        try:
            yield
        finally:
            with self._lock:
                self.page.in_flight -= 1

    def probe(self) -> str:
        """Write the next step into the device memory, and digest all of it."""
        with self.call():
            self.step += 1
            with self.file.open("r+b") as file:
                file.seek(self.step * 5 * raw.PAGE % self.page.size)
                file.write(self.step.to_bytes(8, "little"))
                file.seek(0)
                return hashlib.blake2b(file.read(), digest_size=16).hexdigest()


def where(pid: int) -> dict[str, Any]:
    """Of a process by its page, which can be read while the process waits in a call."""
    memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY)
    try:
        page = Page.from_buffer_copy(os.pread(memory, ctypes.sizeof(Page), PAGE_ADDRESS))
    finally:
        os.close(memory)
    return {"gpu": page.gpu, "state": page.state, "pid": pid}


def _map_uvm(name: str, length: int) -> None:
    with open(name, "w+b") as file:
        file.truncate(length)
        raw.memory(length, flags=raw.MAP_SHARED, fd=file.fileno())


def default_gpu() -> str:
    """The first GPU of the node file."""
    for line in (Path(os.environ["FAKE_CUDA_DIR"]) / "node").read_text().splitlines():
        if line.startswith("gpu "):
            return line.split()[1]
    raise SystemExit("no GPU on this node")


def context(number: int) -> Context:
    gpus = os.environ.get("GPUS", "").split(",") if os.environ.get("GPUS") else [default_gpu()]
    size = int(os.environ.get("DEVICE_MIB", "8")) * raw.MIB
    return Context(gpus[number % len(gpus)], size, int(os.environ.get("SEED", "1")) + number)


class Child:
    """Another process with a context; ready when made."""

    def __init__(self, number: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-u", "-m", "support.workloads.gpu_fake", str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._process.pid
        assert self._process.stdout is not None and self._process.stdout.readline() == "ready\n"

    def probe(self) -> str:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write("probe\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().strip()


def serve_child(number: int) -> None:
    own = context(number)
    print("ready", flush=True)
    for _line in sys.stdin:
        print(own.probe(), flush=True)


def serve() -> None:
    # Before there is a context: a fork would copy the page, and with it what no forked process has of CUDA.
    children = [Child(number + 1) for number in range(int(os.environ.get("CHILDREN", "0")))]
    own = context(0)
    whole = threading.Lock()  # requests have threads, but steps and pipes are one after the other

    def probe(_body: bytes) -> dict[str, Any]:
        with whole:
            answers = [own.probe(), *(child.probe() for child in children)]
            return {"step": own.step, "answers": answers}

    routes: dict[str, web.Route] = {
        "/probe": probe,
        "/where": lambda _body: [where(pid) for pid in (os.getpid(), *(child.pid for child in children))],
    }
    web.run(web.port(), routes)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        serve_child(int(sys.argv[1]))
    else:
        serve()
