"""The HTTP side of the workloads: JSON routes, the ready signal, and an orderly end.

PID 1 ignores signals that it has no handler for, so SIGTERM gets one: exit status 0. GET /exit/N ends with status N.
"""

from __future__ import annotations

import json
import os
import signal
import socketserver
import sys
import threading
import time
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import FrameType
from typing import Any

CONTROL_DIRECTORY = Path("/run/rewarm")

Route = Callable[[bytes], Any]  # request body -> what becomes the JSON answer


class Server(ThreadingHTTPServer):
    """Listens on all addresses; every connection has its thread, kept alive as clients like."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port: int, routes: Mapping[str, Route]) -> None:
        self.routes = dict(routes)
        super().__init__(("0.0.0.0", port), Handler)

    def server_bind(self) -> None:
        # Not HTTPServer's: it asks the resolver for the machine's full name, which a fresh network cannot answer.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = "workload", self.server_address[1]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Headers and body leave in two writes; Nagle's algorithm would hold the second back for the client's delayed ACK.
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        assert isinstance(self.server, Server)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        route = self.server.routes.get(self.path)
        leave = self.path.startswith("/exit/") and self.path[6:].isdigit()
        status, answer = 200, {}
        if route is not None:
            try:
                answer = route(body)
            except Exception as error:
                status, answer = 500, {"error": f"{type(error).__name__}: {error}"}
        elif not leave:
            status, answer = 404, {"error": f"no route {self.path}"}
        data = json.dumps(answer, sort_keys=True).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
        if leave:
            self.wfile.flush()
            os._exit(int(self.path[6:]))

    def log_message(self, format: str, *args: Any) -> None:
        """A line a request would fill the container's log."""


def run(port: int, routes: Mapping[str, Route]) -> None:
    """Serves, and does not return."""
    start(port, routes).join()


def start(port: int, routes: Mapping[str, Route]) -> threading.Thread:
    """Listens, says that it is ready (file in the control directory if there is one, line on stdout), and serves.

    To be called by the main thread, which alone may set the handler of SIGTERM.
    """
    began = time.monotonic()
    routes = {"/health": lambda _body: {"ok": True, "pid": os.getpid(), "serving_since": began}, **routes}
    server = Server(port, routes)

    def leave(_number: int, _frame: FrameType | None) -> None:
        sys.exit(0)

    signal.signal(signal.SIGTERM, leave)
    # The server has a thread of its own, so that it serves already when the ready signal is seen.
    thread = threading.Thread(target=server.serve_forever, name="http", daemon=True)
    thread.start()
    if CONTROL_DIRECTORY.is_dir():
        (CONTROL_DIRECTORY / "ready").touch()
    print("ready", flush=True)
    return thread


def port(default: int = 8000) -> int:
    """The port to listen on, by environment variable PORT."""
    return int(os.environ.get("PORT", str(default)))
