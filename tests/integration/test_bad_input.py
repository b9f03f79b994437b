"""Input that is wrong: manifests, annotations, stores, containers, names. Each is refused in words and hurts nobody."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rewarm.store.directory import DirectoryStore
from support import cgroups, counter, faults
from support.node import Node
from support.outcomes import fails, falls_back, said, starts_cold
from support.proc import command, wait_for
from support.runtime import Container, Runtime

TEN_KB = "x" * 10240


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, prefix: Path) -> Iterator[Path]:
    """A store with the counter's snapshot. Not to be changed."""
    with Node(tmp_path_factory.mktemp("captured"), prefix) as node:
        faults.captured(node)
        yield node.store


@pytest.fixture
def other(nothing_left_behind: None, store: Path, tmp_path: Path, prefix: Path) -> Iterator[Node]:
    """A second node with a copy of the store."""
    with Node(tmp_path / "node", prefix, store=faults.copied(store, tmp_path / "store")) as node:
        yield node


@pytest.fixture
def running(node: Node) -> Container:
    """A container that runs and can be captured."""
    return counter.run(node.runtime, "source", counter.bundle(node.directory / "source", env=faults.SMALL))


# Manifests.


def test_manifest_truncated(other: Node) -> None:
    (path,) = other.store.glob("v1/snapshots/default/counter/*.json")
    os.truncate(path, path.stat().st_size // 2)
    falls_back(other, "read manifest", "default/counter@", "is truncated or was changed", "capture again")


def test_manifest_truncated_with_a_right_digest(other: Node) -> None:
    (path,) = other.store.glob("v1/snapshots/default/counter/*.json")
    faults.with_manifest(other.store, path.read_bytes()[:-100])
    falls_back(other, "read manifest", "default/counter@", "JSON")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda document: document.update(version=2), "version 2 is unknown"),
        (lambda document: document.pop("version"), "field version is missing"),
        (lambda document: document.pop("requires"), "field requires is missing"),
        (lambda document: document["requires"].pop("args"), "field requires.args is missing"),
        (lambda document: document["files"][0].pop("digest"), "field files[0].digest is missing"),
        (lambda document: document["processes"][0].pop("threads"), "field processes[0].threads is missing"),
        (lambda document: document.update(processes={}), "processes"),
        (lambda document: document["files"][0].update(name="../../etc/passwd"), "files[0].name"),
    ],
    ids=["version", "no version", "no requires", "no args", "no digest", "no threads", "type", "name"],
)
def test_manifest(other: Node, change: Callable[[dict[str, Any]], None], expected: str) -> None:
    faults.rewritten(other.store, change)
    made = faults.bundle(other.directory / "copy")
    fails(other, made, "read manifest", "default/counter@", expected)
    if expected.startswith("version"):
        starts_cold(other, made, expected)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("checkpoint/core-1.img", "restore"),
        ("checkpoint/pages-1.img", "restore container copy"),
        ("checkpoint/inventory.img", "read images of snapshot counter: inventory.img: it is not there"),
        ("checkpoint/descriptors.json", "descriptors.json"),
    ],
)
def test_manifest_without_an_image_file(other: Node, name: str, expected: str) -> None:
    def change(document: dict[str, Any]) -> None:
        document["files"] = [entry for entry in document["files"] if entry["name"] != name]
        # What lies behind it in a shared pack has no place any more: give the others packs of their own.

    with_own_packs(other.store)
    faults.rewritten(other.store, change)
    made = faults.bundle(other.directory / "copy")
    fails(other, made, expected)
    starts_cold(other, made, expected)


def with_own_packs(store: Path) -> None:
    """Every file of the snapshot in a pack of its own, so that one can be left out of the manifest."""
    opened, _, manifest = faults.only(store)
    contents = {}
    for entry in manifest.files:
        data = opened.pack_path(entry.pack).read_bytes()
        contents[entry.name] = data[entry.offset : entry.offset + entry.size]
    for entry in manifest.files:
        path = opened.pack_path(entry.digest)
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            path.write_bytes(contents[entry.name])

    def change(document: dict[str, Any]) -> None:
        for entry in document["files"]:
            entry.update(pack=entry["digest"], offset=0)

    faults.rewritten(store, change)


# Annotations.


