"""podman as the engine: an annotated container comes back warm, under conmon, and is a podman container like any."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support import counter, proc
from support.leftovers import Leftovers
from support.node import Node
from support.podman import Podman

pytestmark = pytest.mark.alone

PROGRAM = ("python3", "-c", counter.PROGRAM)
ENVIRONMENT = {"PYTHONHASHSEED": "0"}
SNAPSHOT = {"rewarm.dev/snapshot": "counter"}


@pytest.fixture(scope="module", autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """In place of the one around each test: the engine lasts as long as this file, with its cgroups and mounts."""
    proc.become_subreaper()  # of conmon, so that one that stays is seen
    before = Leftovers.now()
    yield
    before.check()


@pytest.fixture(scope="module")
def engine(nothing_left_behind: None, tmp_path_factory: pytest.TempPathFactory, prefix: Path) -> Iterator[Podman]:
    """One Podman for this file: importing its image takes seconds."""
    with Node(tmp_path_factory.mktemp("podman") / "node", prefix) as node, Podman(node) as made:
        node.store.mkdir(mode=0o700)
        yield made


@pytest.fixture
def podman(engine: Podman) -> Iterator[Podman]:
    yield engine
    engine.remove_all()


def test_a_plain_container(podman: Podman) -> None:
    made = podman.container(PROGRAM, name="plain", env=ENVIRONMENT)
    proc.wait_for("the program counting", lambda: "\n2 " in podman.logs("plain"))
    assert not podman.node.container_directory(made, podman.runc_root).exists(), "no annotation: it is plain runc's"
    assert (podman.runc_root / made / "state.json").exists()
    assert podman.run("exec", "plain", "cat", "/var/lib/counter/state").stdout == "kept\n"
    assert podman.run("exec", "plain", "sh", "-c", "exit 5", check=False).returncode == 5
    podman.run("stop", "--time", "20", "plain")
    assert podman.inspect("plain")["State"]["ExitCode"] == 7
    podman.run("rm", "plain")
    assert not (podman.runc_root / made).exists()


def test_cold_captured_warm(podman: Podman) -> None:
    node = podman.node
    first = podman.container(PROGRAM, name="first", env=ENVIRONMENT, annotations=SNAPSHOT)
    outcome = podman.outcome(first)
    assert outcome["outcome"] == "cold" and "counter" in outcome["reason"]
    proc.wait_for("the first one counting", lambda: "\n2 " in podman.logs("first"))
    node.rewarm("capture", first[:12], "--name", "counter")
    node.rewarm("verify", "counter")
    assert node.json("inspect", "counter")["source"]["runtime_root"] == str(podman.runc_root)

    second = podman.container(PROGRAM, name="second", env=ENVIRONMENT, annotations=SNAPSHOT)
    assert podman.outcome(second)["outcome"] == "warm", podman.outcome(second)
    proc.wait_for("the second one counting", lambda: podman.logs("second").count("\n") > 2)
    counted = [line.split() for line in podman.logs("second").splitlines()]
    assert int(counted[0][0]) > 2, "it counts on, not from the start"
    sources = {line.split()[1] for line in podman.logs("first").splitlines()[1:]}
    assert {memory for _number, memory in counted} <= sources, "its memory is the source's"
    assert podman.run("exec", "second", "cat", "/var/lib/counter/state").stdout == "kept\n"
    assert podman.run("exec", "second", "test", "-e", "/etc/debian_version", check=False).returncode == 1
    state = podman.inspect("second")["State"]
    assert state["Running"] and state["Pid"] > 0
    assert podman.inspect("first")["State"]["Running"], "the source runs on"

    podman.run("stop", "--time", "20", "second")
    assert podman.inspect("second")["State"]["ExitCode"] == 7, "the program's own answer to SIGTERM"
    podman.run("rm", "second")
    assert not (podman.runc_root / second).exists()
    assert not node.container_directory(second, podman.runc_root).exists()


def test_a_warm_one_is_started_again(podman: Podman) -> None:
    """`podman start` of a stopped container is a `create` of the same id: it comes back warm too."""
    podman.container(PROGRAM, name="source", env=ENVIRONMENT, annotations={"rewarm.dev/snapshot": "again"})
    proc.wait_for("the source counting", lambda: "\n2 " in podman.logs("source"))
    podman.node.rewarm("capture", podman.inspect("source")["Id"], "--name", "again", "--stop")
    assert podman.run("wait", "source").stdout.strip() == "137"
    made = podman.container(PROGRAM, name="twice", env=ENVIRONMENT, annotations={"rewarm.dev/snapshot": "again"})
    assert podman.outcome(made)["outcome"] == "warm"
    podman.run("kill", "--signal", "KILL", "twice")
    assert podman.run("wait", "twice").stdout.strip() == "137"
    said = podman.logs("twice").count("\n")
    podman.run("start", "twice")
    assert podman.inspect("twice")["Id"] == made
    outcome = podman.outcome(made)["outcome"]
    proc.wait_for("it counting", lambda: podman.logs("twice").count("\n") > said + 2)
    assert outcome == "warm"
    # From the beginning the program needs the file that it deletes then.
    podman.run("exec", "twice", "sh", "-c", "echo written since >>/etc/issue; touch /etc/debian_version")
    podman.run("kill", "--signal", "KILL", "twice")
    assert podman.run("wait", "twice").stdout.strip() == "137"
    podman.run("start", "twice")
    assert "etc/issue: the container has its own there" in podman.outcome(made)["reason"]
    assert "written since\n" in podman.run("exec", "twice", "cat", "/etc/issue").stdout


def test_no_snapshot_and_no_cold_start(podman: Podman) -> None:
    """The runtime's one line reaches the user, and nothing stays of the container but Podman's own record."""
    wanted = {"rewarm.dev/snapshot": "absent", "rewarm.dev/on-miss": "fail"}
    with pytest.raises(proc.CommandFailed, match="absent"):
        podman.container(PROGRAM, name="refused", annotations=wanted)
    assert not list(podman.runc_root.glob("*"))


# IPC_CREAT is 0o1000, SETVAL 16, GETVAL 12.
SEMAPHORES = """
import ctypes, time
libc = ctypes.CDLL(None)
others = [libc.semget(0, 1, 0o1600) for _ in range({skipped})]
semaphores = libc.semget(555, 1, 0o1600)
libc.semctl(semaphores, 0, 16, 5)
n = 0
while True:
    n += 1
    print(n, libc.semget(555, 0, 0) == semaphores, libc.semctl(semaphores, 0, 12), flush=True)
    time.sleep(0.1)
