"""An API server for one node: HTTPS, a CA and a token of its own, and a strict look at each request."""

from __future__ import annotations

import http.server
import json
import secrets
import ssl
import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import trustme


@dataclass
class Asked:
    """One request, as it came."""

    method: str
    path: str
    token: str
    content_type: str
    body: Any


@dataclass
class KubeApi:
    """`directory` gets a ServiceAccount's files: token and ca.crt. `refuse` is a status that every request gets."""

    directory: Path
    node: str
    labels: dict[str, str] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)
    refuse: int = 0

    def __post_init__(self) -> None:
        self.directory.mkdir(parents=True)
        self.token = secrets.token_urlsafe(24)
        self.directory.joinpath("token").write_text(self.token + "\n")
        authority = trustme.CA()
        authority.cert_pem.write_to_path(str(self.directory / "ca.crt"))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("127.0.0.1").configure_cert(context)
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def __enter__(self) -> KubeApi:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def environment(self) -> dict[str, str]:
        """What a pod has."""
        return {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(self.port)}

    def answer(self, asked: Asked) -> tuple[int, Any]:
        """As the API server: 401 without the token, 404 for another path, 415 for a type that is no merge patch."""
        self.asked.append(asked)
        if self.refuse:
            return self.refuse, {"kind": "Status", "message": "nodes is forbidden: told so by the test"}
        if asked.token != f"Bearer {self.token}":
            return 401, {"kind": "Status", "message": "Unauthorized"}
        if asked.method != "PATCH" or asked.path.partition("?")[0] != f"/api/v1/nodes/{self.node}":
            return 404, {"kind": "Status", "message": "the server could not find the requested resource"}
        if asked.content_type != "application/merge-patch+json":
            return 415, {"kind": "Status", "message": f"not a patch: {asked.content_type}"}
        for key, value in asked.body["metadata"]["labels"].items():
            if value is None:
                self.labels.pop(key, None)
            else:
                self.labels[key] = value
        return 200, {"kind": "Node", "metadata": {"name": self.node, "labels": self.labels}}

    def _handler(self) -> type[http.server.BaseHTTPRequestHandler]:
        api = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def _any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                asked = Asked(
                    self.command,
                    self.path,
                    self.headers.get("Authorization", ""),
                    self.headers.get("Content-Type", ""),
                    json.loads(body) if body else None,
                )
                status, answer = api.answer(asked)
                content = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_PATCH = do_PUT = do_POST = do_DELETE = _any

            def log_message(self, format: str, *args: object) -> None: ...

        return Handler
