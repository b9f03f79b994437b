"""Small servers that speak the administrative endpoints of vLLM and of SGLang, with the state that those change.

They fail as the real ones do: vLLM ends when requests are scheduled while its weights are away, SGLang's scheduler dies
when memory is released while it is busy, or resumed without having been released.

    python -m support.workloads.engines vllm|sglang HOST [--port PORT] [--without PATH]...

serves until it is killed; the first line it prints is its port. Beside an engine's endpoints, and not among its calls:
POST /generate {"seconds": S} -> {}, a request that is in flight for S seconds and begins when nothing is paused;
GET /state -> {"calls", "loads", "paused", "in_flight", "cached", "alive", "starting"};
POST /set {NAME: VALUE} -> the same, with those changed.
"""

from __future__ import annotations

import argparse
import http.server
import json
import socket
import socketserver
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self

Answer = tuple[int, bytes]
OK = (200, b"")
_TICK = 0.01
_READY = Path("/run/rewarm/ready")
ABSENT = (404, b'{"detail":"Not Found"}')


class Engine:
    """A server at `host`; `without` names endpoints that this version of it does not have.

    calls: each request as "METHOD path";  loads: what was in flight when each came, and was answered;  in_flight:
    requests that it serves, -1 once it has aborted them;  cached: whether its caches hold anything;  paused, alive:
    what they say;  starting: how many times its health is still 503.
    """

    busy_while_paused = True
    """Whether requests in flight come to their end while it is paused."""

    def __init__(self, *without: str, host: str = "127.0.0.1", port: int = 0, key: str = "") -> None:
        self.without = without
        self.key = key
        self.calls: list[str] = []
        self.loads: list[tuple[int, int]] = []
        self.in_flight = 0
        self.cached = True
        self.paused = False
        self.alive = True
        self.starting = 0
        self.on_pause: Callable[[], None] = lambda: None
        self._lock = threading.Lock()
        engine = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_GET(self) -> None:
                engine._serve(self)

            do_POST = do_GET

            def log_message(self, format: str, *args: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
            daemon_threads = True
            block_on_close = False

            def server_bind(self) -> None:
                # Not HTTPServer's: it asks the resolver for a name, which a fresh network cannot answer.
                socketserver.TCPServer.server_bind(self)
                self.server_name, self.server_port = "engine", int(self.server_address[1])

            def handle_error(self, request: object, client_address: object) -> None:
                pass  # a client that has given up

        self.server: http.server.HTTPServer = Server((host, port), Handler)
        self.port = int(self.server.server_address[1])
        self._thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.server.shutdown()
        self.server.server_close()

    def connect(self, seconds: float) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=seconds)

    def end_requests(self, after: float) -> None:
        """All requests in flight are done `after` seconds."""

        def end() -> None:
            time.sleep(after)
            self.in_flight = 0

        threading.Thread(target=end, daemon=True).start()

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        path, _, query = handler.path.partition("?")
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        own = {"/generate": self.generate, "/set": self.set, "/state": self.set}.get(path)
        call, load = f"{handler.command} {path}", self.in_flight
        if own is not None:
            status, answer = 200, json.dumps(own(json.loads(body or b"{}"))).encode()
        elif path in self.without:
            status, answer = ABSENT
        elif self.key and handler.headers.get("Authorization") != f"Bearer {self.key}":
            status, answer = 401, b'{"error":"Unauthorized"}'
        else:
            status, answer = self.answer(handler.command, path, query, body)
        if own is None:
            with self._lock:
                self.calls.append(call)
                self.loads.append((load, self.in_flight))
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(answer)))
        handler.end_headers()
        handler.wfile.write(answer)
        handler.close_connection = True

    def generate(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """One request of a client, which is scheduled only while nothing is paused."""
        while True:
            with self._lock:
                if not self.paused:
                    self.in_flight += 1
                    self.cached = True
                    break
            time.sleep(_TICK)
        left = float(wanted["seconds"])
        while left > 0:
            time.sleep(_TICK)
            left -= _TICK if self.busy_while_paused or not self.paused else 0
        with self._lock:
            self.in_flight -= 1
        return {}

    def set(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """Change what is wanted; everything as it is then."""
        for name, value in wanted.items():
            setattr(self, name, value)
        names = ("calls", "loads", "paused", "in_flight", "cached", "alive", "starting")
        with self._lock:
            return {name: getattr(self, name) for name in names}

    def answer(self, method: str, path: str, query: str, body: bytes) -> Answer:
        raise NotImplementedError

    def _pause(self) -> None:
        with self._lock:  # none begins after this
            self.paused = True

    def health(self) -> Answer:
        if self.starting:
            self.starting -= 1
            return 503, b""
        return OK if self.alive else (503, b"")


class Vllm(Engine):
    """vLLM with VLLM_SERVER_DEV_MODE=1. `level`: how deep it sleeps, if it does."""

    level: int | None = None
    waits_by = "mode=wait"
    drains = True

    def answer(self, method: str, path: str, query: str, body: bytes) -> Answer:
        if (method, path) == ("GET", "/health"):
            return self.health()
        if (method, path) == ("GET", "/is_sleeping"):
            return 200, json.dumps({"is_sleeping": self.paused or self.level is not None}).encode()
        if (method, path) == ("POST", "/wake_up"):
            self.level, self.paused = None, False
            return OK
        if (method, path) == ("POST", "/sleep"):
            self.level, self.paused = 1, True
            return OK
        if (method, path) == ("POST", "/reset_prefix_cache"):
            self.cached = self.cached and self.in_flight > 0  # it answers 200 in any case
            return OK
        if (method, path) == ("POST", "/pause"):
            self._pause()
            if self.waits_by not in query.split("&"):
                self.in_flight = -1  # aborted
            while self.in_flight > 0 and self.paused:
                time.sleep(0.01)
            self.cached = False
            return 200, b'{"status":"paused"}'
        if (method, path) == ("POST", "/resume"):
            self.alive = self.alive and self.level is None
            self.paused = False
            return 200, b'{"status":"resumed"}'
        return ABSENT


class Sglang(Engine):
    busy_while_paused = False
    released: tuple[str, ...] = ()

    def answer(self, method: str, path: str, query: str, body: bytes) -> Answer:
        if method == "GET" and path in ("/health", "/health_generate"):
            return (503, b"") if self.paused else self.health()  # the real one takes 20 s to say so
        if path == "/flush_cache":
            if self.in_flight:
                return 400, b"Cache not flushed because there are pending requests."
            self.cached = False
            return 200, b"Cache flushed.\n"
        if (method, path) == ("POST", "/pause_generation"):
            if json.loads(body)["mode"] == "abort":
                self.in_flight = -1
            self._pause()
            self.on_pause()
            return 200, b'{"status":"ok"}'
        if (method, path) == ("POST", "/continue_generation"):
            json.loads(body)
            self.paused = False
            return 200, b'{"status":"ok"}'
        if path == "/release_memory_occupation":
            self.alive = self.alive and not self.in_flight
            self.released = ("kv_cache",)
            return OK
        if path == "/resume_memory_occupation":
            self.alive = self.alive and bool(self.released)
            self.released = ()
            return OK
        return ABSENT


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=("vllm", "sglang"))
    parser.add_argument("host")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--without", action="append", default=[])
    wanted = parser.parse_args()
    make = Vllm if wanted.kind == "vllm" else Sglang
    engine = make(*wanted.without, host=wanted.host, port=wanted.port)
    if _READY.parent.is_dir():
        _READY.touch()
    print(engine.port, flush=True)
    while True:
        time.sleep(60)


if __name__ == "__main__":
    main()
