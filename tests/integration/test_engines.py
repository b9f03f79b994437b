"""rewarm.dev/engine: a capture with no request in flight, and a source and copies that serve afterwards.

The engines are small servers that keep the state of vLLM's and SGLang's administrative endpoints, in containers.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from support import faults, proc, rootfs
from support.bundle import Bundle
from support.netns import NetworkNamespace
from support.node import Node
from support.outcomes import said
from support.runtime import SIGKILLED

KINDS = ("vllm", "sglang")
PORT = 7077
QUIET = {
    "vllm": ["POST /pause", "POST /reset_prefix_cache"],
    "sglang": ["POST /flush_cache", "POST /pause_generation", "POST /flush_cache"],
}
LOUD = {
    "vllm": ["GET /is_sleeping", "POST /wake_up", "POST /resume", "GET /health"],
    "sglang": ["POST /continue_generation", "GET /health_generate"],
}
DONE = {"vllm": "GET /health: 200", "sglang": "GET /health_generate: 200"}
FOR_EVER = 1_000_000
SLOW_CRIU = 'case "$*" in *swrk*) sleep 2;; esac\nexec $REAL "$@"'


class Served:
    """A container of an engine, in a network namespace of its own."""

    def __init__(self, node: Node, name: str, kind: str, network: NetworkNamespace) -> None:
        self.node = node
        self.name = name
        self.kind = kind
        self.network = network

    def state(self, **changed: object) -> dict[str, Any]:
        """What the engine says of itself, with that changed."""
        found: dict[str, Any] = self.network.json(PORT, "/set", body=json.dumps(changed).encode())
        return found

    def generate(self, seconds: float = 0.0) -> int:
        """A client's request; the status of its answer."""
        body = json.dumps({"seconds": seconds}).encode()
        return self.network.http(PORT, "/generate", body=body, timeout=20)[0]

    def woken(self) -> dict[str, Any]:
        """engine.json, once it is there."""
        path = self.node.container_directory(self.name) / "engine.json"
        proc.wait_for("the waker's word", path.exists)
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    def waker(self) -> int:
        """The pid of its waker; 0 when there is none."""
        wanted = f"rewarm.waker {self.node.container_directory(self.name)} {self.kind} {PORT}"
        found = [pid for pid in proc.descendants(os.getpid()) if wanted in proc.command_line(pid)]
        return found[0] if found else 0

    def status(self) -> str:
        return str(self.node.runtime.state(self.name)["status"])


