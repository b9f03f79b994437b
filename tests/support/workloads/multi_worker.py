"""The two child processes of the multi workload."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory
from multiprocessing.synchronize import Semaphore
from typing import Any

from support.workloads import syscalls
from support.workloads.semaphore import NamedSemaphore

SHARED_SIZE = 4 << 20


def digest(data: bytes | memoryview) -> str:
    """BLAKE2b-128 in hexadecimal."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def rings() -> int:
    """How many io_uring descriptors this process holds."""
    found = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            found += "io_uring" in os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue  # the descriptor of the listing itself
    return found


def pipe_worker(
    requests: Connection, answers: Connection, shared_name: str, semaphore: Semaphore, named: NamedSemaphore
) -> None:
    """Answers requests that come over one pipe on another, one by one, until the pipe ends."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    shared = SharedMemory(shared_name)
    private = random.Random(os.getpid()).randbytes(1 << 20)
    sum_at_start = digest(private)
    count = 0
    while True:
        try:
            what, value = requests.recv()
        except EOFError:
            return
        count += 1
        answer: Any
        if what == "ping":
            answer = value + 1
        elif what == "shared":
            assert shared.buf is not None
            answer = digest(shared.buf)
        elif what == "acquire":
            answer = semaphore.acquire(timeout=value)
        elif what == "release":
            semaphore.release()
            answer = True
        elif what == "post":
            named.post()
            answer = True
        else:
            answer = {
                "pid": os.getpid(),
                "count": count,
                "affinity": sorted(os.sched_getaffinity(0)),
                "private_intact": digest(private) == sum_at_start,
            }
        answers.send(answer)


@dataclass
class Connections:
    """TCP clients of the loop process."""

    opened: int = 0
    closed: int = 0


def loop_worker(port: int, socket_path: str, ready: Connection) -> None:
    """A uvloop event loop, which would use io_uring: echoes lines on a TCP port and on a unix socket.

    The line "state" is answered with the loop's own state instead.
    """
    import uvloop  # type: ignore[import-not-found, unused-ignore]

    tcp = Connections()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, count: Connections | None) -> None:
        if count is not None:
            count.opened += 1
        try:
            while line := await reader.readline():
                if line.strip() == b"state":
                    denied = syscalls.io_uring_errno()
                    line = f"{os.getpid()} {tcp.opened} {tcp.closed} {rings()} {denied} {uvloop.__version__}\n".encode()
                writer.write(line)
                await writer.drain()
        except ConnectionError:
            pass  # the client is gone, or its connection did not survive a restore
        finally:
            if count is not None:
                count.closed += 1
            writer.close()

    async def run() -> None:
        await asyncio.start_server(lambda r, w: serve(r, w, tcp), "0.0.0.0", port)
        await asyncio.start_unix_server(lambda r, w: serve(r, w, None), socket_path)
        ready.send(os.getpid())
        await asyncio.Event().wait()

    uvloop.run(run())
