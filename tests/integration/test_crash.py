"""Killed at whatever moment, rewarm leaves no half-restored container, and nothing that stands in a create's way."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from support import cgroups, counter, faults
from support.bundle import Bundle
from support.node import Node
from support.proc import children, command_line, descendants, kill, reap_orphans, state_of, wait_for
from support.runtime import Container

GONE = 10.0
"""Seconds after a kill within which no process of the container may be left."""


@dataclass(frozen=True)
class Snapshot:
    store: Path
    hashes: set[str]
    env: dict[str, str]


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory, prefix: Path) -> Iterator[Snapshot]:
    with Node(tmp_path_factory.mktemp("captured"), prefix) as node:
        source = faults.captured(node)
        yield Snapshot(node.store, counter.hashes(source), faults.SMALL)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory, prefix: Path) -> Iterator[Snapshot]:
    """Of 128 MiB of memory and a diff of 32 MiB, so that verification, CRIU and the hook take their time."""
    env = {"PYTHONHASHSEED": "0", "MIB": "128"}
    directory = tmp_path_factory.mktemp("large")
    with Node(directory, prefix) as node:
        made = counter.bundle(directory / "source", env=env)
        (made.rootfs / "var/large").write_bytes(os.urandom(32 << 20))
        source = counter.run(node.runtime, "source", made)
        node.rewarm("capture", "source", "--name", "counter")
        node.runtime.stop("source")
        yield Snapshot(node.store, counter.hashes(source), env)


@pytest.fixture
def other(nothing_left_behind: None, snapshot: Snapshot, tmp_path: Path, prefix: Path) -> Iterator[Node]:
    with Node(tmp_path / "node", prefix, store=snapshot.store) as node:
        yield node


def bundle(node: Node, name: str, snapshot: Snapshot) -> Bundle:
    return faults.bundle(node.directory / name, snapshot.env)


def killed(node: Node, name: str, made: Bundle, moment: Callable[[subprocess.Popen[bytes]], None]) -> Container:
    """Begin to create a container and SIGKILL rewarm when `moment` returns."""
    process, container = node.runtime.spawn("create", name, made)
    moment(process)
    process.kill()
    process.wait()
    return container


def gone(node: Node, name: str, made: Bundle, before: faults.Before) -> None:
    """Without anybody's doing nothing is left of the container, or all of it: then it was complete before the kill."""

    def settled() -> bool:
        reap_orphans()
        # Before the guard is there, nothing is changed but the container directory, which the next create takes away.
        left = [line for line in faults.remains(node, name, made) if not line.startswith(str(node.state))]
        return not guards(node, name) and (complete(node, name) or not left)

    wait_for(f"end of what was begun: {faults.remains(node, name, made)}", settled, timeout=GONE)
    if complete(node, name):
        node.runtime.delete(name, force=True)
    else:
        before.check_files()
        before.check_config()
        before.check_names()


def guards(node: Node, name: str) -> list[int]:
    """The guards of a restore, or the recoveries that they became."""
    directory = str(node.container_directory(name))
    return [pid for pid in descendants(os.getpid()) if f"rewarm.recover {directory}" in command_line(pid)]


def complete(node: Node, name: str) -> bool:
    """Whether a create was finished but for its exit: the record says so and no guard is there to take it back."""
    return is_restored(node, name) and not guards(node, name) and node.container_directory(name).exists()


def is_restored(node: Node, name: str) -> bool:
    """Whether the record says so; a guard that is there may have been told yet, or not."""
    try:
        phase = json.loads((node.container_directory(name) / "record.json").read_text())["phase"]
    except FileNotFoundError:
        return False
    return bool(phase == "restored")


