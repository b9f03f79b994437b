"""Pods that go away in the middle, engines that do, kubelets that lose patience, and annotations that are an attack."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from rewarm.oci import record
from support import cgroups, image, rootfs
from support.cri import CriError, pb
from support.leftovers import Leftovers
from support.pods import KubeNode, Pod
from support.proc import wait_for

pytestmark = pytest.mark.alone

ANNOTATIONS = {"rewarm.dev/snapshot": "web", "rewarm.dev/capture": "on-ready"}
SERVER = ["python3", "-u", "-m", "support.workloads.pod_server"]
MIB = 128


@contextlib.contextmanager
def node(directory: Path, prefix: Path, binary: Path, **more: Any) -> Iterator[KubeNode]:
    """With a snapshot of a server whose restore takes a moment."""
    before = Leftovers.now()
    with KubeNode(directory, prefix, binary=binary, **more) as made:
        made.import_image(image.workload("pod_server")[0])
        pod = made.pod("source", annotations=ANNOTATIONS)
        made.wait_captured(server(made, pod))
        made.remove(pod)
        yield made
    before.check()


@pytest.fixture(scope="module")
def kube(tmp_path_factory: pytest.TempPathFactory, prefix: Path) -> Iterator[KubeNode]:
    """containerd 1.6: 2.1 leaves a shim of a pod that is deleted while a container of it starts, with runc as well."""
    with node(tmp_path_factory.mktemp("faults"), prefix, Path("/usr/bin/containerd")) as made:
        yield made


@pytest.fixture(params=["1.6", "2.x"])
def own(request: pytest.FixtureRequest, nothing_left_behind: None, tmp_path: Path, prefix: Path) -> Iterator[KubeNode]:
    """A node whose containerd may be killed."""
    binary = rootfs.containerd2() / "containerd" if request.param == "2.x" else Path("/usr/bin/containerd")
    with node(tmp_path, prefix, binary) as made:
        yield made


@pytest.fixture
def clean(kube: KubeNode) -> Iterator[KubeNode]:
    yield kube
    kube.remove_all()


def server(kube: KubeNode, pod: Pod, **more: Any) -> str:
    return kube.container(pod, "server", image.workload("pod_server")[1], SERVER, env={"MIB": str(MIB)}, **more)


@contextlib.contextmanager
def being_created(kube: KubeNode, pod: Pod, after: float | None) -> Iterator[None]:
    """A container's creation has gone on for `after` seconds (or until CRIU makes its processes), and may fail; it is
    over at the end."""

    def create() -> None:
        with contextlib.suppress(CriError):
            server(kube, pod)

    thread = threading.Thread(target=create)
    thread.start()
    if after is None:
        wait_for("a half-made container", partial(half_made, kube, pod), interval=0.001)
    else:
        time.sleep(after)
    yield
    thread.join()


def half_made(kube: KubeNode, pod: Pod) -> bool:
    """There are processes, and the restore goes on."""
    return any(cgroups.processes(kube.cgroup(pod, one)) and is_restoring(kube, one) for one in pod.containers)


def is_restoring(kube: KubeNode, container: str) -> bool:
    kept = record.load(str(kube.node.container_directory(container, kube.engine.runc_root / "k8s.io")))
    return kept is not None and kept.phase == record.RESTORING


def nothing_of(kube: KubeNode, pod: Pod) -> None:
    """Once a pod is deleted: no process, no cgroup, no state."""
    kube.remove(pod)
    wait_for("its cgroups to go", lambda: not list(cgroups.directories(pod.config.linux.cgroup_parent)))

    def gone() -> bool:
        state = kube.node.state / "containers"
        return not [path for path in state.glob("*/*") if path.name in pod.containers]

    wait_for("its state to go", gone)
    assert not list(kube.engine.runc_root.glob(f"*/{pod.sandbox}"))


def test_two_pods_of_one_name(clean: KubeNode) -> None:
    """Kubernetes deletes and makes anew: the old one may still be there."""
    made: list[tuple[Pod, str]] = []

    def one() -> None:
        pod = clean.pod("same", annotations=ANNOTATIONS)
        made.append((pod, server(clean, pod)))

    threads = [threading.Thread(target=one) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [clean.outcome(container)["outcome"] for _, container in made] == ["warm", "warm"]
    told = [clean.json(pod, "/state")["restored"] for pod, _ in made]
    assert all(pod.uid in text for (pod, _), text in zip(made, told, strict=True))


@pytest.mark.parametrize("after", [None, 0.02, 0.06, 0.1, 0.15, 0.2, 0.3])
def test_a_pod_that_is_deleted_while_it_is_restored(clean: KubeNode, after: float | None) -> None:
    pod = clean.pod("short", annotations=ANNOTATIONS)
    with being_created(clean, pod, after):
        clean.cri.call("StopPodSandbox", pod_sandbox_id=pod.sandbox)
    nothing_of(clean, pod)


@pytest.mark.parametrize("after", [None, 0.05, 0.2, 0.3, 0.4, 0.6])
def test_a_pod_that_is_deleted_while_it_is_captured(clean: KubeNode, after: float | None) -> None:
    """The server has several threads: CRIU waits for such a process for ever, and with it the pod would stay."""
    name = f"brief-{int((after or 0) * 1000)}"
    pod = clean.pod("brief", annotations={**ANNOTATIONS, "rewarm.dev/snapshot": name})
    container = server(clean, pod)
    if after is None:
        wait_for("the pause", lambda: clean.state(container)["status"] == "paused", interval=0.001)
    else:
        clean.wait_ready(pod)
        time.sleep(after)
    nothing_of(clean, pod)
    if after is None:
        assert name not in [one["name"] for one in clean.node.json("ls")], "the capture was over"


@pytest.mark.parametrize("patience", [0.05, 0.15, 0.25])
def test_a_kubelet_that_loses_patience(clean: KubeNode, patience: float) -> None:
    """Its call ends, and the engine's with it; it deletes the container and makes another."""
    pod = clean.pod("slow", annotations=ANNOTATIONS)
    container = server(clean, pod, start=False)
    with contextlib.suppress(CriError):
        clean.cri.call("StartContainer", container_id=container, within=patience)
    with contextlib.suppress(CriError):
        clean.cri.call("StopContainer", container_id=container, timeout=0)
    wait_for("its removal", lambda: removed(clean, container))
    second = server(clean, pod, attempt=1)
    clean.wait_ready(pod)
    assert clean.outcome(second)["outcome"] == "warm", clean.outcome(second)
    nothing_of(clean, pod)


