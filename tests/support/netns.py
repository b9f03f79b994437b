"""Network namespaces: named ones made by iproute2, sockets and HTTP inside them, and veth pairs between two of them."""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import json
import os
import secrets
import socket
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

from support.proc import CommandFailed, command, wait_for

CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


class HttpError(Exception):
    """An HTTP answer with a status other than 200."""


class NetworkNamespace:
    """A network namespace bound to /run/netns/NAME, with its loopback up. Removed by `close`.

    The kernel frees the namespace when the last process in it ends; `close` only takes the name away.
    """

    def __init__(self, name: str | None = None) -> None:
        self.name = name or f"rwt-{os.getpid()}-{secrets.token_hex(3)}"
        self.path = Path("/run/netns") / self.name
        command("ip", "netns", "add", self.name)
        try:
            command("ip", "-n", self.name, "link", "set", "lo", "up")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> NetworkNamespace:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Removes the name; a second call does nothing."""
        if self.path.exists():
            command("ip", "netns", "delete", self.name)

    def argv(self, *argv: str | Path) -> list[str]:
        """The command line that runs `argv` in this namespace.

        By nsenter and not `ip netns exec`: that makes a mount namespace too, and mounts made inside would be hidden.
        """
        return ["nsenter", f"--net={self.path}", "--", *(str(a) for a in argv)]

    def run(self, *argv: str | Path, timeout: float = 60.0) -> str:
        """Runs a command inside and returns its standard output. Raises CommandFailed."""
        return command(*self.argv(*argv), timeout=timeout).stdout

    def open_socket(self, kind: int = socket.SOCK_STREAM, family: int = socket.AF_INET) -> socket.socket:
        """A new socket of this namespace. It stays in it whichever thread uses it. Raises OSError."""
        made: list[socket.socket] = []
        failed: list[OSError] = []

        def enter() -> None:
            # A thread of its own: setns(2) moves one thread, which ends here and so never has to go back.
            try:
                descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    if _libc.setns(descriptor, CLONE_NEWNET) != 0:
                        number = ctypes.get_errno()
                        raise OSError(number, os.strerror(number), f"setns {self.path}")
                finally:
                    os.close(descriptor)
                made.append(socket.socket(family, kind))
            except OSError as error:
                failed.append(error)

        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
        if failed:
            raise failed[0]
        return made[0]

    def connect(self, port: int, host: str = "127.0.0.1", *, timeout: float = 10.0) -> socket.socket:
        """A TCP connection made from inside. Raises OSError."""
        made = self.open_socket(family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        try:
            made.settimeout(timeout)
            made.connect((host, port))
        except BaseException:
            made.close()
            raise
        return made

    def http(
        self,
        port: int,
        path: str,
        *,
        body: bytes | None = None,
        host: str = "127.0.0.1",
        timeout: float = 30.0,
    ) -> tuple[int, bytes]:
        """One HTTP request from inside, POST if there is a body, else GET: status and body. Raises OSError."""
        connection = http.client.HTTPConnection(host, port, timeout=timeout)
        connection.sock = self.connect(port, host, timeout=timeout)
        try:
            connection.request("GET" if body is None else "POST", path, body=body, headers={"Connection": "close"})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def json(
        self, port: int, path: str, *, body: bytes | None = None, host: str = "127.0.0.1", timeout: float = 30.0
    ) -> Any:
        """As `http`, with the body of a 200 answer parsed as JSON. Raises HttpError for another status."""
        status, answer = self.http(port, path, body=body, host=host, timeout=timeout)
        if status != 200:
            raise HttpError(f"{path} on port {port}: status {status}: {answer[:500].decode(errors='replace')}")
        return json.loads(answer)

    def wait_http(self, port: int, path: str, *, host: str = "127.0.0.1", timeout: float = 60.0) -> bytes:
        """Asks every 10 ms until the answer is 200 and returns its body. Raises Timeout.

        A refused or broken connection counts as "not yet".
        """

        def probe() -> tuple[bytes] | None:
            with contextlib.suppress(OSError, http.client.HTTPException):
                status, answer = self.http(port, path, host=host, timeout=timeout)
                return (answer,) if status == 200 else None
            return None

        return wait_for(f"http://{host}:{port}{path} in {self.name}", probe, timeout=timeout, interval=0.01)[0]


def join(
    first: NetworkNamespace,
    second: NetworkNamespace,
    first_address: str = "10.231.77.1/24",
    second_address: str = "10.231.77.2/24",
) -> None:
    """Connects two namespaces by a veth pair with the given addresses. The pair goes when either namespace does.

    Raises CommandFailed.
    """
    near, far = (f"rw{secrets.token_hex(4)}" for _ in range(2))
    command("ip", "-n", first.name, "link", "add", near, "type", "veth", "peer", far, "netns", second.name)
    try:
        for namespace, device, address in ((first, near, first_address), (second, far, second_address)):
            command("ip", "-n", namespace.name, "address", "add", address, "dev", device)
            command("ip", "-n", namespace.name, "link", "set", device, "up")
    except CommandFailed:
        command("ip", "-n", first.name, "link", "delete", near)
        raise