def works(node: Node, name: str, made: Bundle, snapshot: Snapshot, outcome: str = "warm") -> None:
    """Create, start, look, delete: memory, files and streams are what they should be."""
    container = node.runtime.create(name, made)
    assert node.outcome(name)["outcome"] == outcome, node.outcome(name)
    node.runtime.start(name)
    container.stdout.wait_text("\n")
    # The program writes that line once: a cold start on the changed rootfs would have it twice.
    assert node.runtime.exec(name, "cat", "/etc/issue").count("changed by the program") == 1
    assert node.runtime.run("exec", name, "test", "-e", "/etc/debian_version", check=False).returncode != 0
    assert node.runtime.exec(name, "cat", "/var/lib/counter/state") == "kept\n"
    if outcome == "warm":
        assert counter.numbers(container)[0] > 2
        assert counter.hashes(container) <= snapshot.hashes
    else:
        assert container.stdout.text().startswith("ready\n")
    node.runtime.kill(name, "TERM")
    assert node.runtime.wait_stopped(name) == 7
    node.runtime.delete(name)


def appears(path: Path) -> Callable[[subprocess.Popen[bytes]], None]:
    def wait(process: subprocess.Popen[bytes]) -> None:
        wait_for(str(path), path.exists, interval=0)

    return wait


def test_killed_at_any_moment(other: Node, snapshot: Snapshot) -> None:
    durations = []
    for number in range(3):
        began = time.monotonic()
        other.runtime.create(f"measured-{number}", bundle(other, f"measured-{number}", snapshot))
        durations.append(time.monotonic() - began)
        other.runtime.delete(f"measured-{number}", force=True)
    one_after_another(other, snapshot, sorted(durations)[1] * 1.1, 25)


def test_large_one_killed_at_any_moment(large: Snapshot, tmp_path: Path, prefix: Path) -> None:
    with Node(tmp_path / "node", prefix, store=large.store) as node:
        began = time.monotonic()
        node.runtime.create("measured", bundle(node, "measured", large))
        duration = time.monotonic() - began
        node.runtime.delete("measured", force=True)
        one_after_another(node, large, duration, 8)


def one_after_another(node: Node, snapshot: Snapshot, duration: float, count: int) -> None:
    """Kills spread over the length of a create, each somewhere in its own part of it."""
    for number in range(count):
        delay = duration * (number + random.random()) / count
        name = f"killed-{number}"
        made = bundle(node, name, snapshot)
        before = faults.Before(made)
        print(f"{name}: after {delay:.4f} s of {duration:.4f}")
        killed(node, name, made, lambda process, delay=delay: time.sleep(delay))  # type: ignore[misc]
        # Every third time the next create comes at once, as from an engine that tries again. A complete container
        # is in its way, and whether it is complete can be said when its guard has ended.
        if number % 3 or is_restored(node, name):
            gone(node, name, made, before)
        if (made.rootfs / "etc/debian_version").exists():
            works(node, name, made, snapshot)
        else:
            # It was complete, and deleted: its rootfs is what the program left, and the engine's to throw away.
            works(node, name, bundle(node, f"{name}-again", snapshot), snapshot)


def test_killed_when_the_spec_is_changed(other: Node, snapshot: Snapshot) -> None:
    """The first thing that is changed and is not rewarm's own; runc has not been started then, as a rule."""
    for number in range(5):
        made = bundle(other, f"copy-{number}", snapshot)
        before = faults.Before(made)
        config = made.directory / "config.json"
        status = config.stat()

        def changed(process: subprocess.Popen[bytes], config: Path = config, inode: int = status.st_ino) -> None:
            wait_for("another config.json", lambda: config.stat().st_ino != inode, interval=0)

        killed(other, made.name, made, changed)
        gone(other, made.name, made, before)


@pytest.mark.parametrize("kind", ["prestart", "createRuntime"])
def test_killed_during_a_hook(other: Node, snapshot: Snapshot, kind: str) -> None:
    """Before and after the rootfs diff is applied; CRIU and runc have mounts in the node's own namespace by then."""
    made = bundle(other, "copy", snapshot)
    flag = faults.blocking(other, kind, made)
    before = faults.Before(made)
    yards = []

    def in_the_hook(process: subprocess.Popen[bytes]) -> None:
        appears(flag)(process)
        yards.append(faults.mount_yard(other, "copy"))

    killed(other, "copy", made, in_the_hook)
    gone(other, "copy", made, before)
    assert faults.remains(other, "copy", made) == []
    assert not yards[0].exists()
    works(other, "other", bundle(other, "other", snapshot), snapshot)
    works(other, "copy", made, snapshot)


