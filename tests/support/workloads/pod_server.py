"""A server as it stands in a pod: it takes a while to start, then tells what it is and has, and ends as it is told.

Environment: START, seconds until it is ready; MIB of memory; GRACE, seconds from SIGTERM to its end; OWN_IP, if set: it
listens on port 8001 of the addresses that /etc/hosts has for its host name, as Gloo does; OUTSIDE, HOST:PORT to which
it connects before it is ready.

GET /ready · /state -> what it is, JSON · /exit?CODE · /oom: takes memory until it is killed · /log?TEXT · /err?TEXT, to
standard error · /shm: what it keeps in /dev/shm · /own: each address that it listens on for its host name, as the
kernel has it · /loopback: a word through a connection inside of the container that was made before it was ready. /clock
-> CLOCK_MONOTONIC · /random: its next number · /keyctl: the errno of a system call that RuntimeDefault denies and a
container without a profile may make.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import random
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PORT, OWN_PORT = 8000, 8001
_SHM = Path("/dev/shm/pod-server")
_KEYCTL = {"x86_64": 250, "aarch64": 219}


def text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError as error:
        return f"error {error.errno}"


class Program:
    def __init__(self) -> None:
        self.identity = secrets.token_hex(16)
        self.began = time.monotonic()
        self.memory = bytearray(os.urandom(int(os.environ.get("MIB", "8")) << 20))
        _SHM.write_text(self.identity)
        self.own = [self._listen(*one) for one in self._own_addresses()] if "OWN_IP" in os.environ else []
        self.far, self.near = self._connected()
        self.outside: socket.socket | None = None
        with contextlib.suppress(OSError):
            host, _, port = os.environ.get("OUTSIDE", "").rpartition(":")
            self.outside = socket.create_connection((host, int(port or "0")), timeout=2)
        self.told: list[Any] = []
        self._register()
        random.seed(7)
        time.sleep(float(os.environ.get("START", "0")))
        self.last = time.monotonic()
        self.backwards = False

    @staticmethod
    def _own_addresses() -> list[tuple[socket.AddressFamily, Any]]:
        found = socket.getaddrinfo(socket.gethostname(), OWN_PORT, type=socket.SOCK_STREAM)
        return list(dict.fromkeys((family, address) for family, _, _, _, address in found))

    @staticmethod
    def _listen(family: socket.AddressFamily, address: Any) -> socket.socket:
        made = socket.socket(family, socket.SOCK_STREAM)
        made.bind(address)
        made.listen(8)
        threading.Thread(target=Program._greet, args=(made,), daemon=True).start()
        return made

    @staticmethod
    def _greet(listener: socket.socket) -> None:
        while True:
            with listener.accept()[0] as connection:
                connection.recv(4096)
                connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n" + json.dumps(str(listener.getsockname()[0])).encode())

    @staticmethod
    def _connected() -> tuple[socket.socket, socket.socket]:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            near = socket.create_connection(listener.getsockname())
            return listener.accept()[0], near

    def _register(self) -> None:
        """By what rewarm mounts into containers with its annotation; others have no such module."""
        try:
            from rewarm_hooks import workload
        except ImportError:
            return
        workload.on_restore(self.told.append)

    def ready(self) -> str:
        """Not before it knows who it is: where it was restored, it has to have been told."""
        if Path("/run/rewarm/restored.json").exists() and not self.told:
            raise LookupError("it was restored, and not told")
        return "ready"

    def connection(self) -> str:
        """What has become of the one to the outside."""
        if self.outside is None:
            return "none"
        self.outside.setblocking(False)
        try:
            return "open" if self.outside.recv(1, socket.MSG_PEEK) else "closed"
        except BlockingIOError:
            return "open"
        except OSError as error:
            return f"closed: {error.strerror}"

    def loopback(self) -> str:
        self.far.settimeout(5)
        self.near.sendall(b"hello")
        return self.far.recv(5).decode()

    def state(self) -> dict[str, Any]:
        now = time.monotonic()
        self.backwards |= now < self.last
        self.last = now
        status = dict(line.split(":\t", 1) for line in text("/proc/self/status").splitlines() if ":\t" in line)
        return {
            "identity": self.identity,
            "memory": hash(bytes(self.memory)),
            "pid": os.getpid(),
            "uid": os.getuid(),
            "groups": sorted(os.getgroups()),
            "hostname": socket.gethostname(),
            "hosts": text("/etc/hosts"),
            "resolv": text("/etc/resolv.conf"),
            "token": text("/var/run/secrets/kubernetes.io/serviceaccount/token"),
            "config": text("/etc/config/config"),
            "secret": text("/etc/secret/secret"),
            "restored": text("/run/rewarm/restored.json"),
            "capabilities": status["CapEff"],
            "bounding": status["CapBnd"],
            "no_new_privileges": status["NoNewPrivs"],
            "seccomp": status["Seccomp"],
            "cgroup": text("/proc/self/cgroup"),
            "backwards": self.backwards,
            "outside": self.connection(),
            "told": self.told,
            "writable": os.access("/", os.W_OK) and not os.statvfs("/").f_flag & os.ST_RDONLY,
        }

    @staticmethod
    def keyctl() -> int:
        """Of KEYCTL_GET_KEYRING_ID for no keyring, which the kernel refuses with another errno than the filter."""
        libc = ctypes.CDLL(None, use_errno=True)
        return ctypes.get_errno() if libc.syscall(_KEYCTL[platform.machine()], 0, 0, 0) < 0 else 0

    def oom(self) -> None:
        taken = []
        while True:
            taken.append(bytearray(b"x" * (8 << 20)))

    def answer(self, path: str, query: str) -> Any:
        answers: dict[str, Callable[[], Any]] = {
            "/ready": self.ready,
            "/state": self.state,
            "/oom": self.oom,
            "/exit": lambda: os._exit(int(query)),
            "/log": lambda: print(query, flush=True),
            "/err": lambda: print(query, file=sys.stderr, flush=True),
            "/shm": _SHM.read_text,
            "/own": lambda: [one.getsockname()[0] for one in self.own],
            "/loopback": self.loopback,
            "/clock": time.monotonic,
            "/random": random.random,
            "/keyctl": self.keyctl,
        }
        return answers[path]()


def main() -> None:
    grace = float(os.environ.get("GRACE", "0"))

    def end(number: int, frame: object) -> None:
        print("terminating", flush=True)
        time.sleep(grace)
        os._exit(0)

    signal.signal(signal.SIGTERM, end)
    program = Program()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path, _, query = self.path.partition("?")
            try:
                status, answer = 200, json.dumps(program.answer(path, query)).encode()
            except LookupError as error:
                status, answer = 503, json.dumps(str(error)).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        address_family = socket.AF_INET6
        daemon_threads = True

        def server_bind(self) -> None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            self.socket.bind(("::", PORT))
            self.server_name, self.server_port = "pod", PORT

    with Server(("::", PORT), Handler) as server:
        print("serving", flush=True)
        if Path("/run/rewarm").is_dir():
            Path("/run/rewarm/ready").touch()
        server.serve_forever(0.05)


if __name__ == "__main__":
    main()
