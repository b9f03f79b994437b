"""redis-server in a container, and a client that speaks its protocol (RESP2) over a socket."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from support import rootfs
from support.bundle import Bundle

PORT = 6379
DATA = "/var/lib/redis"
ARGS = ("redis-server", "--protected-mode", "no", "--dir", DATA, "--save", "")


class RedisError(Exception):
    """The server's answer was an error; the text is its own."""


class Closed(Exception):
    """The connection has ended, by the server's FIN or a reset."""


class Client:
    """One connection. Answers come as int, str, None or lists of these; bulk strings are decoded as UTF-8."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._answers = connection.makefile("rb")

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._answers.close()
        self._socket.close()

    def send(self, *words: str | int) -> None:
        """Sends a command and does not wait. Raises Closed."""
        encoded = [str(word).encode() for word in words]
        data = b"*%d\r\n" % len(encoded) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in encoded)
        try:
            self._socket.sendall(data)
        except ConnectionError as error:
            raise Closed(str(error)) from error

    def receive(self) -> Any:
        """The next answer. Raises RedisError, Closed, and TimeoutError when nothing comes."""
        line = self._line()
        kind, text = line[:1], line[1:].decode()
        if kind == b"+":
            return text
        if kind == b"-":
            raise RedisError(text)
        if kind == b":":
            return int(text)
        if kind == b"*":
            return None if text == "-1" else [self.receive() for _ in range(int(text))]
        assert kind == b"$", line
        if text == "-1":
            return None
        data = self._answers.read(int(text) + 2)
        if len(data) != int(text) + 2:
            raise Closed("in the middle of an answer")
        return data[:-2].decode()

    def ask(self, *words: str | int) -> Any:
        """A command and its answer. Raises as `send` and `receive`."""
        self.send(*words)
        return self.receive()

    def _line(self) -> bytes:
        try:
            line = self._answers.readline()
        except ConnectionError as error:
            raise Closed(str(error)) from error
        if not line.endswith(b"\r\n"):
            raise Closed("end of file")
        return line[:-2]


def bundle(directory: Path, annotations: Mapping[str, str], network: Path) -> Bundle:
    """A redis-server that keeps its data in memory, and on disk when told to (SAVE)."""
    return Bundle(directory, rootfs.layers(), ARGS, annotations=annotations, network=network)
