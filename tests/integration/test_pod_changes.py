"""What a new pod has not as its source had it: the image behind its tag, files on volumes, multicast groups."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from support import image, rootfs
from support.cri import CriError
from support.leftovers import Leftovers
from support.pods import KubeNode
from support.proc import wait_for

pytestmark = pytest.mark.alone

REFERENCE = "rewarm.test/pod_server:1"
TAG = "rewarm.test/moving:latest"
PROGRAM = """
import sys, time
sys.path.insert(0, '/app')
import version
open('/run/rewarm/ready', 'w').close()
while True:
    print(version.V, flush=True)
    time.sleep(0.05)
"""

OPENS = """
import os, sys, time
{first}
open('/run/rewarm/ready', 'w').close()
while not os.path.exists('/run/rewarm/restored.json'):
    time.sleep(0.02)
{then}
print('done', flush=True)
while True:
    time.sleep(0.1)
"""
LOG = "log = open('/cache/logs/app.log', {mode!r}, buffering=1); log.write('one\\n')"
WRITES = "log.write('two\\n'); print(open('/cache/logs/app.log').read().split(), flush=True)"


@pytest.fixture(scope="module")
def kube(tmp_path_factory: pytest.TempPathFactory, prefix: Path) -> Iterator[KubeNode]:
    before = Leftovers.now()
    with KubeNode(tmp_path_factory.mktemp("kube"), prefix) as made:
        made.import_image(image.workload("pod_server")[0])
        made.remove(made.pod("first"))  # the engine's cgroup stays, and is none that a test leaves
        yield made
    before.check()


@pytest.fixture
def clean(kube: KubeNode) -> Iterator[KubeNode]:
    yield kube
    kube.remove_all()


def moved(kube: KubeNode, directory: Path, version: str) -> None:
    """The tag names an image of this version from now on; its file has the size and mode of the others."""
    layer = directory / version
    (layer / "app").mkdir(parents=True)
    (layer / "app/version.py").write_text(f"V = {version!r}\n")
    os.utime(layer / "app/version.py", (0, 1_700_000_000 + int(version)))
    layers = [*rootfs.layers("pod_server"), layer]
    archive = image.pack(directory / f"{version}.tar", TAG, layers, env=rootfs.env("pod_server"))
    kube.import_image(archive)


def test_a_moved_tag(clean: KubeNode, tmp_path: Path) -> None:
    """Each version's own snapshot, also when the tag is back at the first."""
    outcomes = {}
    for turn, version in enumerate(["1", "2", "2", "1"]):
        if turn in (0, 1, 3):
            moved(clean, tmp_path / str(turn), version)
        pod = clean.pod(f"moving-{turn}", annotations={"rewarm.dev/snapshot": "auto", "rewarm.dev/capture": "on-ready"})
        container = clean.container(pod, "server", TAG, ["python3", "-u", "-c", PROGRAM])
        outcomes[turn] = clean.outcome(container)
        wait_for("a line", partial(clean.log, pod, "server"))
        assert set(clean.log(pod, "server").split()) == {version}
        if outcomes[turn]["outcome"] == "cold":
            clean.wait_captured(container)
        clean.remove(pod)
    assert [outcomes[turn]["outcome"] for turn in range(4)] == ["cold", "cold", "warm", "warm"], outcomes
    assert "snapshot was taken of another image of that name" in outcomes[1]["reason"]


def program(first: str, then: str) -> list[str]:
    return ["python3", "-u", "-c", OPENS.format(first=first, then=then)]


def captured(kube: KubeNode, name: str, args: list[str]) -> str:
    """Makes a snapshot of a pod, which is gone then; what the capture said."""
    pod = kube.pod(f"source-{name}", annotations={"rewarm.dev/snapshot": name, "rewarm.dev/capture": "on-ready"})
    said = kube.wait_captured(kube.container(pod, "server", REFERENCE, args))
    kube.remove(pod)
    return str(said["text"])