"""


def semaphores(podman: Podman, name: str, skipped: int = 0, **more: Any) -> str:
    made = podman.container(["python3", "-c", SEMAPHORES.format(skipped=skipped)], name=name, **more)
    wait_kept(podman, name)
    return made


def wait_kept(podman: Podman, name: str) -> None:
    """Waits for what a program says next of its semaphores: that they are as it has made them."""
    said = podman.logs(name).count("\n")
    proc.wait_for("more in the log", lambda: podman.logs(name).count("\n") > said + 1)
    assert podman.logs(name).splitlines()[-1].endswith(" True 5"), podman.logs(name)


@pytest.fixture
def ipc(podman: Podman) -> dict[str, str]:
    """The annotation for a snapshot of a container that was alone in its pod, with semaphores."""
    found = {"rewarm.dev/snapshot": "semaphores"}
    if not list(podman.node.store.glob("v1/snapshots/default/semaphores/*")):
        podman.pod("source")
        made = semaphores(podman, "semaphores", annotations=found, pod="source")
        podman.node.rewarm("capture", made, "--name", "semaphores")
        podman.remove_all()
    return found


def test_objects_of_a_container_that_crashed_in_its_pod(podman: Podman, ipc: dict[str, str]) -> None:
    podman.pod("alone")
    made = semaphores(podman, "server", annotations=ipc, pod="alone")
    assert podman.outcome(made)["outcome"] == "warm", podman.outcome(made)
    podman.run("kill", "--signal", "KILL", "server")
    podman.run("wait", "server")
    podman.run("start", "server")
    assert podman.outcome(made)["outcome"] == "warm", podman.outcome(made)
    wait_kept(podman, "server")


@pytest.mark.parametrize("named", ["pod", "its own", "container"])
def test_objects_of_another_container(podman: Podman, ipc: dict[str, str], named: str) -> None:
    """What Podman has for the sandbox is older ones' pod, whose id is in the cgroup of all its containers; and the
    namespace may be a container's."""
    pod = podman.pod("both")
    semaphores(podman, "side", 1, pod="both", ipc="shareable" if named == "container" else "")
    server = podman.container(
        ["python3", "-c", SEMAPHORES.format(skipped=0)],
        name="server",
        annotations={**ipc, **({"io.kubernetes.cri-o.SandboxID": pod} if named == "pod" else {})},
        pod="both",
        ipc="container:side" if named == "container" else "",
    )
    found = podman.outcome(server)
    wait_kept(podman, "side")
    assert found["outcome"] == "cold", found
    assert "it is in the IPC namespace already" in found["reason"] and "of another container" in found["reason"], found
