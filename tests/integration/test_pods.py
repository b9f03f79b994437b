"""What the kubelet sees of a restored container is a container: over the CRI, on containerd 1.6 and 2.x.

`TABLE` lists the features of pods and what becomes of them; README.md shows it.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from rewarm_native import process
from support import cgroups, image, rootfs
from support.cri import CriError, pb
from support.leftovers import Leftovers
from support.pods import DNS, SYSTEMD, KubeNode, Pod
from support.proc import wait_for

pytestmark = pytest.mark.alone

SNAPSHOT = {"rewarm.dev/snapshot": "web", "rewarm.dev/capture": "on-ready"}
AUTO = {"rewarm.dev/snapshot": "auto", "rewarm.dev/capture": "on-ready"}
SERVER = ["python3", "-u", "-m", "support.workloads.pod_server"]
START = {"START": "0.2"}
OUTSIDE = 7000
"""A port of the node's, to which each server connects before it is ready."""
TABLE = {
    "sandbox": "runc's own",
    "container": "warm",
    "restart after a crash": "warm",
    "exec, exec probes": "as ever",
    "logs, rotated logs": "as ever",
    "exit code": "as ever",
    "OOM kill": "reported",
    "termination grace period": "kept",
    "init containers, sidecars": "cold, unless the annotation means them",
    "several containers with snapshots of their own": "warm, with `auto`",
    "another user than root, dropped capabilities, no new privileges": "warm",
    "read-only root filesystem": "warm",
    "RuntimeDefault seccomp": "warm",
    "ConfigMap, Secret, projected token, emptyDir": "the new pod's",
    "`/etc/hosts`, `resolv.conf`, host name": "the new pod's",
    "`/dev/shm`": "a copy for each replica",
    "sockets on the pod's IP, IPv4 and IPv6": "on the new pod's",
    "connections": "within the container kept, to outside closed",
    "a program that wants to know": "is told, before it is ready",
    "CLOCK_MONOTONIC": "goes on, in a time namespace of CRIU's",
    "CPU and memory limits, on both cgroup versions": "the new pod's",
    "private cgroup namespace": "the new container's",
    "OOM score": "the new pod's",
    "shared pid namespace": "warm, where its process ids are free",
    "a snapshot of another namespace": "not taken, unless the node shares it",
    "host network": "warm",
    "the node's deadline": "cold in time, and reported",
}


def engine(version: str) -> Path:
    return Path("/usr/bin/containerd") if version == "1.6" else rootfs.containerd2() / "containerd"


@pytest.fixture(scope="module", params=["1.6", "2.x"])
def kube(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, prefix: Path) -> Iterator[KubeNode]:
    before = Leftovers.now()
    systemd = bool(os.environ.get(SYSTEMD))
    made = KubeNode(tmp_path_factory.mktemp("kube"), prefix, binary=engine(request.param), systemd_cgroup=systemd)
    with made, made.engine.network.open_socket() as outside:
        outside.bind(("0.0.0.0", OUTSIDE))
        outside.listen(128)
        made.import_image(image.workload("pod_server")[0])
        yield made
    before.check()


@pytest.fixture(scope="module")
def captured(kube: KubeNode) -> dict[str, Any]:
    """What the source said of itself, whose snapshot `web` is in the store, and whose pod is gone."""
    pod = kube.pod("source", annotations=SNAPSHOT)
    container = server(kube, pod)
    kube.wait_ready(pod)
    assert kube.outcome(container)["outcome"] == "cold"
    kube.wait_captured(container)
    state: dict[str, Any] = kube.json(pod, "/state")
    kube.remove(pod)
    return state


@pytest.fixture
def clean(kube: KubeNode) -> Iterator[KubeNode]:
    """The node, without what a test leaves running."""
    yield kube
    kube.remove_all()


def server(kube: KubeNode, pod: Pod, name: str = "server", **more: Any) -> str:
    env = {**START, "OWN_IP": "1", "OUTSIDE": f"{kube.gateway}:{OUTSIDE}", **more.pop("env", {})}
    return kube.container(pod, name, image.workload("pod_server")[1], SERVER, env=env, **more)


def restored(kube: KubeNode, name: str = "replica", *, dns: str = DNS, **more: Any) -> tuple[Pod, str]:
    pod = kube.pod(name, annotations=SNAPSHOT, dns=dns)
    container = server(kube, pod, **more)
    assert kube.outcome(container)["outcome"] == "warm", kube.outcome(container)
    kube.wait_ready(pod)
    return pod, container


