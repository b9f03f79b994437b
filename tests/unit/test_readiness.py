"""Whether a container says that it is ready: whom rewarm asks, and what is said of the one that is not."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rewarm import addresses, processes, readiness, watcher
from rewarm.oci.runc import Container, Runc
from rewarm.request import Request
from support.netns import NetworkNamespace
from support.proc import command

POD, POD6 = "10.231.78.2", "fd00:78::2"
OK = b"HTTP/1.1 200 OK\r\n\r\n"


def container(pid: int) -> Container:
    return Container("/run/runc", "c", pid, 1, "/bundle", "/bundle/rootfs", {}, (), "")


def probe(pid: int, port: int, path: str = "/healthz") -> Callable[[], str]:
    return readiness.probe(f"http://:{port}{path}", "/none", container(pid), Runc("runc", "/run/runc"))


@pytest.fixture
def pod() -> Iterator[tuple[NetworkNamespace, int]]:
    """A pod's network namespace, and a process in it."""
    with NetworkNamespace() as namespace:
        for address in (f"{POD}/32", f"{POD6}/128"):
            command("ip", "-n", namespace.name, "address", "add", address, "dev", "lo", "nodad")
        words = namespace.argv("sh", "-c", "echo there; exec sleep 300")
        with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            try:
                yield namespace, process.pid
            finally:
                process.kill()


@contextlib.contextmanager
def serving(listener: socket.socket, host: str, answer: bytes = OK) -> Iterator[tuple[int, list[bytes]]]:
    """The port of a server at `host`, and the requests that it got."""
    requests: list[bytes] = []
    listener.bind((host, 0))
    listener.listen()

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection:
                    requests.append(connection.recv(4096))
                    connection.sendall(answer)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield listener.getsockname()[1], requests
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
        listener.close()


def family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "0.0.0.0", POD, POD6])
def test_a_server_at_any_address_of_its_pod(pod: tuple[NetworkNamespace, int], host: str) -> None:
    namespace, pid = pod
    with serving(namespace.open_socket(family=family(host)), host) as (port, requests):
        assert probe(pid, port)() == ""
        name = {POD: f"{POD}:{port}", POD6: f"[{POD6}]:{port}"}.get(host, "localhost")
        expected = f"GET /healthz HTTP/1.1\r\nHost: {name}\r\nUser-Agent: rewarm\r\nConnection: close\r\n\r\n"
        assert requests == [expected.encode()]


def test_the_reason_names_what_was_tried(pod: tuple[NetworkNamespace, int]) -> None:
    _, pid = pod
    said = probe(pid, 8000)()
    refused = ", ".join(f"{at}:8000 (Connection refused)" for at in ("127.0.0.1", "[::1]", POD, f"[{POD6}]"))
    assert said == f"nothing answers GET /healthz at {refused}"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"HTTP/1.0 399 x\r\n", ""),
        (b"HTTP/1.1 503 Unavailable\r\n", "answers 503 to GET /healthz"),
        (b"HTTP/1.1 0200 OK\r\n", "is not HTTP"),
        (b"HTTP/1.1 \xb2\xb20 OK\r\n", "is not HTTP"),
        (b"\x1b[31mhello 200\r\n", "is not HTTP"),
        (b"", "is not HTTP"),
    ],
)
def test_what_is_answered(pod: tuple[NetworkNamespace, int], answer: bytes, said: str) -> None:
    namespace, pid = pod
    with serving(namespace.open_socket(), POD, answer) as (port, _):
        found = probe(pid, port)()
    assert (found == "") == (said == "") and said in found and found.isprintable()


def test_on_the_nodes_network_only_the_loopback_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another program of the node may have the port at another address."""
    monkeypatch.setattr(addresses, "addresses", lambda _: pytest.fail("the node's addresses are asked for"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert "127.0.0.1" in probe(os.getpid(), port)()


def test_a_container_with_many_addresses(pod: tuple[NetworkNamespace, int]) -> None:
    """It may have the right to give itself as many as it likes."""
    namespace, pid = pod
    for last in range(10, 40):
        command("ip", "-n", namespace.name, "address", "add", f"10.231.78.{last}/32", "dev", "lo")
    assert probe(pid, 8000)().count("Connection refused") == 10


def test_of_a_process_that_is_gone() -> None:
    with subprocess.Popen(["true"]) as process:
        process.wait()
    assert probe(process.pid, 8000)() != ""


def test_files_and_commands(tmp_path: Path) -> None:
    runc = tmp_path / "runc"
    runc.write_text('#!/bin/sh\nshift $(($# - 1)); exec sh -c "$1"\n')
    runc.chmod(0o755)
    low_level = Runc(str(runc), "/run/runc")
    by_file = readiness.probe("file", str(tmp_path), container(1), low_level)
    assert by_file() == "there is no /run/rewarm/ready in it"
    (tmp_path / "ready").symlink_to("/etc/passwd")
    assert by_file() == "its /run/rewarm/ready is no file"
    (tmp_path / "ready").unlink()
    (tmp_path / "ready").touch()
    assert by_file() == ""
    assert readiness.probe("exec:true", str(tmp_path), container(1), low_level)() == ""
    said = readiness.probe("exec:exit 3", str(tmp_path), container(1), low_level)()
    assert said == "its command ends with status 3"


def test_what_the_watcher_says(tmp_path: Path) -> None:
    wanted = Request("model", "default", ready="http://:1/x")
    with subprocess.Popen(["sleep", "300"]) as process:
        there = container(process.pid)._replace(start_time=processes.start_time(process.pid) or 0)
        runc = Runc("runc", "/run/runc")
        said = watcher._wait_until_ready(str(tmp_path), wanted, there, runc, 0.5)
        assert said.startswith("the container was not ready within 0.5 s: nothing answers GET /x at 127.0.0.1:1 (")
        threading.Timer(0.2, process.kill).start()
        began = time.monotonic()
        said = watcher._wait_until_ready(str(tmp_path), wanted, there, runc, 60)
        assert said == "the container has ended before it was ready" and time.monotonic() - began < 20
