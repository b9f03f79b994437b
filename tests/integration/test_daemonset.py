"""The DaemonSet's image and program, for real: built by Podman, run with the manifest's security context, installing on
a node that has neither network nor compiler, and talking to an API server over TLS.

The node is this machine's files in a mount namespace of their own; the pod enters it by nsenter, as it would that of
process 1.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from daemonset import SETTINGS
from daemonset_label import LABEL
from support import manifests
from support.bare_node import BareNode
from support.daemonset import ACCOUNT, pod_of, start
from support.kube_api import Asked, KubeApi
from support.node_image import IMAGE, NodeImage, RunningPod
from support.proc import CommandFailed, command, wait_for


def patches(api: KubeApi) -> list[str | None]:
    return [asked.body["metadata"]["labels"][LABEL] for asked in api.asked]


def test_image(image: NodeImage, tmp_path: Path) -> None:
    """Wheels for every Python that a node may have, by pip's own opinion; no compiler; only root may write to it."""
    words = ["run", "--rm", "--cgroup-parent", image.cgroup, "--network", "none", "--volume", f"{tmp_path}:/out"]
    copy = "cp -r /rewarm/parts/wheels /out; ! command -v gcc make pip3; find /rewarm -perm /022 ! -type l"
    assert image.run(*words, "--entrypoint", "sh", IMAGE, "-c", copy).stdout == ""
    wheels = tmp_path / "wheels"
    assert len(list(wheels.glob("pip-*.whl"))) == 1
    for version in ("3.11", "3.12", "3.13", "3.14"):
        pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--isolated", "--no-index"]
        for platform in ("linux", "manylinux2014", "manylinux_2_17", "manylinux_2_28"):
            pip += ["--platform", f"{platform}_{os.uname().machine}"]
        pip += ["--python-version", version, "--only-binary=:all:", f"--target={tmp_path / version}"]
        said = command(*pip, "--find-links", wheels, "rewarm").stdout
        assert all(f"{name}-" in said.split("Would install")[1] for name in ("rewarm", "blake3", "cffi", "zstandard"))


def test_parts_that_are_none(tmp_path: Path) -> None:
    install = Path(__file__).parents[2] / "install/install.sh"
    words: list[str | Path] = [
        install,
        "--prefix",
        tmp_path / "prefix",
        "--no-register",
        "--no-packages",
        "--from",
        tmp_path,
    ]
    with pytest.raises(CommandFailed, match="holds no parts of rewarm; make them with install"):
        command(*words)
    tmp_path.joinpath("complete").write_text("pdp11\n")
    with pytest.raises(CommandFailed, match="is for pdp11, this is"):
        command(*words)


def test_a_node_comes_and_goes(image: NodeImage, machine: BareNode, api: KubeApi, tmp_path: Path) -> None:
    """Installed, labelled; broken: the label goes, and it is installed again; SIGTERM leaves it; uninstalled."""
    before = machine.read("/etc/containerd/config.toml")
    settings = tmp_path / "settings"
    settings.mkdir()
    settings.joinpath("config.yaml").write_text("deadline: 30\n")
    with start(image, machine, api, settings=settings) as pod:
        pod.wait_for("node-1: installed and verified")
        assert pod.ready()
        assert api.labels == {"kubernetes.io/hostname": "node-1", LABEL: "true"}
        wanted = Asked(
            "PATCH",
            "/api/v1/nodes/node-1?fieldManager=rewarm-node",
            f"Bearer {api.token}",
            "application/merge-patch+json",
            {"metadata": {"labels": {LABEL: "true"}}},
        )
        assert api.asked[0] == wanted
        assert machine.read(SETTINGS).endswith("deadline: 30\n")
        assert machine.run("/usr/local/bin/rewarm", "doctor").count("failed") == 0
        assert 'BinaryName = "/opt/rewarm/bin/rewarm-runc"' in machine.read("/etc/containerd/config.toml")
        assert machine.read("/run/systemctl.log").count("restart containerd") == 1
        venv = machine.run("readlink", "/opt/rewarm/venv")

        api.asked.clear()
        machine.run("rm", "/opt/rewarm/libexec/rewarm-guard")
        pod.wait_for("verify the node: installation:")
        pod.wait_until(lambda: None in patches(api), "the label removed")
        pod.wait_for("node-1: installed and verified", times=2)
        assert api.labels[LABEL] == "true"
        assert machine.run("readlink", "/opt/rewarm/venv") == venv
        assert machine.read("/run/systemctl.log").count("restart containerd") == 1
        assert pod.stop() == 0
        assert "the node stays as it is" in pod.log()
    assert api.labels[LABEL] == "true"
    assert machine.exists("/opt/rewarm/bin/rewarm-runc")

    machine.run("mkdir", "-p", "/run/rewarm/containers/run-runc/left")  # a restored container
    with start(image, machine, api, overlay="overlays/uninstall", name="uninstall") as pod:
        pod.wait_for("these still need the runtime")
        assert LABEL not in api.labels and not pod.ready()
        assert machine.exists("/opt/rewarm/bin/rewarm-runc")
        machine.run("rmdir", "/run/rewarm/containers/run-runc/left")
        pod.wait_for("node-1: uninstalled")
        assert pod.ready()
        assert pod.stop() == 0
    assert not machine.exists("/opt/rewarm") and not machine.exists(SETTINGS)
    assert machine.read("/etc/containerd/config.toml") == before


