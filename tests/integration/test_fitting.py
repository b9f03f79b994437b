"""A snapshot is restored where it fits; where it does not, the reason names what differs, with both values."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rewarm.store.directory import DirectoryStore
from support import counter, faults
from support.bundle import Bundle, bind
from support.node import Node
from support.outcomes import said

IMAGE = "io.kubernetes.cri.image-name"
GPU = {"uuid": "GPU-1", "model": "H100", "memory_bytes": 85520809984, "minor": 0, "compute_mode": "default"}
SECCOMP = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["swapon"], "action": "SCMP_ACT_ERRNO"}]}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    (directory / "weights").write_text("weights")
    return directory


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, prefix: Path, models: Path) -> Iterator[Path]:
    """A store with a snapshot of `target`. Not to be changed."""
    with Node(tmp_path_factory.mktemp("captured"), prefix) as node:
        counter.run(node.runtime, "source", target(node.directory / "source", models))
        node.rewarm("capture", "source", "--name", "counter", "--stop")
        yield node.store


@pytest.fixture
def other(nothing_left_behind: None, store: Path, tmp_path: Path, prefix: Path) -> Iterator[Node]:
    with Node(tmp_path / "node", prefix, store=store) as node:
        yield node


def target(directory: Path, models: Path, change: Callable[[dict[str, Any]], None] | None = None) -> Bundle:
    """A container with a mount, a seccomp profile, an image name and a user that may bind low ports."""
    made = faults.bundle(directory)
    made.spec["mounts"].append(bind(models, "/models"))
    made.spec["linux"]["seccomp"] = SECCOMP
    made.spec["annotations"][IMAGE] = "docker.io/library/counter:1"
    if change is not None:
        change(made.spec)
    made.write()
    return made


def without(items: list[dict[str, Any]], **fields: str) -> list[dict[str, Any]]:
    return [item for item in items if any(item.get(key) != value for key, value in fields.items())]


def no_mount(spec: dict[str, Any]) -> None:
    spec["mounts"] = without(spec["mounts"], destination="/models")


def another_mount(spec: dict[str, Any]) -> None:
    spec["mounts"].append({**spec["mounts"][-1], "destination": "/cache"})


def another_type(spec: dict[str, Any]) -> None:
    spec["mounts"][-1] = {"destination": "/models", "type": "tmpfs", "source": "tmpfs"}


def fewer_capabilities(spec: dict[str, Any]) -> None:
    capabilities = spec["process"]["capabilities"]
    for kind, names in capabilities.items():
        capabilities[kind] = [name for name in names if name != "CAP_KILL"]


def no_seccomp(spec: dict[str, Any]) -> None:
    del spec["linux"]["seccomp"]


def another_seccomp(spec: dict[str, Any]) -> None:
    spec["linux"]["seccomp"] = {**SECCOMP, "syscalls": []}


def another_user(spec: dict[str, Any]) -> None:
    spec["process"]["user"] = {"uid": 65534, "gid": 65534}


def no_ipc_namespace(spec: dict[str, Any]) -> None:
    spec["linux"]["namespaces"] = without(spec["linux"]["namespaces"], type="ipc")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (no_mount, "snapshot has a mount at /models, this container has none"),
        (another_mount, "this container has a mount at /cache, the snapshot has none"),
        (another_type, "snapshot has a mount of type bind at /models, this container one of tmpfs"),
        (lambda spec: spec["process"]["args"].append("-v"), "snapshot has arguments ["),
        (
            lambda spec: spec["process"]["env"].remove("MIB=4"),
            "snapshot was taken with environment variable MIB, this container has none of that name",
        ),
        (
            lambda spec: spec["process"]["env"].append("MODE=fast"),
            "this container has environment variable MODE, the snapshot was taken without it",
        ),
        (another_user, "snapshot has user 0:0, this container has 65534:65534"),
        (fewer_capabilities, "snapshot was taken with capability CAP_KILL, this container has it not"),
        (no_seccomp, "snapshot was taken under another seccomp profile than this container's"),
        (another_seccomp, "snapshot was taken under another seccomp profile than this container's"),
        (
            no_ipc_namespace,
            "snapshot has namespaces ['ipc', 'mount', 'network', 'pid', 'uts'], this container has ['mount',",
        ),
        (
            lambda spec: spec["annotations"].update({IMAGE: "docker.io/library/counter:2"}),
            "snapshot has image docker.io/library/counter:1, this container has docker.io/library/counter:2",
        ),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_container(other: Node, models: Path, change: Callable[[dict[str, Any]], None], expected: str) -> None:
    other.runtime.create("copy", target(other.directory / "copy", models, change))
    outcome = other.outcome("copy")
    assert outcome["outcome"] == "cold"
    said(outcome["reason"], "fit snapshot to this container: ", expected)


@pytest.mark.parametrize(
    ("requires", "expected"),
    [
        ({"arch": "riscv64"}, "snapshot has architecture riscv64, this container has x86_64"),
        ({"cpu_features": ["avx9000"]}, "snapshot needs the CPU feature avx9000, this node's CPU has not"),
        ({"kernel": "99.1.0"}, "snapshot was taken with kernel 99.1.0, this node has the older "),
        ({"criu": "99.0"}, "snapshot was taken with CRIU 99.0, this node has the older 4."),
        ({"gpus": [GPU], "driver": "580.1"}, "snapshot needs 1 x H100 (85520809984 bytes), this container has 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_node(other: Node, models: Path, tmp_path: Path, requires: dict[str, Any], expected: str) -> None:
    store = faults.copied(other.store, tmp_path / "store")
    faults.rewritten(store, lambda document: document["requires"].update(requires))
    other.configure(store=str(store))
    other.runtime.create("copy", target(other.directory / "copy", models))
    outcome = other.outcome("copy")
    assert outcome["outcome"] == "cold"
    said(outcome["reason"], expected)


def what_does_not_matter(spec: dict[str, Any]) -> None:
    spec["hostname"] = "another"
    spec["process"]["env"].remove("MIB=4")
    spec["process"]["env"] += ["MIB=8", "KUBERNETES_SERVICE_HOST=10.0.0.1", "HOSTNAME=another"]
    spec["process"]["oomScoreAdj"] = 100
    spec["linux"]["resources"] = {"memory": {"limit": 1 << 30}}
    spec["process"]["capabilities"]["bounding"] = [*spec["process"]["capabilities"]["bounding"], "CAP_SYS_NICE"]
    spec["annotations"]["example.com/anything"] = "x"


def test_what_does_not_matter(other: Node, models: Path, tmp_path: Path) -> None:
    mine = tmp_path / "models"
    mine.mkdir()
    (mine / "weights").write_text("other weights")
    made = other.runtime.create("copy", target(other.directory / "copy", mine, what_does_not_matter))
    assert other.outcome("copy")["outcome"] == "warm", other.outcome("copy")
    other.runtime.start("copy")
    made.stdout.wait_text("\n")
    # Mounts are the live spec's, never the snapshot's.
    assert other.runtime.exec("copy", "cat", "/models/weights") == "other weights"


def test_the_newest_that_fits(other: Node, models: Path, tmp_path: Path) -> None:
    """One name may have snapshots of several kinds of container: each finds its own."""
    other.configure(store=str(faults.copied(other.store, tmp_path / "store")))
    store = DirectoryStore(str(tmp_path / "store"))
    (first,) = store.list()
    second = target(other.directory / "second", models, lambda spec: spec["process"]["env"].append("MODE=fast"))
    counter.run(other.runtime, "second", second)
    other.rewarm("capture", "second", "--name", "counter", "--stop")
    (newer,) = set(store.list()) - {first}
    other.runtime.create("old", target(other.directory / "old", models))
    assert other.outcome("old")["snapshot"] == f"default/counter/{first.id[:12]}"
    fast = target(other.directory / "fast", models, lambda spec: spec["process"]["env"].append("MODE=fast"))
    other.runtime.create("fast", fast)
    assert other.outcome("fast")["snapshot"] == f"default/counter/{newer.id[:12]}"
    # With the newest one damaged, the next one that fits; with none, the newest one's reason.
    path = store.root / "v1/snapshots/default/counter" / f"{newer.id}.json"
    path.write_bytes(path.read_bytes()[:-1])
    other.runtime.create("again", target(other.directory / "again", models))
    assert other.outcome("again")["snapshot"] == f"default/counter/{first.id[:12]}"


def test_tree_with_a_zombie(node: Node) -> None:
    """A child that its parent has not reaped has no memory and no credentials in CRIU's images."""
    program = (
        "import os, time\n"
        "if os.fork() == 0: os._exit(3)\n"
        "time.sleep(0.2)\n"
        "n = 0\n"
        "while True:\n"
        "    time.sleep(0.05); n += 1; print(n, 'x', flush=True)\n"
        "    if os.path.exists('/tmp/reap'): break\n"
        "print('status', os.waitstatus_to_exitcode(os.wait()[1]), flush=True)\n"
        "time.sleep(100)\n"
    )
    args = ["python3", "-c", program]
    annotations = {"rewarm.dev/snapshot": "zombie"}
    counter.run(node.runtime, "source", counter.bundle(node.directory / "source", annotations, args=args))
    node.rewarm("capture", "source", "--name", "zombie", "--stop")
    made = node.runtime.create("copy", counter.bundle(node.directory / "copy", annotations, args=args))
    assert node.outcome("copy")["outcome"] == "warm", node.outcome("copy")
    node.runtime.start("copy")
    made.stdout.wait_text(" x")
    node.runtime.exec("copy", "touch", "/tmp/reap")
    made.stdout.wait_text("status 3")


def test_trace_and_outcome_tell_how_long_it_took(other: Node, models: Path) -> None:
    other.runtime.create("copy", target(other.directory / "copy", models))
    outcome = other.outcome("copy")
    assert outcome["outcome"] == "warm" and outcome["notes"] == []
    assert {"find", "restore", "restore.runc", "restore.fill", "memory.fill"} <= set(outcome["seconds"])
    assert 0 < outcome["seconds"]["restore.runc"] < outcome["seconds"]["restore"]
    trace = json.loads((other.container_directory("copy") / "trace.json").read_text())
    assert {event["name"] for event in trace["traceEvents"]} >= set(outcome["seconds"])
    other.runtime.start("copy")
    assert not (other.container_directory("copy") / "checkpoint").exists()
