"""A process tree that holds one of everything comes back whole: what CRIU carries, and what it loses silently."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from support import proc, rootfs, seccomp
from support.bundle import Bundle, bind
from support.netns import NetworkNamespace
from support.node import Node

ANNOTATIONS = {"rewarm.dev/snapshot": "multi"}
EPERM, ENOSYS = 1, 38


@dataclass
class Copies:
    """Containers of the multi workload on one node, each in a network namespace of its own."""

    node: Node
    shared_memory: bool = False  # bind-mounted, a directory for each
    profile: Mapping[str, Any] | None = None
    networks: dict[str, NetworkNamespace] = field(default_factory=dict)

    def make(self, name: str, network: NetworkNamespace | None = None) -> NetworkNamespace:
        """Create and start; returns once it answers."""
        found = self.networks[name] = network or NetworkNamespace()
        mounts = []
        if self.shared_memory:
            self.directory(name).mkdir()
            mounts = [bind(self.directory(name), "/dev/shm")]
        made = Bundle(
            self.node.directory / name,
            rootfs.layers("multi"),
            rootfs.args("multi"),
            env=rootfs.env("multi"),
            annotations=ANNOTATIONS,
            network=found.path,
            mounts=mounts,
            seccomp=self.profile,
        )
        self.node.runtime.create(name, made)
        self.node.runtime.start(name)
        found.wait_http(8000, "/health")
        return found

    def directory(self, name: str) -> Path:
        return self.node.directory / f"{name}-shm"

    def source(self) -> NetworkNamespace:
        found = self.make("source")
        assert self.node.outcome("source")["outcome"] == "cold"
        return found

    def copy(self, name: str = "copy") -> NetworkNamespace:
        found = self.make(name)
        assert self.node.outcome(name)["outcome"] == "warm", self.node.outcome(name)
        assert self.node.outcome(name)["notes"] == []
        return found

    def capture(self) -> None:
        self.node.rewarm("capture", "source", "--name", "multi")

    def pid(self, name: str) -> int:
        pid = self.node.runtime.containers[name].pid
        assert pid is not None
        return pid

    def close(self) -> None:
        for network in self.networks.values():
            network.close()


@pytest.fixture
def copies(node: Node) -> Iterator[Copies]:
    made = Copies(node)
    yield made
    made.close()


def all_good(network: NetworkNamespace) -> None:
    checks = network.json(8000, "/check")
    assert len(checks) >= 21
    assert [name for name, good in checks.items() if not good] == []


@pytest.mark.parametrize("shared_memory", [False, True], ids=["private", "bind-mounted"])
def test_everything_comes_back(copies: Copies, shared_memory: bool) -> None:
    copies.shared_memory = shared_memory
    source = copies.source()
    before = source.json(8000, "/state")
    all_good(source)
    copies.capture()
    all_good(source)
    for name in ("one", "two"):
        copy = copies.copy(name)
        all_good(copy)
        after = copy.json(8000, "/state")
        for key in ("nonce", "pid", "threads", "affinity", "policy", "shm"):
            assert after[key] == before[key], key
        assert after["child"]["pid"] == before["child"]["pid"]
        assert after["pings"] > before["pings"]
    all_good(source)
    # A clone can be captured like any other container: nothing of it hangs on the source.
    assert source.http(8000, "/exit/3")[0] == 200
    assert copies.node.runtime.wait_stopped("source") == 3
    copies.node.runtime.delete("source")
    copies.node.rewarm("capture", "two", "--name", "multi", "--stop")
    copies.node.runtime.wait_stopped("two")
    all_good(copies.copy("three"))
    all_good(copies.networks["one"])


def test_bind_mounted_shared_memory_is_each_ones_own(copies: Copies) -> None:
    """What one clone writes into its segment, no other sees; the node's directories are apart as well."""
    copies.shared_memory = True
    copies.source()
    copies.capture()
    copies.copy("one")
    copies.copy("two")
    names = {name: sorted(os.listdir(copies.directory(name))) for name in ("source", "one", "two")}
    assert len(names["source"]) == 2
    assert names["one"] == names["two"] == names["source"], "no link of CRIU's stays behind"
    segment = next(name for name in names["source"] if name.startswith("psm_"))
    copies.node.runtime.exec("one", "sh", "-c", f"printf X | dd conv=notrunc of=/dev/shm/{segment}")
    bad = {name for name, good in copies.networks["one"].json(8000, "/check").items() if not good}
    assert bad == {"shared memory", "shared memory in child", "shared memory is shared"}
    all_good(copies.networks["two"])
    all_good(copies.networks["source"])


PROFILES: dict[str, Mapping[str, Any] | None] = {
    "none": None,
    "allow-list": seccomp.allow_list(),
    "deny-list": seccomp.deny_list(),
    "own-denial": {
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [
            {"names": ["io_uring_setup", "keyctl"], "action": "SCMP_ACT_ERRNO", "errnoRet": ENOSYS},
            {"names": ["io_uring_enter"], "action": "SCMP_ACT_KILL_PROCESS"},
        ],
    },
}