def removed(kube: KubeNode, container: str) -> bool:
    """A kubelet tries again: a container that is being started cannot be removed."""
    try:
        kube.cri.call("RemoveContainer", container_id=container)
    except CriError:
        return False
    return True


def answers(kube: KubeNode) -> bool:
    """Once it is up again: containerd 1.6 serves the CRI before it is ready to."""
    try:
        return bool(kube.cri.call("Status").status.conditions)
    except CriError:
        return False


def test_an_engine_that_is_killed_while_it_restores(own: KubeNode) -> None:
    for after in (0.05, 0.15, 0.25):
        _killed(own, after)


def _killed(clean: KubeNode, after: float) -> None:
    pod = clean.pod("orphan", annotations=ANNOTATIONS)
    with being_created(clean, pod, after):
        clean.engine.restart()
    wait_for("the pods' network", partial(answers, clean))
    listed = [one.id for one in clean.cri.call("ListContainers").containers if one.pod_sandbox_id == pod.sandbox]
    pod.containers[:] = listed
    for container in listed:
        with contextlib.suppress(CriError):
            clean.cri.call("StopContainer", container_id=container, timeout=0)
        wait_for("its removal", partial(removed, clean, container))
    second = server(clean, pod, attempt=1)
    clean.wait_ready(pod)
    assert clean.outcome(second)["outcome"] == "warm", clean.outcome(second)
    nothing_of(clean, pod)


def test_an_engine_that_is_restarted_beside_restored_containers(own: KubeNode) -> None:
    clean = own
    pod = clean.pod("steady", annotations=ANNOTATIONS)
    container = server(clean, pod)
    clean.wait_ready(pod)
    clean.engine.restart()
    wait_for("the engine", partial(answers, clean))
    wait_for("its container", lambda: clean.status(container).state == pb.CONTAINER_RUNNING)
    assert clean.exec(container, "echo", "on") == "on\n"
    clean.cri.call("StopContainer", container_id=container, timeout=20)
    assert clean.wait_exited(container).exit_code == 0
    nothing_of(clean, pod)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rewarm.dev/snapshot", "x" * 10240),
        ("rewarm.dev/snapshot", "../../../etc/passwd"),
        ("rewarm.dev/snapshot", "/etc/shadow"),
        ("rewarm.dev/snapshot", "a\nb\x1b[31m"),
        ("rewarm.dev/ready", "http://169.254.169.254:80/"),
        ("rewarm.dev/engine", "vllm;reboot"),
        ("rewarm.dev/ready", "exec:" + "x" * 10240),
        ("rewarm.dev/" + "k" * 9000, "x"),
    ],
)
def test_hostile_annotations(clean: KubeNode, key: str, value: str) -> None:
    """The kubelet's event has one line that names the key, and can be read."""
    pod = clean.pod("hostile", annotations={"rewarm.dev/snapshot": "web", key: value})
    with pytest.raises(CriError) as caught:
        server(clean, pod)
    text = str(caught.value)
    assert "rewarm.dev/" in text and "\x1b" not in text and "\n" not in text.strip() and len(text) < 2000
    nothing_of(clean, pod)