@pytest.mark.parametrize("mode", ["a", "w"])
def test_a_log_on_an_empty_volume(clean: KubeNode, mode: str) -> None:
    """The new pod has a log of its own, that of a crashed container is gone on with."""
    args = program("os.makedirs('/cache/logs', exist_ok=True); " + LOG.format(mode=mode), WRITES)
    assert "volume" not in captured(clean, f"log-{mode}", args)
    pod = clean.pod("new", annotations={"rewarm.dev/snapshot": f"log-{mode}"})
    container = clean.container(pod, "server", REFERENCE, args)
    assert clean.outcome(container)["outcome"] == "warm", clean.outcome(container)
    wait_for("its log", lambda: "done" in clean.log(pod, "server"))
    assert clean.log(pod, "server") == "['two']\ndone\n"
    status = (pod.directory / "empty/logs/app.log").stat()
    assert (status.st_mode & 0o7777, status.st_uid, status.st_size) == (0o644, 0, 4)
    if mode == "a":
        os.kill(clean.pid(container), signal.SIGKILL)
        clean.wait_exited(container)
        container = clean.container(pod, "server", REFERENCE, args, attempt=1)
        assert clean.outcome(container)["outcome"] == "warm", clean.outcome(container)
        wait_for("its log", lambda: "done" in clean.log(pod, "server", 1))
        assert clean.log(pod, "server", 1) == "['two', 'two']\ndone\n"


def test_a_working_directory_on_an_empty_volume(clean: KubeNode) -> None:
    first = "os.makedirs('/cache/a/work', mode=0o700, exist_ok=True); os.chdir('/cache/a/work')"
    args = program(first, "open('here', 'w').close(); print(os.getcwd(), os.listdir('.'), flush=True)")
    captured(clean, "cwd", args)
    pod = clean.pod("new", annotations={"rewarm.dev/snapshot": "cwd"})
    container = clean.container(pod, "server", REFERENCE, args)
    assert clean.outcome(container)["outcome"] == "warm", clean.outcome(container)
    wait_for("its log", lambda: "done" in clean.log(pod, "server"))
    assert clean.log(pod, "server") == "/cache/a/work ['here']\ndone\n"
    assert (pod.directory / "empty/a/work").stat().st_mode & 0o7777 == 0o700


def test_what_cannot_be_made_is_told(clean: KubeNode) -> None:
    """And what could be is taken away again, by who fails."""
    data = "open('/cache/data', 'w').write('x'); data = open('/cache/data'); "
    args = program(data + "os.makedirs('/cache/logs', exist_ok=True); " + LOG.format(mode="a"), WRITES)
    said = captured(clean, "data", args)
    assert "; volume /cache: data must be on a new container's as now, else it starts cold" in said
    annotations = {"rewarm.dev/snapshot": "data", "rewarm.dev/on-miss": "fail"}
    pod = clean.pod("new", annotations=annotations)
    with pytest.raises(CriError, match="cache/data"):
        clean.container(pod, "server", REFERENCE, args)
    assert os.listdir(pod.directory / "empty") == []
    # A volume that has it is fine.
    (pod.directory / "empty/data").write_text("y")
    container = clean.container(pod, "server", REFERENCE, args, attempt=1)
    assert clean.outcome(container)["outcome"] == "warm", clean.outcome(container)


def test_multicast_groups_are_told(clean: KubeNode) -> None:
    """CRIU keeps none: a program that wants them joins again when it is told of the restore."""
    where = "socket.inet_aton('224.0.0.251') + bytes(4) + socket.if_nametoindex('eth0').to_bytes(4, sys.byteorder)"
    join = f"s.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, {where})"
    first = f"import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(('', 5353)); {join}"
    said = captured(clean, "multicast", program(first, "pass"))
    assert "; multicast groups do not come back: 224.0.0.251 on eth0 of its network namespace have to be joined" in said
    plain = "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(('', 5353))"
    assert "multicast" not in captured(clean, "plain", program(plain, "pass"))