@pytest.mark.parametrize(
    ("annotations", "expected"),
    [
        ({"snapshot": "counter", "fast": "yes"}, ["rewarm.dev/fast", "'yes'", "no such key", "known are", "on-miss"]),
        ({"snapshot": "counter", "on-miss": "retry"}, ["rewarm.dev/on-miss", "'retry'", "cold-start, fail"]),
        ({"snapshot": "../escape"}, ["rewarm.dev/snapshot", "'../escape'", "not a name", "use 1 to 128"]),
        ({"snapshot": ""}, ["rewarm.dev/snapshot", "''", "not a name"]),
        ({"snapshot": "a..b"}, ["rewarm.dev/snapshot", "'a..b'", "not a name"]),
        ({"snapshot": TEN_KB}, ["rewarm.dev/snapshot", "'xxx", "not a name"]),
        ({"snapshot": "counter", TEN_KB: "x"}, ["rewarm.dev/xxx", "no such key"]),
        ({"snapshot": "counter", "ready": "\x1b[31m\nlevel=error\r\0\u202e"}, ["rewarm.dev/ready", r"\x1b", r"\n"]),
        ({"snapshot": "counter", "ready": "http://:99999/"}, ["rewarm.dev/ready", "99999", "http://:PORT/PATH"]),
        ({"snapshot": "counter", "ready": "exec:"}, ["rewarm.dev/ready", "'exec:'", "exec:CMD"]),
        ({"snapshot": "counter", "engine": "\udcff"}, ["rewarm.dev/engine", "none, vllm, sglang"]),
    ],
    ids=lambda value: "",
)
def test_annotation(node: Node, annotations: dict[str, str], expected: list[str]) -> None:
    found = {f"rewarm.dev/{key}": value for key, value in annotations.items()}
    made = counter.bundle(node.directory / "copy", found, env=faults.SMALL)
    before = faults.Before(made)
    container = node.runtime.create("copy", made, check=False)
    assert container.status == 1
    said(node.runtime.last_error(), "read annotation", *expected, longest=600)
    assert container.stdout.wait_end() == ""
    assert faults.remains(node, "copy", made) == []
    before.check_config()
    before.check_files()


def test_annotation_in_a_log_of_text(node: Node) -> None:
    """As conmon asks for it: one line there too, whatever the value holds."""
    made = faults.bundle(node.directory / "copy", ready="\nlevel=info msg=fine\x1b[2J")
    log = node.directory / "log.txt"
    words = [node.runtime.binary, "--root", str(node.runtime.root), "--log", str(log), "create"]
    with made:
        done = subprocess.run(
            [*words, "--bundle", str(made.directory), "copy"],
            env=node.runtime.env,
            stdin=subprocess.DEVNULL,
            timeout=60,
        )
    assert done.returncode == 1
    (line,) = log.read_text().splitlines()
    said(line, "level=error", "read annotation rewarm.dev/ready")


def test_annotation_of_another_kind(other: Node) -> None:
    """A config.json that is no config.json is runc's to refuse."""
    made = faults.bundle(other.directory / "copy")
    for broken in ({**made.spec, "process": ["rewarm.dev/"]}, {**made.spec, "annotations": ["rewarm.dev/snapshot"]}):
        (made.directory / "config.json").write_text(json.dumps(broken))
        assert other.runtime.create("copy", made, check=False).status != 0
        said(other.runtime.last_error(), "json")
        other.runtime.delete("copy", force=True)
        assert faults.remains(other, "copy", made) == []


# Stores that captures write to.


def test_store_full(running: Container, node: Node) -> None:
    node.store.mkdir()
    command("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", node.store)
    try:
        done = node.rewarm("capture", "source", "--name", "counter", check=False)
        assert done.returncode == 1
        said(done.stderr.strip(), "no space is left", str(node.store), "free space there")
        assert node.json("ls") == []
        assert node.rewarm("verify").returncode == 0
        assert [path for path in node.store.rglob("*") if path.is_file() and "locks" not in path.parts] == []
        goes_on(running)
    finally:
        command("umount", node.store)
    node.rewarm("capture", "source", "--name", "counter")


def test_work_directory_full(running: Container, node: Node) -> None:
    work = node.directory / "work"
    work.mkdir()
    command("mount", "-t", "tmpfs", "-o", "size=1m,mode=700", "tmpfs", work)
    try:
        done = node.rewarm("capture", "source", "--name", "counter", check=False)
        assert done.returncode == 1
        said(done.stderr.strip(), "dump container source", "log is kept as")
        assert list(work.iterdir()) == []
        goes_on(running)
    finally:
        command("umount", work)
    node.rewarm("capture", "source", "--name", "counter")


@pytest.mark.parametrize("kind", ["broken link", "file", "read-only"])
def test_store_that_cannot_be_written(running: Container, node: Node, kind: str) -> None:
    expected = {"broken link": "broken symbolic link", "file": "not a directory", "read-only": "ead-only"}[kind]
    if kind == "broken link":
        node.store.symlink_to(node.directory / "nowhere")
    elif kind == "file":
        node.store.write_text("no store")
    else:
        node.store.mkdir()
        command("mount", "-t", "tmpfs", "-o", "ro", "tmpfs", node.store)
    try:
        done = node.rewarm("capture", "source", "--name", "counter", check=False)
    finally:
        if kind == "read-only":
            command("umount", node.store)
    assert done.returncode == 1
    said(done.stderr.strip(), str(node.store), expected)
    goes_on(running)