def test_settings(image: NodeImage, machine: BareNode, api: KubeApi, tmp_path: Path) -> None:
    """Bad ones, and good ones where the node has a file of its own: no label, and the node's file as it was. Then those
    of one ConfigMap after the other, the second of which begins like the first, and of none."""
    settings = tmp_path / "settings"
    settings.mkdir()
    file = settings / "config.yaml"
    file.write_text("deadlin: 30\n")
    with start(image, machine, api, settings=settings) as pod:
        pod.wait_for("unknown key 'deadlin'")
        assert not machine.exists(SETTINGS) and not machine.exists(f"{SETTINGS}.tried")
        machine.write(SETTINGS, "deadline: 20\n")
        file.write_text("deadline: 30\nthreads: 2\n")
        pod.wait_for("the node has one of its own")
        assert machine.read(SETTINGS) == "deadline: 20\n"
        assert LABEL not in api.labels and not pod.ready()
        machine.run("rm", SETTINGS)
        pod.wait_for("node-1: installed and verified")
        assert machine.read(SETTINGS).partition("\n")[2] == "deadline: 30\nthreads: 2\n"
    file.write_text("deadline: 30\n")
    machine.run("mount", "--bind", SETTINGS, SETTINGS)
    with start(image, machine, api, settings=settings, name="shorter") as pod:
        pod.wait_for(f"write {SETTINGS} on the node: mv: exit status 1")
        assert not machine.exists(f"{SETTINGS}.tried") and not pod.ready()
        machine.run("umount", SETTINGS)
        pod.wait_for("node-1: installed and verified")
        assert machine.read(SETTINGS).partition("\n")[2] == "deadline: 30\n"
    with start(image, machine, api, name="none") as pod:
        pod.wait_for("node-1: installed and verified")
        assert not machine.exists(SETTINGS)


def test_an_api_server_that_refuses(image: NodeImage, machine: BareNode, api: KubeApi) -> None:
    api.refuse = 403
    with start(image, machine, api, overlay="overlays/gpu") as pod:  # privileged, too, it does what it has to
        pod.wait_for("answers 403: nodes is forbidden: told so by the test")
        assert not pod.ready()
        api.refuse = 0
        pod.wait_for("node-1: installed and verified")
        assert api.labels[LABEL] == "true"


def test_another_ca(image: NodeImage, machine: BareNode, api: KubeApi, tmp_path: Path) -> None:
    """A server that the mounted CA has not signed gets no token."""
    with KubeApi(tmp_path / "other", "node-1") as other:
        (api.directory / "ca.crt").write_bytes((other.directory / "ca.crt").read_bytes())
        with start(image, machine, api) as pod:
            pod.wait_for("certificate verify failed")
    assert api.asked == [] and other.asked == []


def test_sigterm_while_it_installs(image: NodeImage, machine: BareNode, api: KubeApi) -> None:
    """It ends at once, and nothing of the install runs on; the next pod installs."""
    own = machine.processes()
    with start(image, machine, api) as pod:
        pod.wait_for("building a virtual environment")
        assert len(machine.processes()) > len(own)
        assert pod.stop() == 0
    assert machine.processes() == own
    with start(image, machine, api, name="next") as pod:
        pod.wait_for("node-1: installed and verified")


def _has(root: Path, pattern: str) -> bool:
    return any(root.glob(pattern))


