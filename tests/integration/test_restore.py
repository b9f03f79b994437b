"""An annotated container comes back warm out of `create`, and is a container like any other."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from support import counter, proc
from support.node import Node


@pytest.fixture
def source(node: Node) -> Node:
    counter.captured(node)
    return node


def test_memory_files_and_streams(source: Node) -> None:
    runtime = source.runtime
    before = runtime.containers["source"]
    made = runtime.create("copy", counter.bundle(source.directory / "copy"))
    assert source.outcome("copy")["outcome"] == "warm"
    runtime.start("copy")
    made.stdout.wait_text("\n")
    made.stderr.wait_text("to stderr")
    counted = counter.numbers(made)
    assert counted[0] > 2, "it counts on, not from the start"
    assert "ready" not in made.stdout.text(), "the program did not start again"
    assert counter.hashes(made) <= counter.hashes(before), "its memory is the source's"
    assert "changed by the program" in runtime.exec("copy", "cat", "/etc/issue")
    assert runtime.exec("copy", "cat", "/var/lib/counter/state") == "kept\n"
    assert runtime.run("exec", "copy", "cat", "/etc/debian_version", check=False).returncode != 0
    first = counter.numbers(before)[-1]
    time.sleep(0.3)
    assert counter.numbers(before)[-1] > first, "the source runs on"


def test_nothing_runs_before_start(source: Node) -> None:
    made = source.runtime.create("copy", counter.bundle(source.directory / "copy"))
    assert made.pid is not None
    ticks = _cpu_ticks(made.pid)
    time.sleep(0.5)
    assert made.stdout.text() == "" and made.stderr.text() == ""
    assert {proc.state_of(pid) for pid in [made.pid, *proc.descendants(made.pid)]} == {"T"}
    assert _cpu_ticks(made.pid) == ticks
    assert source.runtime.state("copy")["status"] == "created"


def test_life_and_exit_code(source: Node) -> None:
    runtime = source.runtime
    made = runtime.create("copy", counter.bundle(source.directory / "copy"))
    state = runtime.state("copy")
    assert (state["status"], state["pid"]) == ("created", made.pid)
    assert Path(f"/proc/{made.pid}/root/etc/issue").read_text().endswith("changed by the program\n")
    runtime.start("copy")
    assert runtime.state("copy")["status"] == "running"
    assert runtime.run("start", "copy", check=False).returncode != 0, "a second start is refused, in runc's words"
    assert "cannot start" in runtime.last_error()
    listed = runtime.exec("copy", "python3", "-c", "import os; print(os.path.exists('/proc/1/exe'), os.getpid() > 1)")
    assert listed == "True True\n"
    runtime.kill("copy", "TERM")
    assert runtime.wait_stopped("copy") == 7
    assert runtime.state("copy")["status"] == "stopped"
    runtime.delete("copy")
    assert not runtime.exists("copy")
    assert not source.container_directory("copy").exists()


def test_started_by_python(source: Node) -> None:
    """The launcher does it by what `create` has written down; without that it is Python's, with the same result."""
    left = {}
    for name in ("one", "two"):
        made = source.runtime.create(name, counter.bundle(source.directory / name))
        prepared = source.container_directory(name) / "start"
        assert prepared.read_text().startswith(f"1\ninit {made.pid} ")
        if name == "two":
            prepared.unlink()
        source.runtime.start(name)
        made.stdout.wait_text("\n")
        assert source.runtime.state(name)["status"] == "running"
        directory = source.container_directory(name)
        phase = json.loads((directory / "record.json").read_text())["phase"]
        left[name] = (phase, sorted(os.listdir(directory)))
    assert left["one"] == left["two"] == ("started", ["control", "outcome.json", "record.json", "trace.json"])


def test_deleted_before_start(source: Node) -> None:
    """containerd deletes a container whose start failed without --force: runc allows that for `created` ones."""
    source.runtime.create("copy", counter.bundle(source.directory / "copy"))
    source.runtime.delete("copy")
    assert not source.runtime.exists("copy")


def test_killed_before_start(source: Node) -> None:
    source.runtime.create("copy", counter.bundle(source.directory / "copy"))
    source.runtime.kill("copy", "KILL")
    assert source.runtime.wait_stopped("copy") == 128 + signal.SIGKILL
    assert source.runtime.run("start", "copy", check=False).returncode != 0
    source.runtime.delete("copy")


def test_hooks_run(source: Node) -> None:
    """prestart and createRuntime by runc's restore, poststart by rewarm's start, poststop by runc's delete."""
    made = counter.bundle(source.directory / "copy")
    log = source.directory / "hooks.log"
    script = source.directory / "hook.sh"
    script.write_text(f'#!/bin/sh\necho "$1 $(cat)" >>{log}\n')
    script.chmod(0o755)
    kinds = ("prestart", "createRuntime", "poststart", "poststop")
    made.spec["hooks"] = {kind: [{"path": str(script), "args": [str(script), kind]}] for kind in kinds}
    made.write()
    runtime = source.runtime
    runtime.create("copy", made)
    assert source.outcome("copy")["outcome"] == "warm"
    assert not (source.container_directory("copy") / "start").exists(), "the launcher runs no hooks"
    runtime.start("copy")
    runtime.kill("copy", "KILL")
    runtime.wait_stopped("copy")
    runtime.delete("copy")
    lines = [line.split(" ", 1) for line in log.read_text().splitlines() if line]
    assert [line[0] for line in lines] == list(kinds)
    for kind, text in lines:
        state = json.loads(text)
        assert state["id"] == "copy", kind
    assert json.loads(lines[2][1])["status"] == "running"