def goes_on(container: Container) -> None:
    """The container counts on, without a gap: whatever failed, it was only held still."""
    seen = counter.numbers(container)[-1]
    container.stdout.wait_text(f"\n{seen + 3} ")
    counted = counter.numbers(container)
    assert counted == list(range(1, len(counted) + 1))
    assert len(counter.hashes(container)) == 1


# Containers that cannot be captured.


def test_container_that_is_not_there(node: Node) -> None:
    done = node.rewarm("capture", "nobody", "--name", "x", check=False)
    assert done.returncode == 1
    said(done.stderr.strip(), "find container nobody", "no such container", "--root")


def test_container_that_is_created(node: Node) -> None:
    node.runtime.create("source", counter.bundle(node.directory / "source", env=faults.SMALL))
    refused(node, "created but not started", "start it first")
    node.runtime.start("source")


def test_container_that_is_stopped(running: Container, node: Node) -> None:
    node.runtime.kill("source")
    node.runtime.wait_stopped("source")
    refused(node, "stopped", "no memory")


def test_container_that_is_paused(running: Container, node: Node) -> None:
    node.runtime.run("pause", "source")
    refused(node, "it is paused", "resume it first")
    node.runtime.run("resume", "source")
    goes_on(running)


def test_restored_container_that_is_not_started(other: Node) -> None:
    other.runtime.create("source", faults.bundle(other.directory / "source"))
    assert other.outcome("source")["outcome"] == "warm"
    refused(other, "created but not started", "start it first")


@pytest.mark.parametrize("path", ["", "/proc/self/ns/pid"])
def test_container_in_the_nodes_pid_namespace(node: Node, path: str) -> None:
    made = counter.bundle(node.directory / "source", env=faults.SMALL)
    namespaces = made.spec["linux"]["namespaces"]
    namespaces[:] = [one for one in namespaces if one["type"] != "pid"]
    if path:
        namespaces.append({"type": "pid", "path": path})
    made.write()
    counter.run(node.runtime, "source", made)
    refused(node, "in the node's pid namespace (hostPID)", "its pod's (shareProcessNamespace)")
    node.runtime.stop("source")


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_container_with_a_stream_that_criu_cannot_see(node: Node, stream: str) -> None:
    file = node.directory / "output.log"
    pid_file = node.directory / "pid"
    with counter.bundle(node.directory / "source", env=faults.SMALL) as made, file.open("wb") as output:
        container = node.runtime.containers["source"] = Container("source", made)
        subprocess.run(
            node.runtime.argv("create", "--bundle", made.directory, "--pid-file", pid_file, "source"),
            stdin=subprocess.DEVNULL,
            stdout=output if stream == "stdout" else container.stdout.write_end,
            stderr=output if stream == "stderr" else container.stderr.write_end,
            env=node.runtime.env,
            check=True,
            timeout=60,
        )
        container.stdout.started()
        container.stderr.started()
        container.pid = int(pid_file.read_text())
        node.runtime.start("source")
        wait_for("output", lambda: file.stat().st_size)
        refused(node, f"its {stream} is {file}", "CRIU cannot see", "pipes")
        size = file.stat().st_size
        wait_for("more output", lambda: file.stat().st_size > size)
        node.runtime.delete("source", force=True)
        node.runtime.wait_stopped("source")


def refused(node: Node, *texts: str) -> None:
    done = node.rewarm("capture", "source", "--name", "again", check=False)
    assert done.returncode == 1
    said(done.stderr.strip(), "capture container source", *texts)
    assert "again" not in {path.parent.name for path in node.store.rglob("*.json")}
    assert not list((node.directory / "work").glob("*"))


# Names.


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a/b", "'/'"),
        ("..", "'.'"),
        ("a..b", "'..'"),
        ("../../evil", "'.'"),
        ("x" * 300, "300 characters"),
        ("", "empty"),
        ("a b", "' '"),
        ("a\nb", "'\\n'"),
        ("ä", "ä"),
    ],
)
def test_snapshot_name(node: Node, name: str, expected: str) -> None:
    done = node.rewarm("capture", "nobody", "--name", name, check=False)
    assert done.returncode == 1
    said(done.stderr.strip(), "use snapshot name", expected, "use 1 to 128", longest=300)
    assert not node.store.exists()