STEPS: dict[str, Callable[[Path], bool]] = {
    "environment": lambda root: _has(root, "opt/rewarm/venvs/*/lib/python3*/site-packages/*/__init__.py"),
    "programs": lambda root: _has(root, "opt/rewarm/libexec/rewarm-guard"),
    "criu": lambda root: _has(root, "opt/rewarm/criu/root.*"),
    "registered": lambda root: "rewarm" in (root / "etc/containerd/config.toml").read_text(),
    "restart": lambda root: "restart containerd" in (root / "run/systemctl.log").read_text(),
}
"""What is to be seen of the node when a step of the install has begun."""


@pytest.mark.parametrize("step", STEPS)
def test_killed_while_it_installs(image: NodeImage, machine: BareNode, api: KubeApi, step: str) -> None:
    """All that the pod runs on the node dies in the middle of a step. The next pod ends well, and all can be undone."""
    machine.write("/run/systemctl.log", "")
    before = machine.changed()
    with start(image, machine, api) as pod:
        wait_for(step, lambda: STEPS[step](machine.root), interval=0.002)
        pod.kill(machine)
    assert LABEL not in api.labels
    with start(image, machine, api, name="next") as pod:
        pod.wait_for("node-1: installed and verified")
        assert api.labels[LABEL] == "true"
        assert machine.run("/opt/rewarm/bin/rewarm", "doctor", "--node").count("runs with it") == 1
        assert machine.read("/etc/containerd/config.toml").count("BEGIN rewarm") == 1
        assert pod.stop() == 0
    machine.run("/opt/rewarm/share/rewarm/uninstall.sh")
    assert machine.changed() == before


@pytest.fixture
def volume(nothing_left_behind: None, tmp_path: Path) -> Iterator[Path]:
    """A file system that the kubelet has mounted on the node: the machine's namespace is made with it."""
    directory = tmp_path / "volume"
    directory.mkdir()
    command("mount", "-t", "tmpfs", "-o", "size=16m", "rewarm-test", directory)
    try:
        directory.joinpath("mark").write_text("shared\n")
        yield directory
    finally:
        command("umount", directory)


def test_a_volume_becomes_the_store(
    volume: Path, image: NodeImage, machine: BareNode, api: KubeApi, tmp_path: Path
) -> None:
    """What the kubelet mounted is bound to where the settings say, once, and outlives the pod."""
    (given,) = (item for item in manifests.build("overlays/claim") if item["kind"] == "ConfigMap")
    settings = tmp_path / "settings"
    settings.mkdir()
    settings.joinpath("config.yaml").write_text(given["data"]["config.yaml"])
    place = "/var/lib/rewarm/shared"
    with start(image, machine, api, overlay="overlays/claim", settings=settings, name="bare") as pod:
        pod.wait_for("the pod has no volume at /store")
    machine.run("mkdir", "-p", place)
    machine.run("mount", "-t", "tmpfs", "other", place)

    def with_volume(*more: str, name: str) -> RunningPod:
        volumes = {"/store": volume}
        return start(
            image, machine, api, *more, overlay="overlays/claim", settings=settings, volumes=volumes, name=name
        )

    with with_volume(name="first") as pod:
        pod.wait_for(f"{place} of the node has another mount; run there: umount {place}")
        assert LABEL not in api.labels
        machine.run("umount", place)
        pod.wait_for("node-1: installed and verified")
    assert machine.read(f"{place}/mark") == "shared\n"
    checks = json.loads(machine.run("/opt/rewarm/bin/rewarm", "doctor", "--json"))["checks"]
    (store,) = (check for check in checks if check["name"] == "store")
    assert store["status"] != "failed" and place in store["found"]  # it warns of so little room
    with with_volume(name="again") as pod:
        pod.wait_for("node-1: installed and verified")
    assert machine.read("/proc/self/mountinfo").count(f" {place} ") == 1
    with with_volume("--uninstall", name="uninstall") as pod:
        pod.wait_for("node-1: uninstalled")
    assert machine.read("/proc/self/mountinfo").count(f" {place} ") == 0
    assert volume.joinpath("mark").exists()


def test_outside_of_a_node(image: NodeImage, machine: BareNode, api: KubeApi) -> None:
    """Without hostPID process 1 is the pod's own."""
    pod_spec = {**pod_of("base"), "hostPID": False}
    volumes = {ACCOUNT: api.directory}
    env = {**api.environment, "NODE_NAME": "node-1"}
    with image.start(pod_spec, "--interval=2", env=env, volumes=volumes, name="alone") as pod:
        pod.wait_for("it is the pod's own; set hostPID")
    assert LABEL not in api.labels