def test_restored_container_is_captured_again(source: Node) -> None:
    runtime = source.runtime
    first = runtime.create("copy", counter.bundle(source.directory / "copy"))
    runtime.start("copy")
    first.stdout.wait_text("\n")
    runtime.exec("copy", "sh", "-c", "echo second >/var/lib/counter/second; rm /etc/issue.net")
    source.rewarm("capture", "copy", "--name", "again", "--stop")
    assert runtime.wait_stopped("copy") == 128 + signal.SIGKILL
    again = runtime.create("third", counter.bundle(source.directory / "third", {"rewarm.dev/snapshot": "again"}))
    assert source.outcome("third")["outcome"] == "warm"
    runtime.start("third")
    again.stdout.wait_text("\n")
    assert counter.numbers(again)[0] >= counter.numbers(first)[-1], "it counts on where the copy was stopped"
    assert runtime.exec("third", "cat", "/var/lib/counter/second") == "second\n"
    assert "changed by the program" in runtime.exec("third", "cat", "/etc/issue")
    assert runtime.run("exec", "third", "cat", "/etc/issue.net", check=False).returncode != 0


def test_cgroup_is_the_new_containers(source: Node) -> None:
    made = source.runtime.create("copy", counter.bundle(source.directory / "copy"))
    places = {line.split(":")[2] for line in Path(f"/proc/{made.pid}/cgroup").read_text().splitlines()}
    assert places == {source.runtime.containers["copy"].bundle.cgroup}


def test_limits_are_the_new_containers(source: Node) -> None:
    made = counter.bundle(source.directory / "copy")
    made.spec["linux"]["resources"]["memory"] = {"limit": 300 << 20}
    made.write()
    source.runtime.create("copy", made)
    assert source.outcome("copy")["outcome"] == "warm"
    limits = [p for p in ("/sys/fs/cgroup/memory", "/sys/fs/cgroup") if os.path.isdir(p + made.cgroup)]
    names = ("memory.limit_in_bytes", "memory.max")
    found = [Path(limits[0] + made.cgroup, name) for name in names]
    assert next(path for path in found if path.exists()).read_text().strip() == str(300 << 20)


def test_two_at_once(source: Node) -> None:
    runtime = source.runtime
    started = [runtime.spawn("create", name, counter.bundle(source.directory / name)) for name in ("one", "two")]
    for process, container in started:
        assert process.wait(60) == 0
        runtime.settle(container)
        assert source.outcome(container.id)["outcome"] == "warm"
        runtime.start(container.id)
    for _, container in started:
        container.stdout.wait_text("\n")


def test_a_process_that_was_stopped_stays_stopped(node: Node) -> None:
    program = (
        "import os, signal, sys, time\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    while True: time.sleep(0.05); print('child', flush=True)\n"
        "time.sleep(0.3); os.kill(child, signal.SIGSTOP)\n"
        "n = 0\n"
        "while True:\n"
        "    time.sleep(0.05); n += 1; print(n, 'parent', flush=True)\n"
        "    if n % 40 == 0: os.kill(child, signal.SIGCONT)\n"
    )
    args = ["python3", "-c", program]
    annotations = {"rewarm.dev/snapshot": "stopped"}
    source = counter.run(node.runtime, "source", counter.bundle(node.directory / "source", annotations, args=args))
    assert "child" in source.stdout.text()
    node.rewarm("capture", "source", "--name", "stopped")
    made = node.runtime.create("copy", counter.bundle(node.directory / "copy", annotations, args=args))
    assert node.outcome("copy")["outcome"] == "warm"
    node.runtime.start("copy")
    made.stdout.wait_text("parent")
    time.sleep(0.3)
    assert "child" not in made.stdout.text()
    made.stdout.wait_text("child")


def test_not_annotated_is_plain_runc(node: Node) -> None:
    made = counter.run(node.runtime, "plain", counter.bundle(node.directory / "plain", {}))
    assert made.pid is not None
    assert not node.state.exists()
    node.runtime.kill("plain", "TERM")
    assert node.runtime.wait_stopped("plain") == 7
    node.runtime.delete("plain")


def test_sandbox_is_never_touched(source: Node) -> None:
    annotations = {"rewarm.dev/snapshot": "counter", "io.kubernetes.cri.container-type": "sandbox"}
    counter.run(source.runtime, "pause", counter.bundle(source.directory / "pause", annotations))
    assert not source.container_directory("pause").exists()


def test_another_container_of_the_pod_is_not_touched(source: Node) -> None:
    annotations = {
        "rewarm.dev/snapshot": "counter",
        "rewarm.dev/container": "server",
        "io.kubernetes.cri.container-name": "sidecar",
    }
    counter.run(source.runtime, "side", counter.bundle(source.directory / "side", annotations))
    assert not source.container_directory("side").exists()


def test_users_org_criu_config_is_stripped(source: Node) -> None:
    """It names a file of CRIU options on the node: a user of a pod must not have it."""
    planted = source.directory / "evil.conf"
    planted.write_text("this-is-no-option\n")
    annotations = {"rewarm.dev/snapshot": "counter", "org.criu.config": str(planted)}
    source.runtime.create("copy", counter.bundle(source.directory / "copy", annotations))
    assert source.outcome("copy")["outcome"] == "warm"
    assert "org.criu.config" not in source.runtime.state("copy").get("annotations", {})


def _cpu_ticks(pid: int) -> tuple[str, ...]:
    return tuple(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:15])
