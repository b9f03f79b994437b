"""rewarm.dev/capture: on-ready: a watcher captures the container once it says that it is ready."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from support import counter, proc
from support.node import Node

ANNOTATIONS = {"rewarm.dev/snapshot": "counter", "rewarm.dev/capture": "on-ready"}

# Says 503 until the file /tmp/go is there, and counts like the counter does.
SERVER = """
import http.server, os, threading, time
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/healthz" and os.path.exists("/tmp/go") else 503)
        self.end_headers()
    def log_message(self, *_): pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", 8080), Health)
threading.Thread(target=server.serve_forever, daemon=True).start()
count = 0
while True:
    time.sleep(0.05)
    count += 1
    print(count, "x", flush=True)
"""


def watched(node: Node, name: str, **more: Any) -> dict[str, Any]:
    """What the watcher of a container said at its end."""
    path = node.container_directory(name) / "capture.json"
    proc.wait_for("the watcher's word", path.exists, timeout=60)
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def watcher_of(node: Node, name: str) -> int:
    wanted = str(node.container_directory(name))
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            words = proc.command_line(int(entry.name))
            if "rewarm.watcher" in words and wanted in words:
                return int(entry.name)
    raise AssertionError("there is no watcher")


def test_by_file(node: Node) -> None:
    source = counter.run(node.runtime, "source", counter.bundle(node.directory / "source", ANNOTATIONS))
    said = watched(node, "source")
    assert said["captured"], said
    made = node.runtime.create("copy", counter.bundle(node.directory / "copy", ANNOTATIONS))
    assert node.outcome("copy")["outcome"] == "warm"
    node.runtime.start("copy")
    made.stdout.wait_text("\n")
    assert counter.hashes(made) <= counter.hashes(source)
    before = counter.numbers(source)[-1]
    proc.wait_for("the source to count on", lambda: counter.numbers(source)[-1] > before)
    assert len(node.json("ls")) == 1, "the restored container was not captured again"


@pytest.mark.parametrize("ready", ["http://:8080/healthz", "exec:test -e /tmp/go"])
def test_by_http_and_by_command(node: Node, ready: str) -> None:
    annotations = {**ANNOTATIONS, "rewarm.dev/ready": ready}
    args = ["python3", "-c", SERVER]
    counter.run(node.runtime, "source", counter.bundle(node.directory / "source", annotations, args=args))
    watcher = watcher_of(node, "source")
    assert not (node.container_directory("source") / "capture.json").exists(), "it is not ready yet"
    node.runtime.exec("source", "touch", "/tmp/go")
    said = watched(node, "source")
    assert said["captured"], said
    proc.wait_for("the watcher's end", lambda: proc.state_of(watcher) in (None, "Z"))
    node.runtime.create("copy", counter.bundle(node.directory / "copy", annotations, args=args))
    assert node.outcome("copy")["outcome"] == "warm"


def test_two_replicas_at_once_make_one_snapshot(node: Node) -> None:
    annotations = {**ANNOTATIONS, "rewarm.dev/ready": "exec:test -e /tmp/go"}
    for name in ("one", "two"):
        counter.run(node.runtime, name, counter.bundle(node.directory / name, annotations))
    for name in ("one", "two"):
        node.runtime.exec(name, "touch", "/tmp/go")
    said = [watched(node, name) for name in ("one", "two")]
    assert sorted(one["captured"] for one in said) == [False, True], said
    assert len(node.json("ls")) == 1


@pytest.mark.parametrize(
    "plant",
    [
        "os.mkfifo('/run/rewarm/ready')",
        "os.symlink('/etc/passwd', '/run/rewarm/ready')",
        "os.symlink('/nowhere', '/run/rewarm/ready')",
        "__import__('socket').socket(__import__('socket').AF_UNIX).bind('/run/rewarm/ready')",
        "os.mknod('/run/rewarm/ready', 0o020600, os.makedev(1, 3))",
        "[open(f'/run/rewarm/{n}', 'w').close() for n in range(1000)]",
    ],
    ids=["fifo", "link", "dangling", "socket", "device", "thousand"],
)
def test_what_is_no_readiness_file(node: Node, plant: str) -> None:
    node.configure(ready_timeout=1.5)
    program = f"import os, time\n{plant}\nn = 0\nwhile True: n += 1; print(n, 'x', flush=True); time.sleep(0.05)\n"
    args = ["python3", "-c", program]
    counter.run(node.runtime, "source", counter.bundle(node.directory / "source", ANNOTATIONS, args=args))
    said = watched(node, "source")
    assert not said["captured"] and "not ready within 1.5 s" in said["text"]
    assert node.runtime.state("source")["status"] == "running", "it could not plant it"
    node.runtime.stop("source")
    assert not node.container_directory("source").exists()


def test_a_container_that_dies_first_takes_its_watcher_along(node: Node) -> None:
    """The watcher holds none of the container's streams either: their end is seen while it still waits."""
    annotations = {**ANNOTATIONS, "rewarm.dev/ready": "exec:false"}
    made = counter.run(node.runtime, "source", counter.bundle(node.directory / "source", annotations))
    watcher = watcher_of(node, "source")
    targets = {os.readlink(path) for path in Path(f"/proc/{watcher}/fd").iterdir()}
    assert not any(target.startswith("pipe:") for target in targets), targets
    node.runtime.kill("source", "KILL")
    made.stdout.wait_end(timeout=10)
    assert node.runtime.wait_stopped("source") == 128 + signal.SIGKILL
    proc.wait_for("the watcher's end", lambda: proc.state_of(watcher) in (None, "Z"), timeout=40)
    node.runtime.delete("source")
    assert not (node.store / "v1" / "snapshots").exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_capture_that_is_ended_in_the_middle(node: Node, number: int) -> None:
    source = counter.run(
        node.runtime, "source", counter.bundle(node.directory / "source", env={"MIB": "400", "PYTHONHASHSEED": "0"})
    )
    words = [str(node.prefix / "bin" / "rewarm"), "capture", "source", "--name", "counter"]
    capture = subprocess.Popen(
        words, env={**os.environ, **node.env}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    proc.wait_for("the pause", lambda: node.runtime.state("source")["status"] == "paused", interval=0.001)
    capture.send_signal(number)
    assert capture.wait(60) != 0
    proc.wait_for("the source to run again", lambda: node.runtime.state("source")["status"] == "running")
    before = counter.numbers(source)[-1]
    proc.wait_for("the source to count on", lambda: counter.numbers(source)[-1] > before)
    proc.wait_for("an empty work directory", lambda: not list((node.directory / "work").glob("capture-*")))
    assert node.json("ls") == []
    node.rewarm("capture", "source", "--name", "counter")
    node.rewarm("verify")
    node.runtime.create("copy", counter.bundle(node.directory / "copy", env={"MIB": "400", "PYTHONHASHSEED": "0"}))
    assert node.outcome("copy")["outcome"] == "warm"