def test_sandbox_and_container(clean: KubeNode, captured: dict[str, Any]) -> None:
    pod, container = restored(clean)
    assert clean.cri.call("PodSandboxStatus", pod_sandbox_id=pod.sandbox).status.state == pb.SANDBOX_READY
    status = clean.status(container)
    assert status.state == pb.CONTAINER_RUNNING and status.started_at >= status.created_at > 0
    state = clean.json(pod, "/state")
    assert state["identity"] == captured["identity"] and state["memory"] == captured["memory"]
    assert state["pid"] == 1
    known = clean.node.json("ps")
    assert [one["container"] for one in known] == [container], "rewarm knows of the sandbox"


def test_a_restart_after_a_crash_is_warm(clean: KubeNode, captured: dict[str, Any]) -> None:
    pod, first = restored(clean)
    with pytest.raises((OSError, EOFError)):
        clean.json(pod, "/exit?3")
    status = clean.wait_exited(first)
    assert (status.exit_code, status.reason) == (3, "Error")
    second = server(clean, pod, attempt=1)
    assert clean.outcome(second)["outcome"] == "warm", clean.outcome(second)
    clean.wait_ready(pod)
    clean.cri.call("RemoveContainer", container_id=first)
    assert clean.json(pod, "/state")["identity"] == captured["identity"]
    assert clean.json(pod, "/shm") == captured["identity"]


def test_exec(clean: KubeNode, captured: dict[str, Any]) -> None:
    _, container = restored(clean)
    assert clean.exec(container, "cat", "/proc/1/comm") == "python3\n"
    done = clean.cri.call("ExecSync", container_id=container, cmd=["sh", "-c", "echo no >&2; exit 4"], timeout=10)
    assert (done.exit_code, done.stderr) == (4, b"no\n")
    with pytest.raises(CriError, match="deadline"):
        clean.cri.call("ExecSync", container_id=container, cmd=["sleep", "60"], timeout=1)
    assert clean.status(container).state == pb.CONTAINER_RUNNING


def test_logs(clean: KubeNode, captured: dict[str, Any]) -> None:
    pod, container = restored(clean)
    path = pod.directory / "logs" / "server" / "0.log"

    def lines() -> set[tuple[str, ...]]:
        """With the stream that each has come by, in the CRI's format: time, stream, tag, text."""
        found = path.read_text().splitlines() if path.exists() else []
        return {tuple(line.split(" ", 3)[1::2]) for line in found}

    clean.json(pod, "/log?first")
    clean.json(pod, "/err?wrong")
    # No line of the source's is among them.
    wait_for("lines in the log", lambda: lines() == {("stdout", "first"), ("stderr", "wrong")})
    path.rename(path.with_suffix(".rotated"))
    clean.cri.call("ReopenContainerLog", container_id=container)
    clean.json(pod, "/log?second")
    clean.json(pod, "/err?again")
    wait_for("lines in the new log", lambda: lines() == {("stdout", "second"), ("stderr", "again")})
    rotated = path.with_suffix(".rotated").read_text()
    assert "second" not in rotated and "again" not in rotated


def test_the_end_of_memory_is_reported(clean: KubeNode, captured: dict[str, Any]) -> None:
    pod, container = restored(clean, resources={"memory_limit_in_bytes": 100 << 20})
    with pytest.raises((OSError, EOFError)):
        clean.json(pod, "/oom")
    status = clean.wait_exited(container)
    assert (status.exit_code, status.reason) == (137, "OOMKilled")


@pytest.mark.parametrize(("patience", "code"), [(30, 0), (1, 137)])
def test_the_grace_period(clean: KubeNode, patience: int, code: int) -> None:
    """Of a program that takes two seconds to end."""
    pod = clean.pod("graceful", annotations={**SNAPSHOT, "rewarm.dev/snapshot": "graceful"})
    container = server(clean, pod, env={"GRACE": "2"})
    clean.wait_ready(pod)
    if clean.outcome(container)["outcome"] == "cold":
        clean.wait_captured(container)
        clean.remove(pod)
        pod = clean.pod("graceful", annotations={**SNAPSHOT, "rewarm.dev/snapshot": "graceful"})
        container = server(clean, pod, env={"GRACE": "2"})
    assert clean.outcome(container)["outcome"] == "warm"
    began = time.monotonic()
    clean.cri.call("StopContainer", container_id=container, timeout=patience)
    assert clean.wait_exited(container).exit_code == code
    assert min(2, patience) <= time.monotonic() - began < 10
    assert "terminating" in clean.log(pod, "server")


