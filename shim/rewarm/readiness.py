"""Whether a container says that it is ready: a file in its control directory, an HTTP answer, or a command.

What the container says is hostile input: the file is only looked at, never opened; the HTTP answer is
read up to its status line; nothing of either decides a path on the node.
"""

from __future__ import annotations

import os
import re
import socket
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress

from rewarm import addresses, processes
from rewarm.annotation import http_target
from rewarm.oci.runc import Container, Runc
from rewarm.oci.spec import CONTROL_DESTINATION

_HTTP_TIMEOUT = 5.0
_LOOPBACK = ("127.0.0.1", "::1")
_MOST_ADDRESSES = 8
"""A container that may change its network can have any number, and each may take its time."""
_EXEC_TIMEOUT = 30.0
_STATUS_LINE = 64


def probe(ready: str, control: str, container: Container, low_level: Runc) -> Callable[[], str]:
    """A function that tells why the container is not ready ("": it is), for a (checked) value of `rewarm.dev/ready`."""
    if ready.startswith("http://"):
        port, path = http_target(ready)
        return lambda: _http(container.pid, port, path)
    if ready.startswith("exec:"):
        command = ready.removeprefix("exec:")
        return lambda: _exec(low_level, container.id, command)
    return lambda: _file(control)


def _file(control: str) -> str:
    """A regular file (or directory) named `ready`; links, FIFOs and devices that somebody planted there are not."""
    try:
        mode = os.lstat(os.path.join(control, "ready")).st_mode
    except OSError:
        return f"there is no {CONTROL_DESTINATION}/ready in it"
    return "" if stat.S_ISREG(mode) or stat.S_ISDIR(mode) else f"its {CONTROL_DESTINATION}/ready is no file"


def _http(pid: int, port: int, path: str) -> str:
    """A status from 200 to 399 (as kubelet's probes) from the first address of the container that answers."""
    from rewarm_native import process

    tried = []
    for host in _hosts(pid):
        shown = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            with process.open_socket_in_netns(pid, family, socket.SOCK_STREAM) as connection:
                connection.settimeout(_HTTP_TIMEOUT)
                connection.connect((host, port))
                name = "localhost" if host in _LOOPBACK else shown
                request = f"GET {path} HTTP/1.1\r\nHost: {name}\r\nUser-Agent: rewarm\r\nConnection: close\r\n\r\n"
                connection.sendall(request.encode("ascii"))
                words = _status_line(connection).split()
        except OSError as error:
            tried.append(f"{shown} ({error.strerror or error})")
            continue  # not listening yet, or not on this address
        if len(words) < 2 or not words[0].startswith(b"HTTP/1.") or not re.fullmatch(rb"[0-9]{3}", words[1]):
            return f"what {shown} answers to GET {path} is not HTTP"
        status = int(words[1])
        return "" if 200 <= status < 400 else f"{shown} answers {status} to GET {path}"
    return f"nothing answers GET {path} at {', '.join(tried)}"


def _hosts(pid: int) -> Iterator[str]:
    """Where a server of the container may listen: the loopback, and the addresses of a network namespace of its own. On
    the node's another program of the node may have the port there."""
    yield from _LOOPBACK
    found = []
    with suppress(OSError):
        if not os.path.samefile(f"/proc/{pid}/ns/net", "/proc/self/ns/net"):
            found = addresses.addresses(pid)
    yield from found[:_MOST_ADDRESSES]


def _status_line(connection: socket.socket) -> bytes:
    data = b""
    while b"\n" not in data and len(data) < _STATUS_LINE:
        piece = connection.recv(_STATUS_LINE - len(data))
        if not piece:
            break
        data += piece
    return data.partition(b"\n")[0]


def _exec(low_level: Runc, container_id: str, command: str) -> str:
    with tempfile.TemporaryDirectory(prefix="rewarm-probe-") as directory:
        pid_file = os.path.join(directory, "pid")
        words = low_level.words("exec", "--pid-file", pid_file, container_id, "/bin/sh", "-c", command)
        try:
            done = subprocess.run(
                words,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=_EXEC_TIMEOUT,
                check=False,
            )
        except subprocess.TimeoutExpired:
            _end(pid_file)
            return f"its command has not ended within {_EXEC_TIMEOUT:g} s"
    return "" if done.returncode == 0 else f"its command ends with status {done.returncode}"


def _end(pid_file: str) -> None:
    """Kill what a probe that took too long has started: it would count against the container's limits for ever."""
    try:
        with open(pid_file, encoding="ascii") as file:
            pid = int(file.read())
    except (OSError, ValueError):
        return  # runc had not started it yet
    processes.kill_all(set(processes.tree(pid)))