@pytest.mark.parametrize(
    "place", ["record.json", "work", "rootfs.undo", "rootfs.undo.tmp", "work/restore.log", "runc.json"]
)
def test_killed_when_a_file_appears(large: Snapshot, tmp_path: Path, prefix: Path, place: str) -> None:
    """While files are copied, while the diff is applied, while CRIU restores."""
    with Node(tmp_path / "node", prefix, store=large.store) as node:
        made = bundle(node, "copy", large)
        before = faults.Before(made)
        path = node.container_directory("copy") / place

        def moment(process: subprocess.Popen[bytes]) -> None:
            wait_for(place, lambda: path.exists() or process.poll() is not None, interval=0)

        killed(node, "copy", made, moment)
        gone(node, "copy", made, before)
        works(node, "copy", made, large) if (made.rootfs / "etc/debian_version").exists() else None


def test_killed_when_runc_has_ended(other: Node, snapshot: Snapshot) -> None:
    """The tree is restored and stopped; only rewarm's own last steps are missing."""
    made = bundle(other, "copy", snapshot)
    before = faults.Before(made)
    flag, go = other.directory / "runc-ended", other.directory / "go"
    runc = other.directory / "bin" / "runc"
    runc.parent.mkdir()
    runc.write_text(
        "#!/bin/sh\n"
        f'case " $* " in *" restore "*) runc "$@" || exit; touch {flag}; until [ -e {go} ]; do sleep 0.01; done;; '
        '*) exec runc "$@";; esac\n'
    )
    runc.chmod(0o755)
    other.configure(runtimes=[str(runc)])

    def moment(process: subprocess.Popen[bytes]) -> None:
        wait_for("end of runc", flag.exists)
        os.kill(worker(process.pid), signal.SIGSTOP)
        go.touch()
        assert len(cgroups.processes(made.cgroup)) >= 1

    killed(other, "copy", made, moment)
    gone(other, "copy", made, before)
    assert faults.remains(other, "copy", made) == []
    works(other, "copy", made, snapshot)


def test_killed_just_before_the_commit(other: Node, snapshot: Snapshot) -> None:
    """The record says `restored`, the guard has not been told yet: what it kills must not be left as a container."""
    hits = 0
    for number in range(40):
        name = f"copy-{number}"
        made = bundle(other, name, snapshot)
        before = faults.Before(made)
        path = other.container_directory(name) / "record.json"

        def moment(process: subprocess.Popen[bytes], path: Path = path) -> None:
            while process.poll() is None:
                try:
                    if '"phase": "restored"' in path.read_text():
                        return
                except FileNotFoundError:
                    continue

        killed(other, name, made, moment)
        hit = not complete(other, name)
        gone(other, name, made, before)
        assert faults.remains(other, name, made) == []
        if hit:
            hits += 1
            works(other, name, made, snapshot)
        if hits == 3:
            return
    raise AssertionError(f"only {hits} of 40 kills came in time")