def test_init_containers_and_sidecars(clean: KubeNode, captured: dict[str, Any]) -> None:
    reference = image.workload("pod_server")[1]
    pod = clean.pod("several", annotations={**SNAPSHOT, "rewarm.dev/container": "server"})
    init = clean.container(pod, "init", reference, ["sh", "-c", "echo prepared > /cache/init"])
    assert clean.wait_exited(init).exit_code == 0
    sidecar = clean.container(pod, "sidecar", reference, ["sh", "-c", "echo beside; exec sleep 600"])
    container = server(clean, pod)
    assert clean.outcome(container)["outcome"] == "warm"
    clean.wait_ready(pod)
    for other in (init, sidecar):
        with pytest.raises(FileNotFoundError):
            clean.outcome(other)
    assert clean.exec(container, "cat", "/cache/init") == "prepared\n"
    assert "beside" in clean.log(pod, "sidecar")


INIT = """
import os, time
open('/run/rewarm/ready', 'w').close()
print('waits', flush=True)
while not os.path.exists('/cache/go'):
    time.sleep(0.05)
print('prepared', flush=True)
"""


def test_an_init_container_that_the_annotation_means(clean: KubeNode) -> None:
    """It ends as it would have, and the pod's others start after it, cold."""
    annotations = {**SNAPSHOT, "rewarm.dev/snapshot": "init", "rewarm.dev/container": "init"}
    for turn, lines in (("cold", "waits\nprepared\n"), ("warm", "prepared\n")):
        pod = clean.pod("prepared", annotations=annotations)
        init = clean.container(pod, "init", image.workload("pod_server")[1], ["python3", "-c", INIT])
        assert clean.outcome(init)["outcome"] == turn, clean.outcome(init)
        if turn == "cold":
            clean.wait_captured(init)
        assert clean.status(init).state == pb.CONTAINER_RUNNING
        (pod.directory / "empty" / "go").touch()
        assert clean.wait_exited(init).exit_code == 0
        container = server(clean, pod)
        clean.wait_ready(pod)
        with pytest.raises(FileNotFoundError):
            clean.outcome(container)
        assert clean.log(pod, "init") == lines
        clean.remove(pod)


def test_containers_with_snapshots_of_their_own(clean: KubeNode) -> None:
    reference = image.workload("pod_server")[1]
    other = [
        "python3",
        "-c",
        "import os, time; open('/run/rewarm/ready', 'w'); print(os.urandom(4).hex(), flush=True)\n",
    ]
    other[2] += "while True: time.sleep(0.1); print('on', flush=True)"
    for turn in ("cold", "warm"):
        pod = clean.pod("two", annotations=AUTO)
        made = [server(clean, pod), clean.container(pod, "other", reference, other)]
        clean.wait_ready(pod)
        assert [clean.outcome(one)["outcome"] for one in made] == [turn, turn]
        if turn == "cold":
            for one in made:
                clean.wait_captured(one)
            assert len({one["name"] for one in clean.node.json("ls") if one["name"].startswith("auto-")}) == 2
        else:
            wait_for("the other's word", partial(clean.log, pod, "other"))
            assert set(clean.log(pod, "other").split()) == {"on"}
        clean.remove(pod)


# CRIU reads the limits of the processes that it dumps, which takes CAP_SYS_RESOURCE where they are another user's.
USER = 1000 if int(Path("/proc/self/status").read_text().split("CapEff:")[1].split()[0], 16) & 1 << 24 else 0
RESTRICTED = {
    "run_as_user": pb.Int64Value(value=USER),
    "run_as_group": pb.Int64Value(value=USER),
    "supplemental_groups": [2000],
    "capabilities": pb.Capability(drop_capabilities=["ALL"]),
    "no_new_privs": True,
    "readonly_rootfs": True,
}