class Cluster:
    """One node; what it `makes` has its networks removed at the end."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.networks = contextlib.ExitStack()

    def make(
        self, name: str, kind: str, *more: str, start: bool = True, asks: Mapping[str, str] | None = None
    ) -> Served:
        """Create it, as the first or from the snapshot; by default it is started too, and listens when it is cold."""
        network = self.networks.enter_context(NetworkNamespace())
        found = {"snapshot": "engine", "engine": kind, **(asks or {})}
        made = Bundle(
            self.node.directory / name,
            rootfs.layers("engines"),
            [*rootfs.args("engines"), kind, "127.0.0.1", "--port", str(PORT), *more],
            annotations={f"rewarm.dev/{key}": value for key, value in found.items()},
            env=rootfs.env("engines"),
            network=network.path,
        )
        container = self.node.runtime.create(name, made)
        if start:
            self.node.runtime.start(name)
            if self.node.outcome(name)["outcome"] == "cold":
                container.stdout.wait_text(f"{PORT}\n")
        return Served(self.node, name, kind, network)


@pytest.fixture
def cluster(node: Node) -> Iterator[Cluster]:
    made = Cluster(node)
    with made.networks:
        yield made


def capture(source: Served, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return source.node.rewarm("capture", source.name, "--name", "engine", *words, check=check)


@contextlib.contextmanager
def capturing(source: Served) -> Iterator[subprocess.Popen[bytes]]:
    words = [str(source.node.prefix / "bin" / "rewarm"), "capture", source.name, "--name", "engine"]
    quiet = subprocess.DEVNULL
    with subprocess.Popen(words, env={**os.environ, **source.node.env}, stdout=quiet, stderr=quiet) as process:
        try:
            yield process
        finally:
            process.kill()


@contextlib.contextmanager
def clients(served: Served, seconds: float) -> Iterator[list[object]]:
    """One request after the other, each of so many seconds, with a little rest; statuses, or what went wrong."""
    over = threading.Event()
    answers: list[object] = []

    def ask() -> None:
        while not over.wait(0.15):
            try:
                answers.append(served.generate(seconds))
            except OSError as error:
                answers.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield answers
    finally:
        over.set()
        thread.join()


def goes_on(served: Served) -> None:
    """AssertionError unless it is not paused, comes to be healthy by itself, and answers."""
    proc.wait_for("the engine to go on", lambda: not served.state()["paused"], timeout=20)
    assert served.generate() == 200


def paused(source: Served) -> Callable[[], bool]:
    return lambda: source.status() == "paused"


@pytest.mark.parametrize("kind", KINDS)
def test_captured_while_it_serves(cluster: Cluster, kind: str) -> None:
    """Clients of the source wait; what is captured has nothing in flight, and the copy is told to go on by itself."""
    source = cluster.make("source", kind)
    with clients(source, 0.05) as answers:
        proc.wait_for("answers", lambda: len(answers) > 1)
        done = capture(source)
        count = len(answers)
        proc.wait_for("answers after the capture", lambda: len(answers) > count + 1)
    assert set(answers) == {200}, answers
    now = source.state()
    assert not now["paused"] and now["alive"] and now["in_flight"] == 0
    assert now["calls"][-len(LOUD[kind]) :] == LOUD[kind]
    assert all(call in done.stderr for call in (*QUIET[kind], *LOUD[kind])), done.stderr

    copy = cluster.make("copy", kind, start=False)
    assert cluster.node.outcome("copy")["outcome"] == "warm", cluster.node.outcome("copy")
    waker = copy.waker()
    assert waker
    directory = cluster.node.container_directory("copy")
    time.sleep(0.5)
    targets = {os.readlink(path) for path in Path(f"/proc/{waker}/fd").iterdir()}
    assert not any(target.startswith(("pipe:", "socket:")) for target in targets), "a stream, or a call too early"
    assert not (directory / "engine.json").exists() and proc.state_of(waker) in ("S", "R"), "it waits for `start`"
    cluster.node.runtime.start("copy")
    said = copy.woken()
    assert said["resumed"] is True and DONE[kind] in said["text"], said
    then = copy.state()
    begun, ended = -len(QUIET[kind]) - len(LOUD[kind]), -len(LOUD[kind])
    assert then["calls"][begun:] == QUIET[kind] + LOUD[kind], "the waker's come right behind the capture's"
    assert then["loads"][ended - 1][1] == then["loads"][ended][0] == 0, "nothing was in flight when it was captured"
    assert not then["paused"] and then["alive"]
    assert copy.generate() == 200 and source.generate() == 200
    proc.wait_for("the waker's end", lambda: proc.state_of(waker) in (None, "Z"))
    assert said["text"] in (directory / "engine.log").read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_requests_that_stay_in_flight(cluster: Cluster, kind: str) -> None:
    cluster.node.configure(engine_timeout=1.0)
    source = cluster.make("source", kind)
    source.state(in_flight=1)
    began = time.monotonic()
    done = capture(source, check=False)
    assert done.returncode != 0 and time.monotonic() - began < 8
    (line,) = done.stderr.splitlines()
    assert f"quiesce engine {kind} at port {PORT}: requests are still in flight" in line
    assert "capture it while it serves nobody, or give it more time" in line
    assert "may be paused" not in line
    then = source.state(in_flight=0)
    assert not then["paused"] and then["alive"] and all(load == [1, 1] for load in then["loads"]), (
        "it was neither left paused nor aborted"
    )
    assert source.status() == "running" and source.generate() == 200
    assert cluster.node.json("ls") == []
    capture(source)
    assert len(cluster.node.json("ls")) == 1


@pytest.mark.parametrize(
    ("kind", "without", "hint"),
    [
        ("vllm", ["/pause", "/resume", "/reset_prefix_cache", "/is_sleeping"], "VLLM_SERVER_DEV_MODE=1"),
        ("sglang", ["/flush_cache"], "see that the port is SGLang's own (--port)"),
    ],
)
def test_an_engine_without_its_endpoints(cluster: Cluster, kind: str, without: list[str], hint: str) -> None:
    source = cluster.make("source", kind, *(word for path in without for word in ("--without", path)))
    done = capture(source, check=False)
    assert done.returncode != 0
    (line,) = done.stderr.splitlines()
    assert f"quiesce engine {kind} at port {PORT}: it has n" in line and hint in line
    assert source.generate() == 200 and not source.state()["paused"]
    assert cluster.node.json("ls") == []


def test_another_port_than_its_own(cluster: Cluster) -> None:
    """Said at once: nothing was paused, so there is nothing to try again for all of engine_timeout."""
    source = cluster.make("source", "vllm", asks={"ready": "http://:9/health"})
    began = time.monotonic()
    done = capture(source, check=False)
    assert done.returncode != 0 and time.monotonic() - began < 10
    (line,) = done.stderr.splitlines()
    assert "quiesce engine vllm at port 9: POST /pause" in line and "Connection refused" in line
    assert "--port" in line and "rewarm.dev/ready" in line
    assert source.generate() == 200 and source.state()["calls"] == []


def test_an_engine_that_hangs(cluster: Cluster) -> None:
    """Paused by a call without an answer, and not to be reached: the error says both."""
    cluster.node.configure(engine_timeout=1.0)
    source = cluster.make("source", "vllm")
    pid = cluster.node.runtime.state("source")["pid"]
    os.kill(pid, signal.SIGSTOP)
    done = capture(source, check=False)
    (line,) = done.stderr.splitlines()
    assert "or it hangs: POST /pause" in line and "it may be paused, for it could not be told to go on" in line
    assert "the engine did not go on: resume engine vllm" in line
    assert proc.state_of(pid) == "T", "as it was"
    os.kill(pid, signal.SIGCONT)
    assert cluster.node.json("ls") == []


@pytest.mark.parametrize("kind", KINDS)
def test_killed_while_criu_is_at_work(cluster: Cluster, kind: str) -> None:
    """The helper lets CRIU come to its end, the container run, and then the engine go on."""
    node = cluster.node
    source = cluster.make("source", kind)
    node.configure(criu=str(faults.criu(node, SLOW_CRIU)))
    with capturing(source) as process:
        proc.wait_for("the pause", paused(source), interval=0.005)
        process.kill()
        process.wait()
        assert source.status() == "paused", "CRIU is still at work, else this tests nothing"
    proc.wait_for("the source to run", lambda: source.status() == "running", timeout=20)
    goes_on(source)
    now = source.state()
    assert now["alive"] and now["calls"][: len(QUIET[kind])] == QUIET[kind]
    assert LOUD[kind][-2] in now["calls"][len(QUIET[kind]) :]
    assert node.json("ls") == []
    node.configure()
    capture(source)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_ended_while_requests_are_waited_for(cluster: Cluster, number: int) -> None:
    source = cluster.make("source", "vllm")
    source.state(in_flight=1)
    with capturing(source) as process:
        proc.wait_for("the engine's pause", lambda: source.state()["paused"])
        process.send_signal(number)
        assert process.wait(20) != 0
    goes_on(source)
    assert source.status() == "running" and source.state()["in_flight"] == 1, "not aborted either"
    assert cluster.node.json("ls") == []


def test_captured_again_before_the_helper_is_done(cluster: Cluster) -> None:
    """Of a capture that was killed: what it does would come in the middle of the next one."""
    source = cluster.make("source", "vllm")
    source.state(in_flight=1)
    with capturing(source) as process:
        proc.wait_for("the engine's pause", lambda: source.state()["paused"])
        (helper,) = (pid for pid in proc.descendants(process.pid) if "rewarm.lifeline" in proc.command_line(pid))
        os.kill(helper, signal.SIGSTOP)  # as one that is slow
        process.kill()
        process.wait()
    try:
        source.state(in_flight=0)
        proc.wait_for("its call to end", lambda: source.state()["calls"])
        calls = source.state()["calls"]
        with capturing(source) as process:
            time.sleep(1.5)
            assert process.poll() is None, "it has not waited"
            assert source.state()["calls"] == calls
            os.kill(helper, signal.SIGCONT)
            assert process.wait(60) == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(helper, signal.SIGCONT)
    expected = [call for call in LOUD["vllm"] if call.startswith("POST")]
    after = [call for call in source.state()["calls"][len(calls) :] if call in {*expected, "POST /pause"}]
    assert after[: len(expected)] == expected and after.count("POST /pause") == 1, after
    goes_on(source)
    copy = cluster.make("copy", "vllm")
    assert cluster.node.outcome("copy")["outcome"] == "warm"
    goes_on(copy)


def test_a_source_that_does_not_get_healthy(cluster: Cluster) -> None:
    """What was captured is right, so that is a note; a copy that ends before it is healthy takes its waker along."""
    node = cluster.node
    node.configure(engine_timeout=3.0)
    source = cluster.make("source", "vllm")
    source.state(starting=FOR_EVER)
    done = capture(source)
    assert f"the engine did not go on: resume engine vllm at port {PORT}: GET /health was answered by status 503" in (
        done.stderr
    )
    assert not source.state()["paused"]
    node.configure(engine_timeout=60.0)
    copy = cluster.make("copy", "vllm")
    waker = copy.waker()
    assert waker
    proc.wait_for("the waker's calls", lambda: copy.state()["calls"].count("GET /health") > 2)
    node.runtime.kill("copy")
    assert node.runtime.wait_stopped("copy") == SIGKILLED
    proc.wait_for("the waker's end", lambda: proc.state_of(waker) in (None, "Z"), timeout=5)
    said = copy.woken()
    assert not said["resumed"] and "its container has ended" in said["text"], said
    node.runtime.delete("copy")
    assert not node.container_directory("copy").exists()

    created = cluster.make("created", "vllm", start=False)
    waker = created.waker()
    assert waker
    node.runtime.delete("created", force=True)
    proc.wait_for("the waker's end", lambda: proc.state_of(waker) in (None, "Z"), timeout=5)
    assert not node.container_directory("created").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_source_that_is_stopped(cluster: Cluster, kind: str) -> None:
    """It is never told to go on, nor waited for: it would not get healthy for all of engine_timeout."""
    source = cluster.make("source", kind)
    source.state(starting=FOR_EVER)
    began = time.monotonic()
    done = capture(source, "--stop")
    assert time.monotonic() - began < 15 and "go on" not in done.stderr, done.stderr
    assert cluster.node.runtime.wait_stopped("source") == SIGKILLED
    copy = cluster.make("copy", kind)
    copy.state(starting=0)
    assert copy.woken()["resumed"], copy.woken()
    calls = copy.state()["calls"]
    assert calls[: len(QUIET[kind])] == QUIET[kind] and calls[len(QUIET[kind])] == LOUD[kind][0]
    assert copy.generate() == 200


@pytest.mark.parametrize("kind", KINDS)
def test_captured_when_it_is_ready(cluster: Cluster, kind: str) -> None:
    more = {"capture": "on-ready", "ready": f"http://:{PORT}/health"}
    source = cluster.make("source", kind, asks=more)
    path = cluster.node.container_directory("source") / "capture.json"
    proc.wait_for("the watcher's word", path.exists, timeout=60)
    said = json.loads(path.read_text())
    assert said["captured"], said
    calls = source.state()["calls"]
    while calls[0] == "GET /health":
        del calls[0]
    assert calls == QUIET[kind] + LOUD[kind]
    copy = cluster.make("copy", kind, asks=more)
    assert copy.woken()["resumed"], copy.woken()
    assert copy.generate() == 200 and source.generate() == 200
    assert len(cluster.node.json("ls")) == 1


@pytest.mark.parametrize("engine", ["none", "sglang"])
def test_a_copy_without_the_annotation_is_not_warm(cluster: Cluster, engine: str) -> None:
    """It would stay paused for ever, or be told in another engine's words."""
    capture(cluster.make("source", "vllm"), "--stop")
    copy = cluster.make("copy", "vllm", asks={"engine": engine})
    outcome = cluster.node.outcome("copy")
    assert outcome["outcome"] == "cold"
    said(outcome["reason"], "paused by rewarm.dev/engine: vllm", f"which is {engine} here")
    assert not copy.state()["paused"] and copy.generate() == 200
    assert not (cluster.node.container_directory("copy") / "engine.log").exists(), "no waker was started"


