"""Programs under rewarm-device-memory.so with the fake CUDA of tests/support/device_memory, and its control socket."""

from __future__ import annotations

import array
import contextlib
import ctypes
import os
import select
import socket
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from support.proc import wait_for

REPOSITORY = Path(__file__).parents[2]
SOURCES = Path(__file__).parent / "device_memory"
SECONDS = 20.0
MIB = 1 << 20
GIB = 1 << 30
HASHED = "libcudart-8774224f.so.12"
"""The CUDA runtime by a name as wheels give it."""
FLAVOURS = ("plain", "sanitized", "musl")
C_FLAGS = ("-std=gnu17", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror", "-O1", "-fPIC")

HELLO, LIST, OWN, EXPORT, UNMAP, MAP = range(1, 7)
IMPORTED, AWAY = 1, 2
MAGIC = 0x314D4452
MESSAGE = struct.Struct("<IIQiIQQQ16s")
PIDFD_GETFD = 438

# What the fake driver counts.
HANDLES, MAPPED, RESERVED, ALLOCATED, SYNCS, USED, BROKEN, TINY, ANCHORS = range(9)


@dataclass(frozen=True)
class Built:
    """The library and the programs of one flavour: musl has its programs from musl, and the plain library."""

    flavour: str
    directory: Path

    @property
    def library(self) -> Path:
        return self.directory / "rewarm-device-memory.so"

    def environment(self, *preloaded: str | Path, **more: str) -> dict[str, str]:
        """`preloaded`: instead of the library alone."""
        preload = [str(one) for one in preloaded or [self.library]]
        if self.flavour == "sanitized":
            preload.insert(0, output_of("cc", "-print-file-name=libasan.so"))
        return {
            **os.environ,
            "LD_PRELOAD": " ".join(preload),
            "LD_LIBRARY_PATH": str(self.directory),
            # The fake forgets contexts at a reset.
            "LSAN_OPTIONS": f"suppressions={self.directory / 'leaks'}:print_suppressions=0",
            **more,
        }


def output_of(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=SECONDS).stdout.strip()


def make_library(directory: Path, *variables: str) -> Path:
    target = directory / "rewarm-device-memory.so"
    command: tuple[str | Path, ...] = (
        "make",
        "-s",
        "-C",
        REPOSITORY / "native",
        f"BUILD={directory}",
        *variables,
        target,
    )
    subprocess.run(command, check=True, timeout=60)
    return target


def build(base: Path, flavour: str) -> Built:
    """Builds below `base` what is not there yet."""
    built = Built(flavour, base / f"device-memory-{flavour}")
    if built.directory.exists():
        return built
    built.directory.mkdir()
    compiler = "musl-gcc" if flavour == "musl" else "cc"

    def compile_c(target: str, source: str, *more: str) -> None:
        command: tuple[str | Path, ...] = (
            compiler,
            *C_FLAGS,
            "-o",
            target,
            SOURCES / source,
            *more,
            "-ldl",
            "-pthread",
        )
        subprocess.run(command, check=True, cwd=built.directory, timeout=60)

    for name in ("libcuda.so.1", "libcudart.so.12", HASHED):
        # With a version on every symbol, and calls among them bound to their own, as the real ones have it.
        soname = f"-Wl,-soname,{name},--default-symver,-Bsymbolic"
        compile_c(name, f"fake_{name.partition('.')[0].partition('-')[0]}.c", "-shared", "-fvisibility=hidden", soname)
    compile_c("program", "program.c", "./libcudart.so.12")
    compile_c("program-driver", "program.c", "-DWITH_DRIVER", "./libcudart.so.12", "./libcuda.so.1")
    compile_c("plugin.so", "plugin.c", "-shared", "./libcudart.so.12")
    compile_c("plugin-hashed.so", "plugin.c", "-shared", f"./{HASHED}")
    compile_c("plugin-own.so", "plugin.c", "-shared", str(SOURCES / "fake_libcudart.c"))
    compile_c("between.so", "between.c", "-shared")
    if flavour == "plain":  # musl has no dlvsym
        compile_c("host-linked", "host.c", "-Wl,--no-as-needed", "./libcudart.so.12", "./libcuda.so.1")
        compile_c("limiter.so", "limiter.c", "-shared")
        compile_c("limiter-create.so", "limiter.c", "-shared", "-DCREATE")
        compile_c("limiter-hidden.so", "limiter.c", "-shared", "-DCREATE", "-DHIDDEN")
        compile_c("limiter-direct.so", "limiter.c", "-shared", "-DDIRECT")
        compile_c("address", "address.c", "-fno-pic", "-no-pie", "./libcudart.so.12", "./libcuda.so.1")
        compile_c("address-pie", "address.c", "-pie", "./libcudart.so.12", "./libcuda.so.1")
    compile_c("host", "host.c")
    compile_c("bare", "bare.c")
    compile_c("bare-static", "bare.c", "-static")
    (built.directory / "leaks").write_text("leak:libcuda.so.1\n")
    make_library(built.directory, *(["SANITIZE=1"] if flavour == "sanitized" else []))
    return built


@dataclass(frozen=True)
class Message:
    op: int
    sequence: int
    status: int
    device: int
    address: int
    size: int
    count: int
    uuid: bytes


def pack(op: int, sequence: int, address: int = 0, size: int = 0, magic: int = MAGIC) -> bytes:
    return MESSAGE.pack(magic, op, sequence, 0, 0, address, size, 0, b"")


class Control:
    """The end of the control socket that the process keeps for rewarm."""

    def __init__(self, pid: int, number: int) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        pidfd = os.pidfd_open(pid)
        try:
            descriptor = libc.syscall(PIDFD_GETFD, pidfd, number, 0)
        finally:
            os.close(pidfd)
        assert descriptor >= 0, os.strerror(ctypes.get_errno())
        self.socket = socket.socket(fileno=descriptor)
        self.socket.settimeout(SECONDS)
        self.sequence = 0
        self.at_end = 0

    def send(self, data: bytes, descriptors: Sequence[int] = ()) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        self.socket.sendmsg([data], rights)

    def receive(self) -> tuple[Message, list[int]]:
        data, controls, _, _ = self.socket.recvmsg(1024, socket.CMSG_SPACE(64))
        numbers = array.array("i")
        for _, _, content in controls:
            numbers.frombytes(content)
        assert len(data) == MESSAGE.size
        magic, *fields = MESSAGE.unpack(data)
        assert magic == MAGIC
        return Message(*fields), list(numbers)

    def ask(
        self, op: int, address: int = 0, size: int = 0, descriptors: Sequence[int] = ()
    ) -> tuple[Message, list[int]]:
        self.sequence += 1
        self.send(pack(op, self.sequence, address, size), descriptors)
        answer, received = self.receive()
        assert (answer.op, answer.sequence) == (op, self.sequence)
        return answer, received

    def status(self, op: int, address: int, size: int, descriptors: Sequence[int] = ()) -> int:
        """For what has no descriptor in its answer."""
        answer, received = self.ask(op, address, size, descriptors)
        assert received == [] and (answer.address, answer.size) == (address, size)
        return answer.status

    def export(self, address: int, size: int) -> int:
        answer, received = self.ask(EXPORT, address, size)
        assert answer.status == 0 and len(received) == 1
        return received[0]

    def changing(self) -> int:
        """Threads in the middle of a call."""
        self.pieces()
        return self.at_end

    def pieces(self) -> list[Message]:
        self.sequence += 1
        self.send(pack(LIST, self.sequence))
        found: list[Message] = []
        while True:
            answer, received = self.receive()
            assert (answer.op, answer.sequence, answer.status, received) == (LIST, self.sequence, 0, [])
            if answer.size == 0:
                assert answer.count == len(found)
                self.at_end = answer.address
                return found
            found.append(answer)


class Program:
    """program.c, which does what it is told."""

    def __init__(self, built: Built, driver: bool = False, **environment: str) -> None:
        self.built = built
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [built.directory / ("program-driver" if driver else "program")],
            env=built.environment(**environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )
        self.control: Control | None = None

    def tell(self, *words: str | int) -> list[int]:
        self.begin(*words)
        return self.finish()

    def begin(self, *words: str | int) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(" ".join(str(word) for word in words) + "\n")
        self.process.stdin.flush()

    def busy(self) -> bool:
        """Whether what was begun has no answer yet."""
        assert self.process.stdout is not None
        return select.select([self.process.stdout], [], [], 0)[0] == []

    def finish(self) -> list[int]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the program ended: {self.stderr()}"
        return [int(word) for word in line.split()]

    def do(self, *words: str | int) -> int:
        (result,) = self.tell(*words)
        return result

    def malloc(self, size: int, word: str = "malloc") -> int:
        result, address = self.tell(word, size)
        assert result == 0
        return address

    def counts(self) -> list[int]:
        """Handles, mappings, reservations; and the driver's own allocations but the tag that each served one has."""
        assert self.do("count", TINY) == self.do("count", RESERVED)
        return [self.do("count", which) for which in (HANDLES, MAPPED, RESERVED, ALLOCATED)]

    def descriptors(self) -> int:
        """How many there are when the thread is done with all requests, also with what comes after its answer."""
        self.connect().ask(HELLO)
        return self.do("descriptors")

    def threads(self) -> list[str]:
        found = []
        for path in Path(f"/proc/{self.process.pid}/task").glob("*/comm"):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                found.append(path.read_text().strip())
        return found

    def number(self) -> int:
        """That of the descriptor for rewarm."""
        (name,) = (name for name in self.threads() if name.startswith("rewarm-mem-"))
        return int(name.rpartition("-")[2])

    def connect(self) -> Control:
        if self.control is None:
            self.control = Control(self.process.pid, self.number())
        return self.control

    def wait_without_thread(self) -> None:
        wait_for("the end of the thread", lambda: not any(name.startswith("rewarm") for name in self.threads()))

    def stderr(self) -> str:
        self.errors.seek(0)
        return self.errors.read()

    def end(self) -> None:
        """Lets it come to its own end, where the sanitizers look for leaks."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(SECONDS) == 0, self.stderr()
        self.close()

    def close(self) -> None:
        if self.control is not None:
            self.control.socket.close()
        self.process.kill()
        self.process.wait(SECONDS)
        for stream in (self.process.stdin, self.process.stdout, self.errors):
            assert stream is not None
            stream.close()