def test_criu_options_are_not_a_pods_to_say(nothing_left_behind: None, tmp_path: Path, prefix: Path) -> None:
    """Annotations that an engine lets through only where it is told to, and rewarm does not even then."""
    unsafe = {"org.criu.config": "/cache/criu.conf"}
    with node(tmp_path, prefix, Path("/usr/bin/containerd"), annotations=["org.*"]) as kube:
        for annotations in ({}, ANNOTATIONS):
            pod = kube.pod("options", annotations={**annotations, **unsafe})
            (pod.directory / "empty" / "criu.conf").write_text("action-script /cache/script\n")
            container = server(kube, pod, annotations=unsafe)
            state = kube.state(container)
            told = json.loads((Path(state["bundle"]) / "config.json").read_text())["annotations"]
            if annotations:
                assert kube.outcome(container)["outcome"] == "warm"
                assert not unsafe.keys() & (told.keys() | state["annotations"].keys())
            else:
                assert unsafe.items() <= told.items(), "the engine does not pass it on"
            nothing_of(kube, pod)


SCRIPTS = {
    "link": "ln -sf /etc/passwd /run/rewarm/ready",
    "fifo": "rm -f /run/rewarm/ready; mkfifo /run/rewarm/ready",
    "device": "rm -f /run/rewarm/ready; mknod /run/rewarm/ready c 1 3",
    "directory of links": "rm -f /run/rewarm/ready; ln -s / /run/rewarm/restored.json; ln -s /etc /run/rewarm/ready",
    "many": "cd /run/rewarm; i=0; while [ $i -lt 900 ]; do : > f$i; i=$((i+1)); done; rm -f ready; touch ready",
}


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=list(SCRIPTS))
def test_a_control_directory_that_its_user_has_filled(clean: KubeNode, script: str) -> None:
    """Nothing on the node is followed, opened or waited for, and everything of it goes with the container."""
    name = f"filled-{abs(hash(script))}"
    program = ["sh", "-c", f"{script}; exec sleep 600"]
    is_ready = "touch ready" in script
    if not is_ready:
        clean.configure(ready_timeout=1.5)
    try:
        pod = clean.pod("filled", annotations={**ANNOTATIONS, "rewarm.dev/snapshot": name})
        container = clean.container(pod, "server", image.workload("pod_server")[1], program)
        state = clean.node.container_directory(container, clean.engine.runc_root / "k8s.io")
        control = state / "control"
        if is_ready:
            clean.wait_captured(container)
        else:
            said = clean.watched(container)
            assert not stat.S_ISREG(os.lstat(control / "ready").st_mode)
            assert not said["captured"] and "not ready within 1.5 s" in said["text"], said
    finally:
        clean.configure()
    nothing_of(clean, pod)
    assert not control.exists()


GREEDY = """
import errno, os
def fill(name, data=b""):
    try:
        with open(f"/run/rewarm/{name}", "wb") as file:
            file.write(data)
    except OSError as error:
        assert error.errno == errno.ENOSPC, error
        return False
    return True
fill("large", bytes(256 << 20))
n = 0
while n < 200_000 and fill(f"file-{n}"):
    n += 1
print("full", flush=True)
os.execlp("sleep", "sleep", "600")
"""


@pytest.mark.parametrize("warm", [False, True])
def test_a_control_directory_is_no_way_to_fill_the_nodes_run(clean: KubeNode, warm: bool) -> None:
    """Where engines and runc keep their state, too. A restored container's is as small."""
    name = f"greedy-{warm}"
    script = 'touch /run/rewarm/ready; while ! test -e /cache/go; do sleep 0.1; done; exec python3 -c "$GREEDY"'
    for turn in range(1 + warm):
        pod = clean.pod(f"{name}-{turn}", annotations={**ANNOTATIONS, "rewarm.dev/snapshot": name})
        reference = image.workload("pod_server")[1]
        container = clean.container(pod, "server", reference, ["sh", "-c", script], env={"GREEDY": GREEDY})
        if turn < warm:
            clean.wait_captured(container)
            clean.remove(pod)
    assert clean.outcome(container)["outcome"] == ("warm" if warm else "cold")
    control = clean.node.container_directory(container, clean.engine.runc_root / "k8s.io") / "control"
    (pod.directory / "empty" / "go").touch()
    wait_for("the program", lambda: "full" in clean.log(pod, "server"))
    room = os.statvfs(control)
    assert control.stat().st_dev != control.parent.stat().st_dev and not room.f_bavail
    assert room.f_blocks * room.f_frsize <= 8 << 20 and sum(1 for _ in control.iterdir()) <= room.f_files <= 1024
    nothing_of(clean, pod)
    assert not control.exists()
