"""Calls of an inference engine before a capture and afterwards: of servers that speak its endpoints, and of worse ones.

What needs a real engine on a GPU: that these servers behave as vLLM and SGLang do, and that a restored one goes on.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rewarm import engines
from rewarm.errors import CaptureError, RestoreError
from rewarm_hooks import engine as hook
from rewarm_hooks.engine import EngineError, quiesce, resume
from support.netns import NetworkNamespace
from support.proc import wait_for
from support.workloads.engines import Engine, Sglang, Vllm

TESTS = Path(__file__).resolve().parents[1]
LIMIT = 5.0
SLACK = 1.5  # seconds that a call may take beyond its limit, on a machine that does other things too


def refused(call: Callable[..., list[str]], *arguments: Any) -> EngineError:
    """The error of a call, after a check of what every one of them has to be."""
    with pytest.raises(EngineError) as caught:
        call(*arguments)
    text = str(caught.value)
    assert text.startswith(f"{caught.value.operation} {caught.value.object}: {caught.value.cause}")
    assert text.isprintable() and len(text) < 1000
    return caught.value


# --- vLLM


def test_vllm_waits_for_its_requests_and_goes_on_afterwards() -> None:
    with Vllm() as server:
        server.in_flight = 2
        server.end_requests(after=0.3)
        said = quiesce("vllm", server.connect, LIMIT)
        assert server.in_flight == 0, "requests were aborted"
        assert server.paused and not server.cached
        assert re.fullmatch(r"POST /pause\?\S+: 200 in 0\.[3-9]\d s", said[0]), said
        assert server.calls == ["POST /pause", "POST /reset_prefix_cache"], "the weights stay"

        said = resume("vllm", server.connect, LIMIT)
        assert not server.paused and server.alive
        assert [line.split(":")[0] for line in said][-2:] == ["POST /resume", "GET /health"]


def test_a_vllm_that_names_it_otherwise_waits_too() -> None:
    with Vllm() as server:
        server.waits_by = "wait_for_inflight_requests=true"
        server.in_flight = 1
        server.end_requests(after=0.2)
        quiesce("vllm", server.connect, LIMIT)
        assert server.in_flight == 0


@pytest.mark.parametrize("make", [Vllm, Sglang])
def test_requests_that_do_not_end(make: type[Engine]) -> None:
    """Neither aborted nor captured, and the source goes on."""
    name = make.__name__.lower()
    with make() as server:
        server.in_flight = 1
        begin = time.monotonic()
        error = refused(quiesce, name, server.connect, 1.0)
        assert time.monotonic() - begin < 1.0 + SLACK
        assert "requests are still in flight" in error.cause and "while it serves nobody" in error.next_step
        assert server.in_flight == 1 and not server.paused and server.alive
        assert "may be paused" not in error.cause


def test_an_engine_that_starts_for_long_is_said_to_do_that() -> None:
    """Not the call that the time ran out in."""
    with Vllm() as server:
        server.starting = 1 << 30

        def connect(seconds: float) -> socket.socket:
            if seconds < 0.5:
                time.sleep(seconds)
                raise TimeoutError
            return server.connect(seconds)

        error = refused(resume, "vllm", connect, 1.0)
        assert "GET /health was answered by status 503" in error.cause


def test_a_vllm_without_pause_drops_its_cache() -> None:
    with Vllm("/pause", "/resume", "/is_paused") as server:
        said = quiesce("vllm", server.connect, LIMIT)
        assert not server.cached
        assert said[0].endswith("not there (404)") and said[1].startswith("POST /reset_prefix_cache: 200")
        assert resume("vllm", server.connect, LIMIT)[-1].startswith("GET /health: 200")
        assert not any("/sleep" in call for call in server.calls)


def test_a_vllm_without_developer_mode() -> None:
    with Vllm("/pause", "/resume", "/reset_prefix_cache", "/sleep", "/wake_up", "/is_sleeping") as server:
        error = refused(quiesce, "vllm", server.connect, LIMIT)
        assert error.cause == "it has neither /pause nor /reset_prefix_cache"
        assert "VLLM_SERVER_DEV_MODE=1" in error.next_step
        assert resume("vllm", server.connect, LIMIT)[-1].startswith("GET /health: 200")


def test_a_vllm_that_sleeps_is_woken_before_it_goes_on() -> None:
    with Vllm() as server:
        server.level, server.paused = 1, True
        resume("vllm", server.connect, LIMIT)
        assert server.level is None and not server.paused and server.alive
        assert server.calls.index("POST /wake_up") < server.calls.index("POST /resume")


def test_a_vllm_without_sleep_mode_goes_on() -> None:
    with Vllm("/is_sleeping", "/wake_up") as server:
        quiesce("vllm", server.connect, LIMIT)
        resume("vllm", server.connect, LIMIT)
        assert not server.paused and "POST /wake_up" not in server.calls


# --- SGLang


def test_sglang_waits_for_its_requests_and_goes_on_afterwards() -> None:
    with Sglang() as server:
        server.in_flight = 2
        server.end_requests(after=0.3)
        said = quiesce("sglang", server.connect, LIMIT)
        assert server.in_flight == 0, "requests were aborted"
        assert server.paused and not server.cached and server.alive
        words = ["POST /flush_cache", "POST /pause_generation", "POST /flush_cache"]
        assert [line.split(":")[0] for line in said] == words

        said = resume("sglang", server.connect, LIMIT)
        assert not server.paused and server.alive
        assert [line.split(":")[0] for line in said] == ["POST /continue_generation", "GET /health_generate"]
        assert not any("memory_occupation" in call for call in server.calls)


def test_a_request_that_comes_just_before_the_pause() -> None:
    with Sglang() as server:

        def come() -> None:
            server.on_pause = lambda: None
            server.in_flight = 1
            server.end_requests(after=0.3)

        server.on_pause = come
        quiesce("sglang", server.connect, LIMIT)
        assert server.in_flight == 0 and server.paused
        assert server.calls.count("POST /pause_generation") == 2
        assert "POST /continue_generation" in server.calls, "a paused engine does not end its requests"


def test_an_sglang_without_pause_and_generated_health() -> None:
    with Sglang("/pause_generation", "/continue_generation", "/health_generate") as server:
        said = quiesce("sglang", server.connect, LIMIT)
        assert not server.cached and said[-1].endswith("not there (404)")
        assert resume("sglang", server.connect, LIMIT)[-1].startswith("GET /health: 200")


# --- both


@pytest.mark.parametrize("make", [Vllm, Sglang])
class TestBoth:
    def test_going_on_without_need_and_again(self, make: type[Engine]) -> None:
        with make() as server:
            for _ in range(3):
                resume(make.__name__.lower(), server.connect, LIMIT)
            assert server.alive and not server.paused and server.cached

    def test_twice_before_and_once_afterwards(self, make: type[Engine]) -> None:
        name = make.__name__.lower()
        with make() as server:
            quiesce(name, server.connect, LIMIT)
            quiesce(name, server.connect, LIMIT)
            resume(name, server.connect, LIMIT)
            assert server.alive and not server.paused

    def test_health_is_waited_for(self, make: type[Engine]) -> None:
        with make() as server:
            server.starting = 3
            said = resume(make.__name__.lower(), server.connect, LIMIT)
            assert server.starting == 0
            assert len(said) == len({line.split(":")[0] for line in said}), "one line for each, not for each attempt"

    def test_one_that_never_gets_healthy(self, make: type[Engine]) -> None:
        with make() as server:
            server.alive = False
            begin = time.monotonic()
            error = refused(resume, make.__name__.lower(), server.connect, 0.6)
            assert 0.4 < time.monotonic() - begin < 0.6 + SLACK
            assert "/health" in error.cause and "status 503" in error.cause

    def test_one_that_listens_a_little_later(self, make: type[Engine]) -> None:
        with make() as server:
            ready = time.monotonic() + 0.3

            def connect(seconds: float) -> socket.socket:
                if time.monotonic() < ready:
                    raise ConnectionRefusedError(111, "Connection refused")
                return server.connect(seconds)

            resume(make.__name__.lower(), connect, LIMIT)
            assert time.monotonic() >= ready

    def test_one_that_wants_a_key(self, make: type[Engine]) -> None:
        with make(key="secret") as server:
            for call in (quiesce, resume):
                error = refused(call, make.__name__.lower(), server.connect, LIMIT)
                assert "status 401" in error.cause and "API key" in error.next_step
                assert "may be paused" not in error.cause

    def test_another_server_altogether(self, make: type[Engine]) -> None:
        everything = {"/pause", "/resume", "/reset_prefix_cache", "/is_sleeping", "/flush_cache", "/health"}
        with make(*everything, "/pause_generation", "/continue_generation", "/health_generate") as server:
            for call in (quiesce, resume):
                error = refused(call, make.__name__.lower(), server.connect, LIMIT)
                assert error.cause.startswith("it has n") and "rewarm.dev/engine" in error.next_step


def test_an_engine_that_is_none() -> None:
    for call in (quiesce, resume):
        error = refused(call, "trt\nllm", lambda seconds: socket.socket(), LIMIT)
        assert error.object == "trt\\nllm" and error.cause == "it is not one of vllm, sglang"


# --- hostile ones

Script = Callable[[socket.socket], None]
OK = b"HTTP/1.1 200 OK\r\n"


class Hostile:
    """Reads each request and lets `script` do with the connection what it likes. sent: bytes, as it says itself."""

    def __init__(self, script: Script) -> None:
        self.requests: list[bytes] = []
        self._script = script
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._over = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Hostile:
        return self

    def __exit__(self, *arguments: object) -> None:
        self._over.set()
        self._listener.close()

    def connect(self, seconds: float) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=seconds)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._serve, args=self._listener.accept()[:1], daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            self.requests.append(connection.recv(4096))
            self._script(connection)


def say(text: bytes) -> Script:
    return lambda connection: connection.sendall(text)


def silence(connection: socket.socket) -> None:
    connection.recv(1)


def for_ever(first: bytes, again: bytes, pause: float = 0.0) -> Script:
    def script(connection: socket.socket) -> None:
        connection.sendall(first)
        while True:
            connection.sendall(again)
            time.sleep(pause)

    return script


def cut(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


AT_ONCE = {
    "error": (say(b"HTTP/1.1 500 Oops\r\n\r\nTraceback: \x1b[2J" + b"x" * 9999), "status 500"),
    "error whose body does not end": (for_ever(b"HTTP/1.1 500 Oops\r\n\r\n", b"x" * 65536), "status 500"),
    "garbage": (say(b"\x00\xff\x1b[31m" * 100), "not HTTP"),
    "garbage that does not end": (for_ever(b"SSH-2.0-x\r\n", b"x" * 65536), "not HTTP"),
    "headers that do not end": (for_ever(OK, b"X-A: " + b"b" * 1000 + b"\r\n"), "16 KiB of headers"),
    "a status line that does not end": (for_ever(b"HTTP/1.1 200 ", b"x" * 65536), "16 KiB of headers"),
    "no number": (say(b"HTTP/1.1 2e2 OK\r\n\r\n"), "not HTTP"),
    "another HTTP": (say(b"HTTP/2.0 200 OK\r\n\r\n"), "not HTTP"),
    "interim answers": (for_ever(b"", b"HTTP/1.1 100 Continue\r\n\r\n"), "status 100"),
    "a redirect": (say(b"HTTP/1.1 307 Go\r\nLocation: /elsewhere\r\nContent-Length: 0\r\n\r\n"), "status 307"),
}
IN_TIME = {
    "silence": (silence, "had no answer"),
    "a slow status": (for_ever(b"", b"HTTP/1.1 200 OK", 0.05), "had no answer"),
    "slow headers": (for_ever(OK + b"X: ", b"x", 0.02), "had no answer"),
    "closed at once": (lambda connection: None, "closed before an answer"),
    "closed in the middle": (say(OK), "closed before an answer"),
    "reset": (cut, "reset by peer|closed before an answer"),
    "not ready": (say(b"HTTP/1.1 503 Later\r\nContent-Length: 0\r\n\r\n"), "status 503"),
}


@pytest.mark.parametrize("engine", hook.ENGINES)
@pytest.mark.parametrize("call", [quiesce, resume])
@pytest.mark.parametrize("name", AT_ONCE)
def test_what_cannot_become_better_is_told_at_once(engine: str, call: Callable[..., list[str]], name: str) -> None:
    script, cause = AT_ONCE[name]
    with Hostile(script) as server:
        begin = time.monotonic()
        error = refused(call, engine, server.connect, 20.0)
        # A body that does not end is looked at for no more than a second, in the call and in the one that undoes it.
        assert time.monotonic() - begin < 5.0
        assert re.search(cause, error.cause), error.cause
        assert not any(b"elsewhere" in request for request in server.requests)
        assert len(server.requests) <= 3


@pytest.mark.parametrize("engine", hook.ENGINES)
@pytest.mark.parametrize("call", [quiesce, resume])
@pytest.mark.parametrize("name", IN_TIME)
def test_what_may_become_better_ends_in_time(engine: str, call: Callable[..., list[str]], name: str) -> None:
    script, cause = IN_TIME[name]
    with Hostile(script) as server:
        begin = time.monotonic()
        error = refused(call, engine, server.connect, 0.6)
        assert time.monotonic() - begin < 0.6 + SLACK
        assert re.search(cause, error.cause), error.cause


@pytest.mark.parametrize("call", [quiesce, resume])
def test_nobody_listens(call: Callable[..., list[str]]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

    def connect(seconds: float) -> socket.socket:
        return socket.create_connection(("127.0.0.1", port), timeout=seconds)

    begin = time.monotonic()
    error = refused(call, "vllm", connect, 0.5)
    assert time.monotonic() - begin < 0.5 + SLACK
    assert "Connection refused" in error.cause and "may be paused" not in error.cause


@pytest.mark.parametrize("again", [b"x" * 65536, b"x"], ids=["fast", "slow"])
def test_a_success_whose_body_does_not_end_is_one(again: bytes) -> None:
    with Hostile(for_ever(OK + b"\r\n", again, 0.0 if len(again) > 1 else 0.05)) as server:
        begin = time.monotonic()
        assert len(quiesce("sglang", server.connect, 10.0)) == 3
        assert time.monotonic() - begin < 10.0 + SLACK


@pytest.mark.parametrize("body", [b"", b'{"is_sleeping": "true"}', b'{"is_sleeping": 1}', b"[" * 4000, b"\xff{"])
def test_a_sleep_that_is_not_told_is_an_error(body: bytes) -> None:
    """Going on while the weights are away would end the engine."""
    with Hostile(say(OK + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)) as server:
        assert "something else" in refused(resume, "vllm", server.connect, LIMIT).cause
        assert not any(b"/resume" in request for request in server.requests)


def test_an_engine_that_pauses_and_then_fails_is_told_to_go_on() -> None:
    with Vllm() as server:
        broken = Vllm.answer

        def answer(method: str, path: str, query: str, body: bytes) -> tuple[int, bytes]:
            return (500, b"no") if "reset" in path else broken(server, method, path, query, body)

        server.answer = answer  # type: ignore[method-assign]
        error = refused(quiesce, "vllm", server.connect, LIMIT)
        assert "/reset_prefix_cache was answered by status 500 (no)" in error.cause
        assert not server.paused and server.alive


def test_an_engine_that_pauses_and_then_is_gone() -> None:
    """The message has to say that it may be paused: an operator has to do something about it."""
    paused = threading.Event()

    def script(connection: socket.socket) -> None:
        paused.set()
        connection.sendall(b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n")

    with Hostile(script) as server:

        def connect(seconds: float) -> socket.socket:
            if paused.is_set():
                raise ConnectionRefusedError(111, "Connection refused")
            return server.connect(seconds)

        error = refused(quiesce, "vllm", connect, LIMIT)
        assert "status 500" in error.cause and "it may be paused" in error.cause and "refused" in error.cause


# --- inside a container's network namespace


@contextlib.contextmanager
def nobody(namespace: NetworkNamespace) -> Iterator[int]:
    """A process in `namespace`, where nobody listens."""
    with subprocess.Popen(namespace.argv("sleep", "100")) as process:
        try:
            wait_for("its namespace", lambda: namespace_of(process.pid) != namespace_of(os.getpid()))
            yield process.pid
        finally:
            process.kill()


def namespace_of(pid: int) -> str:
    return os.readlink(f"/proc/{pid}/ns/net")


@contextlib.contextmanager
def served(namespace: NetworkNamespace, kind: str, host: str) -> Iterator[tuple[int, int]]:
    """(pid, port) of an engine in a process of its own in `namespace`."""
    words = namespace.argv(sys.executable, "-m", "support.workloads.engines", kind, host)
    with subprocess.Popen(words, cwd=TESTS, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.pid, int(process.stdout.readline())
        finally:
            process.kill()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("kind", hook.ENGINES)
def test_an_engine_of_another_network_namespace(kind: str, host: str) -> None:
    with NetworkNamespace() as namespace, served(namespace, kind, host) as (pid, port):
        assert engines.quiesce(kind, pid, port, LIMIT)
        if kind == "vllm" and ":" not in host:
            assert namespace.json(port, "/is_sleeping") == {"is_sleeping": True}
        assert engines.resume(kind, pid, port, LIMIT)[-1].startswith("GET /health")
        if kind == "vllm" and ":" not in host:
            assert namespace.json(port, "/is_sleeping") == {"is_sleeping": False}

        with NetworkNamespace() as other, nobody(other) as elsewhere:
            with pytest.raises(CaptureError, match=f"^quiesce engine {kind} at port {port}: .*Connection refused"):
                engines.quiesce(kind, elsewhere, port, LIMIT)
            with pytest.raises(RestoreError, match=f"^resume engine {kind} at port {port}: .*Connection refused"):
                engines.resume(kind, elsewhere, port, 0.3)


def test_a_process_that_is_gone() -> None:
    with subprocess.Popen(["true"]) as process:
        process.wait()
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(CaptureError, match="its container has ended"):
        engines.quiesce("vllm", process.pid, 8000, LIMIT)
    assert len(os.listdir("/proc/self/fd")) == before


# --- its port


@pytest.mark.parametrize(
    ("ready", "args", "env", "port"),
    [
        ("file", ["vllm", "serve", "model"], [], 8000),
        ("http://:9000/health", ["vllm", "serve", "--port", "7000"], [], 9000),
        ("exec:true", ["vllm", "serve", "--port", "7000"], [], 7000),
        ("file", ["vllm", "serve", "--port=7000"], [], 7000),
        ("file", ["vllm", "serve", "--port=7000", "--port", "7001"], [], 7001),
        ("file", ["vllm", "serve", "--port", "7000", "--port=7001"], [], 7001),
        ("file", ["sh", "-c", "exec vllm serve model --port '7000'; true"], [], 7000),
        ("file", ["sh", "-c", "vllm serve --port $PORT"], ["PORT=7002"], 7002),
        ("file", ["sh", "-c", 'vllm serve --port="${PORT}"'], ["PORT=7002"], 7002),
        ("file", ["vllm", "serve"], ["PORT=7002"], 7002),
        ("file", ["vllm", "serve", "--port", "7000"], ["PORT=7002"], 7000),
        ("file", ["vllm", "serve"], ["VLLM_PORT=tcp://10.0.0.1:80"], 8000),
        ("file", ["vllm", "serve"], ["VLLM_PORT=7003"], 8000),
        ("file", ["vllm", "serve", "--port"], [], 8000),
        ("file", ["vllm", "serve", "--port", "0"], ["PORT=tcp://10.0.0.1:80"], 8000),
        ("file", ["vllm", "serve", "--port", "65536"], [], 8000),
        ("file", ["vllm", "serve", "--port", "9" * 5000], ["PORT=" + "9" * 5000], 8000),
        ("file", ["vllm", "serve", "--port", "٨٠٨٠"], ["PORT=-1"], 8000),
    ],
)
def test_the_port(ready: str, args: list[str], env: list[str], port: int) -> None:
    assert engines.target("vllm", ready, {"process": {"args": args, "env": env}}) == port


def test_the_port_of_a_spec_that_says_nothing() -> None:
    assert engines.target("sglang", "file", {}) == 30000
    assert engines.target("vllm", "file", {"process": {"args": None, "env": None}}) == 8000