def test_a_restricted_container(clean: KubeNode) -> None:
    """As the pod security standard `restricted` wants it, and with a read-only root filesystem; as far as this machine
    can capture another user's processes."""
    annotations = {**SNAPSHOT, "rewarm.dev/snapshot": "restricted"}
    for turn in ("cold", "warm"):
        pod = clean.pod("restricted", annotations=annotations)
        container = server(clean, pod, security=RESTRICTED)
        clean.wait_ready(pod)
        assert clean.outcome(container)["outcome"] == turn, clean.outcome(container)
        state = clean.json(pod, "/state")
        assert (state["uid"], state["groups"]) == (USER, [USER, 2000])
        assert (int(state["bounding"], 16), int(state["capabilities"], 16)) == (0, 0)
        assert (state["no_new_privileges"], state["seccomp"]) == ("1", "2")
        assert clean.json(pod, "/keyctl") == errno.EPERM, "it is not under RuntimeDefault"
        assert not state["writable"]
        if turn == "cold":
            clean.wait_captured(container)
        else:
            assert "restored from" in state["restored"], "its user cannot read what it is told"
        clean.remove(pod)
    # The denial of io_uring is a filter, too: that there is one says nothing of the profile.
    pod = clean.pod("unconfined", annotations={"rewarm.dev/snapshot": "restricted"})
    unconfined = pb.SecurityProfile(profile_type=pb.SecurityProfile.Unconfined)
    container = server(clean, pod, security={**RESTRICTED, "seccomp": unconfined})
    clean.wait_ready(pod)
    found = clean.outcome(container)
    assert found["outcome"] == "cold" and "seccomp" in found["reason"], found
    assert clean.json(pod, "/state")["seccomp"] == "2"
    assert clean.json(pod, "/keyctl") != errno.EPERM, "what the others were denied says nothing of RuntimeDefault"


def test_it_is_the_new_pod(clean: KubeNode, captured: dict[str, Any]) -> None:
    pod, container = restored(clean, "other-name", dns="10.96.0.20")
    state = clean.json(pod, "/state")
    assert state["hostname"] == "other-name" == clean.exec(container, "hostname").strip()
    assert f"{pod.ips[0]}\tother-name" in state["hosts"] and f"{pod.ips[1]}\tother-name" in state["hosts"]
    assert f"nameserver {DNS}\n" in captured["resolv"]
    assert "nameserver 10.96.0.20\n" in state["resolv"] and DNS not in state["resolv"]
    for volume in ("token", "config", "secret"):
        assert state[volume] == f"{volume} of other-name {pod.uid}\n" != captured[volume]
    # As the kubelet does: a new directory, and one rename.
    (pod.directory / "config" / "..2026_02").mkdir()
    (pod.directory / "config" / "..2026_02" / "config").write_text("updated\n")
    (pod.directory / "config" / "..new").symlink_to("..2026_02")
    (pod.directory / "config" / "..new").rename(pod.directory / "config" / "..data")
    assert clean.json(pod, "/state")["config"] == "updated\n"
    assert clean.exec(container, "sh", "-c", "echo kept > /cache/file; cat /cache/file") == "kept\n"
    assert (pod.directory / "empty" / "file").read_text() == "kept\n"
    assert f'"{pod.ips[0]}", "{pod.ips[1]}"' in state["restored"] and pod.uid in state["restored"]


def test_its_memory_is_its_own(clean: KubeNode, captured: dict[str, Any]) -> None:
    """/dev/shm is the pod's, which is a mount there."""
    pods = [restored(clean, name) for name in ("one", "two")]
    (_, first), (second_pod, second) = pods
    assert clean.json(second_pod, "/shm") == captured["identity"]
    clean.exec(first, "sh", "-c", "echo mine > /dev/shm/pod-server")
    assert clean.json(second_pod, "/shm") == captured["identity"]
    assert clean.exec(second, "cat", "/dev/shm/pod-server") == captured["identity"]


def test_its_sockets_are_on_the_new_address(clean: KubeNode, captured: dict[str, Any]) -> None:
    pod, _ = restored(clean)
    assert sorted(clean.json(pod, "/own")) == sorted(pod.ips)
    assert clean.json(pod, "/", port=8001) == pod.ips[0]
    assert clean.json(pod, "/", port=8001, ip=pod.ips[1]) == pod.ips[1]


def test_its_connections(clean: KubeNode, captured: dict[str, Any]) -> None:
    pod, _ = restored(clean)
    assert clean.json(pod, "/loopback") == "hello"
    assert captured["outside"] == "open", "the source has lost its own"
    assert clean.json(pod, "/state")["outside"].startswith("closed")