def test_two_captures_of_one_name(running: Container, node: Node) -> None:
    """The second is told while the first still works; the first succeeds."""
    begun, go = node.directory / "begun", node.directory / "go"
    script = f'touch {begun}; until [ -e {go} ]; do sleep 0.01; done; exec $REAL "$@"'
    counter.run(node.runtime, "another", counter.bundle(node.directory / "another", env=faults.SMALL))
    node.configure(criu=str(faults.criu(node, script)))
    first = subprocess.Popen(
        [node.prefix / "bin" / "rewarm", "capture", "source", "--name", "counter"],
        env={**os.environ, **node.env},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for("criu", begun.exists)
    second = node.rewarm("capture", "another", "--name", "counter", check=False)
    assert second.returncode == 1
    said(second.stderr.strip(), "capture default/counter: another capture of counter is running", f"pid {first.pid}")
    # The same container under another name.
    second = node.rewarm("capture", "source", "--name", "other", check=False)
    assert second.returncode == 1
    said(second.stderr.strip(), "capture container source", "another capture of it is going on")
    go.touch()
    assert first.wait(60) == 0, first.communicate()
    first.communicate()
    assert len(DirectoryStore(str(node.store)).list()) == 1
    assert node.rewarm("verify").returncode == 0
    goes_on(running)
    copy = node.runtime.create("copy", counter.bundle(node.directory / "copy", env=faults.SMALL))
    assert node.outcome("copy")["outcome"] == "warm"
    node.runtime.start("copy")
    copy.stdout.wait_text("\n")
    assert counter.hashes(copy) <= counter.hashes(running)


# Container ids.


def test_container_id_that_exists(other: Node) -> None:
    """Whether the first is warm or cold, created or running: runc's words, and the first one goes on."""
    first = other.runtime.create("copy", faults.bundle(other.directory / "copy"))
    taken(other)
    assert other.runtime.state("copy")["status"] == "created"
    other.runtime.start("copy")
    first.stdout.wait_text("\n")
    taken(other)
    assert other.runtime.state("copy")["status"] == "running"
    assert other.outcome("copy")["outcome"] == "warm"
    seen = counter.numbers(first)[-1]
    first.stdout.wait_text(f"\n{seen + 2} ")
    other.runtime.kill("copy", "TERM")
    assert other.runtime.wait_stopped("copy") == 7
    taken(other)
    other.runtime.delete("copy")
    cold = other.runtime.create("copy", faults.bundle(other.directory / "cold", snapshot="nothing"))
    taken(other)
    other.runtime.start("copy")
    cold.stdout.wait_text("\n2 ")


def taken(node: Node) -> None:
    with faults.bundle(node.directory / "taken") as made:
        before = faults.Before(made)
        done = node.runtime.run("create", "--bundle", made.directory, "copy", check=False)
        assert done.returncode == 1
        said(node.runtime.last_error(), "container with given ID already exists")
        before.check_config()
        before.check_files()
        assert cgroups.processes(made.cgroup) == set()


HOSTILE = ["../evil", "a/b", "/etc", "..", ".", "", "x" * 300, "a b", "a\nb", "x~1", "ü", "$(id)", "x\x1b[31m"]


def test_hostile_container_ids(other: Node) -> None:
    """runc's own words for each, and nothing made anywhere."""
    other.runtime.root.mkdir(parents=True)
    with faults.bundle(other.directory / "copy") as made, Runtime(other.directory / "plain") as plain:
        before = faults.Before(made)
        for container_id in HOSTILE:
            words = ("create", "--bundle", made.directory, "--", container_id)
            theirs = plain.run(*words, check=False)
            ours = other.runtime.run(*words, check=False)
            assert theirs.returncode == ours.returncode != 0
            last = other.runtime.last_error()
            assert last.replace(str(other.runtime.root), "") == plain.last_error().replace(str(plain.root), "")
            for command_name in ("start", "delete"):
                assert other.runtime.run(command_name, "--", container_id, check=False).returncode != 0
            assert list(other.runtime.root.iterdir()) == [], container_id
            assert not list(other.state.rglob("copy*")) and not list(other.state.rglob("*evil*")), container_id
            before.check_config()
        before.check_files()
        before.check_names()


@pytest.mark.parametrize("container_id", ["copy.lock", "a+b_c.d-e", "x" * 200])
def test_unusual_container_id(other: Node, container_id: str) -> None:
    """Ids that runc takes are as good as any."""
    made = faults.bundle(other.directory / "copy")
    other.runtime.create("copy", faults.bundle(other.directory / "first"))
    process, container = other.runtime.spawn("create", container_id, made)
    assert process.wait(60) == 0
    other.runtime.settle(container)
    assert other.outcome(container_id)["outcome"] == "warm"
    other.runtime.start(container_id)
    container.stdout.wait_text("\n")
    other.runtime.delete(container_id, force=True)
    assert not other.container_directory(container_id).exists()
    assert other.outcome("copy")["outcome"] == "warm"