def test_killed_when_the_directory_has_no_name_yet(other: Node, snapshot: Snapshot) -> None:
    """What a shim does next takes it away, on the node's own settings and by way of the launcher."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    place = other.container_directory("copy")
    half = place.with_name(f"copy~{ended.pid}")
    (half / "control").mkdir(parents=True)
    other.runtime.run("delete", "--force", "copy", check=False)
    assert list(place.parent.iterdir()) == []


def test_next_create_waits_for_the_guard(other: Node, snapshot: Snapshot) -> None:
    """An engine that tries again at once meets the clean-up, and has to wait for its end."""
    made = bundle(other, "copy", snapshot)
    killed(other, "copy", made, appears(faults.blocking(other, "createRuntime", made)))
    works(other, "copy", made, snapshot)


def test_create_of_another_id_at_once(other: Node, snapshot: Snapshot) -> None:
    made = bundle(other, "copy", snapshot)
    flag = faults.blocking(other, "createRuntime", made)
    before = faults.Before(made)
    killed(other, "copy", made, appears(flag))
    works(other, "other", bundle(other, "other", snapshot), snapshot)
    gone(other, "copy", made, before)


@pytest.mark.parametrize("kind", ["prestart", "createRuntime"])
def test_delete_force_at_once(other: Node, snapshot: Snapshot, kind: str) -> None:
    """What a shim does after a create that it killed; containerd gives it 5 seconds."""
    made = bundle(other, "copy", snapshot)
    flag = faults.blocking(other, kind, made)
    before = faults.Before(made)
    killed(other, "copy", made, appears(flag))
    other.runtime.run("delete", "--force", "copy", timeout=5)
    assert faults.remains(other, "copy", made) == []
    before.check_files()
    before.check_config()
    works(other, "copy", made, snapshot)


def test_guard_killed_as_well(other: Node, snapshot: Snapshot) -> None:
    """Then it is the next create on the node that cleans up, whatever container it is of."""
    made = bundle(other, "copy", snapshot)
    flag = faults.blocking(other, "createRuntime", made)
    before = faults.Before(made)
    process, _ = other.runtime.spawn("create", "copy", made)
    wait_for("hook", flag.exists)
    guard, runc, _ = family(process.pid)
    hook = sleeping(process.pid)
    yard = faults.mount_yard(other, "copy")
    os.kill(worker(process.pid), signal.SIGSTOP)
    kill(guard)
    process.kill()
    process.wait()
    kill(hook)  # the user's own, which outlives a killed runc too
    wait_for("end of runc", lambda: state_of(runc) in (None, "Z"))
    works(other, "other", bundle(other, "other", snapshot), snapshot)
    reap_orphans()
    assert faults.remains(other, "copy", made) == []
    assert not yard.exists()
    before.check_files()
    before.check_config()
    works(other, "copy", made, snapshot)


@pytest.mark.parametrize("kind", ["prestart", "createRuntime"])
@pytest.mark.parametrize("victim", ["guard", "runc", "criu", "worker"])
def test_a_helper_killed(other: Node, snapshot: Snapshot, victim: str, kind: str) -> None:
    """rewarm lives and starts the container cold, in a root filesystem as it was."""
    made = bundle(other, "copy", snapshot)
    flag = faults.blocking(other, kind, made)
    before = faults.Before(made)
    process, container = other.runtime.spawn("create", "copy", made)
    wait_for("hook", flag.exists)
    found = dict(zip(("guard", "runc", "criu"), family(process.pid), strict=True))
    found["worker"] = worker(process.pid)
    hook = sleeping(process.pid)
    yard = faults.mount_yard(other, "copy")
    kill(found[victim])
    # The user's own: of a dead criu too runc waits for it, and it outlives a killed runc.
    kill(hook)
    assert process.wait(30) == 0
    other.runtime.settle(container)
    assert other.outcome("copy")["outcome"] == "cold", other.outcome("copy")
    before.check_files(mount_points=True)
    assert cgroups.processes(made.cgroup) == {container.pid}
    left = [line for line in faults.remains(other, "copy", made) if line.startswith("mount")]
    assert left == []
    assert not yard.exists()
    other.runtime.start("copy")
    assert container.stdout.wait_text("\n2 ").startswith("ready\n1 ")
    other.runtime.delete("copy", force=True)


def worker(rewarm: int) -> int:
    """The process that restores, a child of the one that the engine waits for."""
    (found,) = children(rewarm)
    return found


def sleeping(rewarm: int) -> int:
    """The hook of `blocking`, which has made its flag already, and becomes this."""

    def look() -> int:
        return next((pid for pid in descendants(rewarm) if command_line(pid).startswith("sleep")), 0)

    return wait_for("the hook's sleep", look)


def family(rewarm: int) -> tuple[int, int, int]:
    """Guard, runc and criu of a restore that goes on."""
    below = descendants(rewarm)
    guard = next(pid for pid in below if "rewarm-guard" in command_line(pid).split(" ")[0])
    runc = next(pid for pid in descendants(guard) if " restore " in command_line(pid))
    # CRIU writes over its own arguments.
    criu = next(pid for pid in children(runc) if not command_line(pid).startswith("sleep"))
    return guard, runc, criu


def test_guard_killed_while_the_diff_is_applied(large: Snapshot, tmp_path: Path, prefix: Path) -> None:
    """The hook is nobody's child then; it must not go on changing what is put back."""
    with Node(tmp_path / "node", prefix, store=large.store) as node:
        made = bundle(node, "copy", large)
        before = faults.Before(made)
        undo = node.container_directory("copy") / "rootfs.undo"
        process, container = node.runtime.spawn("create", "copy", made)
        wait_for("undo layer", undo.exists, interval=0)
        hook = next(pid for pid in descendants(process.pid) if str(undo) in command_line(pid).split(" "))
        os.kill(hook, signal.SIGSTOP)
        kill(next(pid for pid in descendants(process.pid) if "rewarm-guard" in command_line(pid).split(" ")[0]))
        assert process.wait(30) == 0
        assert state_of(hook) in (None, "Z")
        node.runtime.settle(container)
        assert node.outcome("copy")["outcome"] == "cold"
        before.check_files(mount_points=True)
        node.runtime.delete("copy", force=True)