def test_it_is_told(clean: KubeNode, captured: dict[str, Any]) -> None:
    """Before it is ready: it says that it is only then. Copies draw other numbers."""
    assert captured["told"] == []
    numbers = set()
    for name in ("one", "two"):
        pod, container = restored(clean, name)
        (told,) = clean.json(pod, "/state")["told"]
        expected = {"namespace": "default", "name": name, "container": "server"}
        assert {key: told["pod"][key] for key in expected} == expected and told["pod"]["uid"] in (pod.uid, "")
        assert (told["addresses"], told["hostname"], told["container"]) == (pod.ips, name, container)
        numbers.add(clean.json(pod, "/random"))
    assert len(numbers) == 2


def test_its_clock_goes_on(clean: KubeNode, captured: dict[str, Any]) -> None:
    """CRIU makes a time namespace, so that CLOCK_MONOTONIC goes on from the moment of the capture."""
    pod, container = restored(clean)
    assert not clean.json(pod, "/state")["backwards"]
    clocks = dict(
        line.split()[:2] for line in Path(f"/proc/{clean.pid(container)}/timens_offsets").read_text().splitlines()
    )
    assert int(clocks["monotonic"]) < 0, "it is older than the capture"


def test_its_clock_goes_on_where_the_node_has_not_been_up_as_long(
    clean: KubeNode, tmp_path: Path, prefix: Path
) -> None:
    annotations = {**SNAPSHOT, "rewarm.dev/snapshot": "older"}
    clocks = []
    store, binary = clean.node.store, clean.binary  # each version of containerd has a seccomp profile of its own
    with KubeNode(tmp_path / "older", prefix, number=7, store=store, binary=binary, older=1_000_000) as older:
        older.import_image(image.workload("pod_server")[0])
        for node, outcome in ((older, "cold"), (clean, "warm")):
            pod = node.pod("clock", annotations=annotations)
            container = node.container(pod, "server", image.workload("pod_server")[1], SERVER, env=START)
            node.wait_ready(pod)
            assert node.outcome(container)["outcome"] == outcome, node.outcome(container)
            if node is older:
                node.wait_captured(container)
            assert not node.json(pod, "/state")["backwards"]
            clocks.append(node.json(pod, "/clock"))
    assert clocks[0] > time.monotonic() + 900_000
    assert abs(clocks[1] - clocks[0]) < 600, "it is the node's"


def test_its_limits_are_its_own(clean: KubeNode, captured: dict[str, Any]) -> None:
    limits = {"cpu_period": 100000, "cpu_quota": 70000, "memory_limit_in_bytes": 200 << 20}
    pod, container = restored(clean, resources=limits)
    place = clean.cgroup(pod, container)
    found = {
        file.name: file.read_text().strip()
        for one in cgroups.directories(place)
        for file in one.glob("*.*")
        if file.name in ("cpu.cfs_quota_us", "memory.limit_in_bytes", "cpu.max", "memory.max")
    }
    assert found in (
        {"cpu.cfs_quota_us": "70000", "memory.limit_in_bytes": str(200 << 20)},
        {"cpu.max": "70000 100000", "memory.max": str(200 << 20)},
    )
    assert clean.pid(container) in cgroups.processes(place)
    clean.cri.call(
        "UpdateContainerResources",
        container_id=container,
        linux=pb.LinuxContainerResources(memory_limit_in_bytes=300 << 20),
    )
    assert str(300 << 20) in {
        file.read_text().strip()
        for one in cgroups.directories(place)
        for file in one.glob("memory.*")
        if file.name in ("memory.limit_in_bytes", "memory.max")
    }


SHARED = {"rewarm.dev/snapshot": "shared", "rewarm.dev/container": "server", "rewarm.dev/capture": "on-ready"}


@pytest.fixture(scope="module")
def captured_shared(kube: KubeNode) -> dict[str, Any]:
    """As `captured`, in a pid namespace that is the pod's."""
    pod = kube.pod("source", annotations=SHARED, share_pids=True)
    container = server(kube, pod)
    kube.wait_ready(pod)
    kube.wait_captured(container)
    state: dict[str, Any] = kube.json(pod, "/state")
    kube.remove(pod)
    return state


