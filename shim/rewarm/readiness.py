"""Whether a container says that it is ready: a file in its control directory, an HTTP answer, or a command.

What the container says is hostile input: the file is only looked at, never opened; the HTTP answer is
read up to its status line; nothing of either decides a path on the node.
"""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import tempfile
from collections.abc import Callable

from rewarm import processes
from rewarm.annotation import http_target
from rewarm.oci.runc import Container, Runc

_HTTP_TIMEOUT = 5.0
_EXEC_TIMEOUT = 30.0
_STATUS_LINE = 64


def probe(ready: str, control: str, container: Container, low_level: Runc) -> Callable[[], bool]:
    """A function that tells whether the container is ready now, for a (checked) value of `rewarm.dev/ready`."""
    if ready.startswith("http://"):
        port, path = http_target(ready)
        return lambda: _http(container.pid, port, path)
    if ready.startswith("exec:"):
        command = ready.removeprefix("exec:")
        return lambda: _exec(low_level, container.id, command)
    return lambda: _file(control)


def _file(control: str) -> bool:
    """A regular file (or directory) named `ready`; links, FIFOs and devices that somebody planted there are not."""
    try:
        mode = os.lstat(os.path.join(control, "ready")).st_mode
    except OSError:
        return False
    return stat.S_ISREG(mode) or stat.S_ISDIR(mode)


def _http(pid: int, port: int, path: str) -> bool:
    """A status from 200 to 399 (as kubelet's probes) from 127.0.0.1 or ::1 in the container's network namespace."""
    from rewarm_native import process

    for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        try:
            with process.open_socket_in_netns(pid, family, socket.SOCK_STREAM) as connection:
                connection.settimeout(_HTTP_TIMEOUT)
                connection.connect((host, port))
                request = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nUser-Agent: rewarm\r\nConnection: close\r\n\r\n"
                connection.sendall(request.encode("ascii"))
                words = _status_line(connection).split()
        except OSError:
            continue  # not listening yet, or not on this family
        return len(words) > 1 and words[0].startswith(b"HTTP/1.") and words[1].isdigit() and 200 <= int(words[1]) < 400
    return False


def _status_line(connection: socket.socket) -> bytes:
    data = b""
    while b"\n" not in data and len(data) < _STATUS_LINE:
        piece = connection.recv(_STATUS_LINE - len(data))
        if not piece:
            break
        data += piece
    return data.partition(b"\n")[0]


def _exec(low_level: Runc, container_id: str, command: str) -> bool:
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
            return False
    return done.returncode == 0


def _end(pid_file: str) -> None:
    """Kill what a probe that took too long has started: it would count against the container's limits for ever."""
    try:
        with open(pid_file, encoding="ascii") as file:
            pid = int(file.read())
    except (OSError, ValueError):
        return  # runc had not started it yet
    processes.kill_all(set(processes.tree(pid)))