def test_terminated(other: Node, snapshot: Snapshot) -> None:
    """SIGTERM: everything is undone by the time rewarm ends, and nothing is started instead."""
    made = bundle(other, "copy", snapshot)
    flag = faults.blocking(other, "createRuntime", made)
    before = faults.Before(made)
    process, container = other.runtime.spawn("create", "copy", made)
    wait_for("hook", flag.exists)
    yard = faults.mount_yard(other, "copy")
    process.terminate()
    assert process.wait(10) == 128 + signal.SIGTERM
    assert faults.remains(other, "copy", made) == []
    assert not yard.exists()
    before.check_files()
    before.check_config()
    before.check_names()
    assert "ended by a signal" in other.runtime.last_error()
    assert container.stdout.wait_end() == ""
    works(other, "copy", made, snapshot)


def test_deleted_during_the_restore(other: Node, snapshot: Snapshot) -> None:
    """A plain `runc delete` would now walk through its bind mount into the rootfs and empty it."""
    made = bundle(other, "copy", snapshot)
    flag = faults.blocking(other, "createRuntime", made)
    before = faults.Before(made)
    process, _ = other.runtime.spawn("create", "copy", made)
    wait_for("hook", flag.exists)
    assert other.runtime.run("delete", "copy", check=False).returncode == 1
    assert "cannot delete container copy that is not stopped" in other.runtime.last_error()
    assert process.poll() is None
    other.runtime.run("delete", "--force", "copy", timeout=5)
    assert process.wait(5) == -signal.SIGKILL
    assert faults.remains(other, "copy", made) == []
    before.check_files()
    before.check_config()
    works(other, "copy", made, snapshot)


def test_two_creates_of_one_id(other: Node, snapshot: Snapshot) -> None:
    made = bundle(other, "copy", snapshot)
    flag = faults.blocking(other, "createRuntime", made)
    process, container = other.runtime.spawn("create", "copy", made)
    wait_for("hook", flag.exists)
    with bundle(other, "second", snapshot) as second:
        before = faults.Before(second)
        done = other.runtime.run("create", "--bundle", second.directory, "copy", check=False)
        assert done.returncode != 0
        assert "container with given ID already exists" in other.runtime.last_error()
        before.check_files()
        before.check_config()
    kill(sleeping(process.pid))
    assert process.wait(30) == 0  # its hook failed: cold
    other.runtime.settle(container)
    other.runtime.start("copy")
    container.stdout.wait_text("\n2 ")


def test_start_killed(other: Node, snapshot: Snapshot) -> None:
    """In its poststart hook: the container runs, as after a `runc start` that was killed there."""
    made = bundle(other, "copy", snapshot)
    flag = faults.blocking(other, "poststart", made)
    container = other.runtime.create("copy", made)
    assert other.outcome("copy")["outcome"] == "warm"
    process = subprocess.Popen(other.runtime.argv("start", "copy"), env=other.runtime.env, stdin=subprocess.DEVNULL)
    wait_for("hook", flag.exists)
    hanging = descendants(process.pid)
    process.kill()
    process.wait()
    for pid in hanging:
        kill(pid)
    container.stdout.wait_text("\n")
    assert other.runtime.state("copy")["status"] == "running"
    assert counter.hashes(container) <= snapshot.hashes
    other.runtime.kill("copy", "TERM")
    assert other.runtime.wait_stopped("copy") == 7
    other.runtime.delete("copy")
    assert faults.remains(other, "copy", made) == []