def test_its_cgroup(clean: KubeNode, captured: dict[str, Any]) -> None:
    """The new pod's; with cgroup v2 it is the root of a cgroup namespace of its own."""
    pod, container = restored(clean)
    place = clean.cgroup(pod, container)
    assert clean.pid(container) in cgroups.processes(place)
    lines = clean.exec(container, "cat", "/proc/1/cgroup").split()
    if Path("/sys/fs/cgroup/cgroup.controllers").exists():
        assert lines == ["0::/"], "it sees the node's cgroups, or the source's"
        assert clean.exec(container, "sh", "-c", "cat /sys/fs/cgroup/cgroup.procs").split()[0] == "1"
    else:
        assert {line.rpartition(":")[2] for line in lines} == {place}


def test_its_class_of_service_is_its_own(clean: KubeNode, captured: dict[str, Any]) -> None:
    """The source's would make it the first to be killed when the node has no memory left."""
    _, container = restored(clean, resources={"oom_score_adj": 500})
    assert clean.exec(container, "cat", "/proc/1/oom_score_adj") == "500\n"


def test_a_shared_pid_namespace(clean: KubeNode, captured_shared: dict[str, Any]) -> None:
    pod = clean.pod("shared", annotations=SHARED, share_pids=True)
    # It has more of the first numbers than any container had in the source's pod.
    many = "for n in 1 2 3 4 5 6 7 8 9; do sleep 600 & done; wait"
    clean.container(pod, "sidecar", image.workload("pod_server")[1], ["sh", "-c", many])
    for attempt in (0, 1):
        container = server(clean, pod, attempt=attempt)
        assert clean.outcome(container)["outcome"] == "warm", clean.outcome(container)
        clean.wait_ready(pod)
        state = clean.json(pod, "/state")
        assert (state["identity"], state["pid"]) == (captured_shared["identity"], captured_shared["pid"])
        names = clean.exec(container, "sh", "-c", "cat /proc/[0-9]*/comm").split()
        assert "pause" in names and names.count("sleep") == 9, "it does not see the pod's processes"
        assert clean.exec(container, "cat", f"/proc/{state['pid']}/comm") == "python3\n"
        with pytest.raises((OSError, EOFError)):
            clean.json(pod, "/exit?3")
        assert clean.wait_exited(container).exit_code == 3


def test_a_shared_pid_namespace_in_which_a_number_is_taken(clean: KubeNode, captured_shared: dict[str, Any]) -> None:
    taken = captured_shared["pid"]
    pod = clean.pod("taken", annotations=SHARED, share_pids=True)
    reference = image.workload("pod_server")[1]
    first = clean.container(pod, "first", reference, ["sleep", "600"])
    process.set_last_pid(f"/proc/{clean.pid(first)}/ns/pid", taken - 1)
    sidecar = clean.container(pod, "sidecar", reference, ["sleep", "600"])
    assert clean.exec(sidecar, "cat", f"/proc/{taken}/comm") == "sleep\n"
    container = server(clean, pod)
    assert clean.outcome(container)["outcome"] == "cold"
    assert f"process id {taken} is taken in the pid namespace" in clean.outcome(container)["reason"]
    clean.wait_ready(pod)
    assert clean.exec(sidecar, "cat", f"/proc/{taken}/comm") == "sleep\n"


def test_snapshots_of_own_and_shared_pid_namespaces(
    clean: KubeNode, captured: dict[str, Any], captured_shared: dict[str, Any]
) -> None:
    for name, shared in (("web", True), ("shared", False)):
        pod = clean.pod(f"other-{name}", annotations={**SHARED, "rewarm.dev/snapshot": name}, share_pids=shared)
        container = server(clean, pod)
        found = clean.outcome(container)
        assert found["outcome"] == "cold" and "snapshot has namespaces" in found["reason"]
        clean.wait_ready(pod)


def test_an_orphan_in_a_shared_pid_namespace_is_named(clean: KubeNode) -> None:
    """CRIU would leave it out, without a word."""
    pod = clean.pod("orphan", annotations={**SHARED, "rewarm.dev/snapshot": "orphan"}, share_pids=True)
    script = "(sleep 600 &); touch /run/rewarm/ready; exec sleep 700"
    container = clean.container(pod, "server", image.workload("pod_server")[1], ["sh", "-c", script])
    with pytest.raises(AssertionError, match=r"process [0-9]+ \(sleep\) has outlived its parent"):
        clean.wait_captured(container)
    assert clean.status(container).state == pb.CONTAINER_RUNNING