@pytest.mark.parametrize("profile", PROFILES)
def test_io_uring_is_denied_on_top_of_the_own_profile(copies: Copies, profile: str) -> None:
    copies.profile = PROFILES[profile]
    source = copies.source()
    found = {}
    copies.capture()
    copies.copy()
    for name in ("source", "copy"):
        state = copies.networks[name].json(8000, "/state")
        assert state["io_uring_errno"] == state["loop"]["io_uring_errno"] == EPERM
        assert state["io_uring_rings"] == state["loop"]["io_uring_rings"] == 0
        modes = set()
        for task in tasks(copies.pid(name)):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # the thread of a request
                modes.add(status_of(task)["Seccomp"])
        assert modes == {"2"}
        script = (
            "import ctypes; l = ctypes.CDLL(None, use_errno=True); l.syscall(250, 0, 0, 0); print(ctypes.get_errno())"
        )
        found[name] = int(copies.node.runtime.exec(name, "python3", "-c", script))
    assert found["source"] == found["copy"]
    # keyctl(2), x86_64's 250: the container's own rules are as they were.
    expected = {"none": None, "allow-list": EPERM, "deny-list": ENOSYS, "own-denial": ENOSYS}[profile]
    assert expected is None or found["source"] == expected
    all_good(source)
    all_good(copies.networks["copy"])


@dataclass(frozen=True)
class Placement:
    """What decides where a thread runs and where its memory lies, by the container's own thread ids."""

    affinity: Mapping[tuple[int, int], str]
    policy: Mapping[tuple[int, int], str]
    mappings: Mapping[int, Mapping[str, str]]


def placement(init: int) -> Placement:
    affinity, policy, mappings = {}, {}, {}
    for pid in (init, *proc.descendants(init)):
        mine = own_id(Path(f"/proc/{pid}"))
        for task in Path(f"/proc/{pid}/task").iterdir():
            key = mine, own_id(task)
            affinity[key] = status_of(task)["Cpus_allowed_list"]
            # A mapping without a policy of its own shows the thread's: the stack of the process is one.
            policy[key] = next(
                line.split()[1] for line in (task / "numa_maps").read_text().splitlines() if " stack " in line
            )
        mappings[mine] = {
            line.split()[0]: line.split()[1] for line in Path(f"/proc/{pid}/numa_maps").read_text().splitlines()
        }
    return Placement(affinity, policy, mappings)


def tasks(init: int) -> list[Path]:
    """/proc directories of all threads of a container."""
    return [task for pid in (init, *proc.descendants(init)) for task in Path(f"/proc/{pid}/task").iterdir()]


def status_of(task: Path) -> dict[str, str]:
    return dict(line.split(":\t", 1) for line in (task / "status").read_text().splitlines() if ":\t" in line)


def own_id(task: Path) -> int:
    return int(status_of(task)["NSpid"].split()[-1])


def test_affinity_and_memory_policy_in_proc(copies: Copies) -> None:
    """As the kernel shows them, not the program; before `start` already, so that no thread ever runs elsewhere."""
    copies.source()
    copies.capture()
    before = placement(copies.pid("source"))
    network = copies.networks["copy"] = NetworkNamespace()
    bundle = Bundle(
        copies.node.directory / "copy",
        rootfs.layers("multi"),
        rootfs.args("multi"),
        env=rootfs.env("multi"),
        annotations=ANNOTATIONS,
        network=network.path,
    )
    copies.node.runtime.create("copy", bundle)
    assert copies.node.outcome("copy")["outcome"] == "warm"
    after = placement(copies.pid("copy"))
    assert after.affinity == before.affinity
    assert after.policy == before.policy
    assert set(before.policy.values()) > {"default"}, "the source has a thread with another policy"
    for process, own in before.mappings.items():
        bound = {start: policy for start, policy in own.items() if policy != "default"}
        assert {s: p for s, p in after.mappings[process].items() if p != "default"} == bound
    assert any(policy.startswith("bind") for policy in before.mappings[1].values())
    if len(os.sched_getaffinity(0)) > 1:
        assert len(set(before.affinity.values())) > 1
    copies.node.runtime.start("copy")
    network.wait_http(8000, "/health")

    def is_as_before() -> bool:
        try:
            return placement(copies.pid("copy")).affinity == before.affinity
        except FileNotFoundError:
            return False  # the thread that answered has just ended

    proc.wait_for("the affinities of the source", is_as_before)


def test_open_connections(copies: Copies) -> None:
    """Clients of the event loop and of the web server: the source keeps them, the copy sees them end."""
    source = copies.source()
    web = http.client.HTTPConnection("127.0.0.1", 8000)
    with source.connect(8001) as echo, source.connect(8000) as web.sock:
        answers = echo.makefile()
        echo.sendall(b"before\n")
        assert answers.readline() == "before\n"
        assert health(web) == {"ok": True, "pid": 1}
        echo.sendall(b"half a line")
        copies.capture()
        copy = copies.copy()
        echo.sendall(b", whole\n")
        assert answers.readline() == "half a line, whole\n"
        assert health(web) == {"ok": True, "pid": 1}
        assert open_clients(source) == 1
        proc.wait_for("the end of the copy's client", lambda: open_clients(copy) == 0)
    with copy.connect(8001) as client:
        client.sendall(b"new\n")
        assert client.recv(100) == b"new\n"
    all_good(copy)


def health(connection: http.client.HTTPConnection) -> dict[str, Any]:
    """Over a connection that is kept; not made anew if it is closed."""
    assert connection.sock is not None
    connection.request("GET", "/health")
    found: dict[str, Any] = json.loads(connection.getresponse().read())
    del found["serving_since"]
    return found


def open_clients(network: NetworkNamespace) -> int:
    loop = network.json(8000, "/state")["loop"]
    return int(loop["clients_opened"]) - int(loop["clients_closed"])