def test_a_copy_that_is_captured_at_once(cluster: Cluster) -> None:
    """The capture waits until the engine was told to go on: else that would come in the middle of it."""
    capture(cluster.make("source", "vllm"), "--stop")
    copy = cluster.make("copy", "vllm", start=False)
    waker = copy.waker()
    assert waker
    os.kill(waker, signal.SIGSTOP)  # as one that is slow
    cluster.node.runtime.start("copy")
    with capturing(copy) as process:
        calls = copy.state()["calls"]
        time.sleep(1.5)
        assert process.poll() is None
        assert copy.state()["calls"] == calls, "the capture has not waited"
        assert copy.state()["paused"], "nobody has told it yet"
        os.kill(waker, signal.SIGCONT)
        assert process.wait(60) == 0
    assert copy.woken()["resumed"]
    goes_on(copy)
    again = cluster.make("again", "vllm")
    assert cluster.node.outcome("again")["outcome"] == "warm"
    goes_on(again)


def test_a_copy_whose_waker_is_killed(cluster: Cluster) -> None:
    """Nobody has to be waited for; the capture has it go on afterwards."""
    capture(cluster.make("source", "vllm"), "--stop")
    copy = cluster.make("copy", "vllm", start=False)
    os.kill(copy.waker(), signal.SIGKILL)
    cluster.node.runtime.start("copy")
    assert copy.state()["paused"]
    capture(copy)
    goes_on(copy)