def test_a_pod_of_another_namespace(clean: KubeNode, captured: dict[str, Any]) -> None:
    """It has no snapshot of that name, unless the node's settings share that of the other namespace."""
    annotations = {"rewarm.dev/snapshot": "web"}
    try:
        for settings, outcome in (
            ({}, "cold"),
            ({"*": {"share": ["elsewhere", "default"]}}, "warm"),
            ({"*": {"share": ["default"]}, "team-a": {"ignore": "all"}}, ""),
            ({"team-b": {"share": ["default"]}}, "cold"),
        ):
            clean.configure(namespaces=settings)
            pod = clean.pod("foreign", namespace="team-a", annotations=annotations)
            container = server(clean, pod)
            if outcome:
                found = clean.outcome(container)
                assert found["outcome"] == outcome, found
                assert outcome == "warm" or "team-a/web" in found["reason"], found
            else:
                with pytest.raises(FileNotFoundError):
                    clean.outcome(container)
            clean.remove(pod)
    finally:
        clean.configure()


def test_the_nodes_network(clean: KubeNode) -> None:
    annotations = {**SNAPSHOT, "rewarm.dev/snapshot": "host"}
    for turn in ("cold", "warm"):
        pod = clean.pod("host", annotations=annotations, host_network=True)
        container = clean.container(pod, "server", image.workload("pod_server")[1], SERVER, env=START)
        clean.wait_ready(pod)
        assert clean.outcome(container)["outcome"] == turn, clean.outcome(container)
        assert clean.json(pod, "/loopback") == "hello"
        if turn == "cold":
            clean.wait_captured(container)
        clean.remove(pod)


def test_the_deadline(clean: KubeNode, captured: dict[str, Any]) -> None:
    """It lies below the kubelet's 120 s, and what was not restored in time starts cold in time."""
    clean.configure(deadline=0.05)
    try:
        pod = clean.pod("late", annotations=SNAPSHOT)
        began = time.monotonic()
        container = server(clean, pod)
        assert time.monotonic() - began < 10
        clean.wait_ready(pod)
        outcome = clean.outcome(container)
        assert outcome["outcome"] == "cold" and "0.05 s" in outcome["reason"], outcome
    finally:
        clean.configure()


SHOWN_BY: dict[str, Any] = {
    "sandbox": test_sandbox_and_container,
    "container": test_sandbox_and_container,
    "restart after a crash": test_a_restart_after_a_crash_is_warm,
    "exec, exec probes": test_exec,
    "logs, rotated logs": test_logs,
    "exit code": test_a_restart_after_a_crash_is_warm,
    "OOM kill": test_the_end_of_memory_is_reported,
    "termination grace period": test_the_grace_period,
    "init containers, sidecars": [test_init_containers_and_sidecars, test_an_init_container_that_the_annotation_means],
    "several containers with snapshots of their own": test_containers_with_snapshots_of_their_own,
    "another user than root, dropped capabilities, no new privileges": test_a_restricted_container,
    "read-only root filesystem": test_a_restricted_container,
    "RuntimeDefault seccomp": test_a_restricted_container,
    "ConfigMap, Secret, projected token, emptyDir": test_it_is_the_new_pod,
    "`/etc/hosts`, `resolv.conf`, host name": test_it_is_the_new_pod,
    "`/dev/shm`": test_its_memory_is_its_own,
    "sockets on the pod's IP, IPv4 and IPv6": test_its_sockets_are_on_the_new_address,
    "connections": test_its_connections,
    "a program that wants to know": test_it_is_told,
    "CLOCK_MONOTONIC": test_its_clock_goes_on_where_the_node_has_not_been_up_as_long,
    "CPU and memory limits, on both cgroup versions": test_its_limits_are_its_own,
    "private cgroup namespace": test_its_cgroup,
    "OOM score": test_its_class_of_service_is_its_own,
    "shared pid namespace": test_a_shared_pid_namespace,
    "a snapshot of another namespace": test_a_pod_of_another_namespace,
    "host network": test_the_nodes_network,
    "the node's deadline": test_the_deadline,
}


def test_the_table_is_in_the_readme() -> None:
    """And each line of it is shown by a test."""
    assert SHOWN_BY.keys() == TABLE.keys()
    text = (Path(__file__).parents[2] / "README.md").read_text()
    _, _, table = text.partition("| feature | of a restored container |\n| --- | --- |\n")
    rows = table.partition("\n\n")[0].splitlines()
    assert rows == [f"| {feature} | {result} |" for feature, result in TABLE.items()]
