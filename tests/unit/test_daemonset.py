"""The parts of the DaemonSet's program alone; tests/integration/test_daemonset.py runs all of it."""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import daemonset
from daemonset_host import Host, Problem, Stopped, mounts
from daemonset_label import LABEL, NodeLabel
from daemonset_store import SharedStore
from daemonset_verdict import Check, checks_of, unwell
from support.kube_api import Asked, KubeApi
from support.proc import command


@pytest.fixture
def api(tmp_path: Path) -> Iterator[KubeApi]:
    with KubeApi(tmp_path / "account", "node-1") as one:
        yield one


def label(api: KubeApi, node: str = "node-1", host: str = "127.0.0.1") -> NodeLabel:
    return NodeLabel(node, (host, api.port), api.directory)


def test_label(api: KubeApi) -> None:
    label(api).remove()
    label(api).set()
    label(api).set()
    assert api.labels == {LABEL: "true"}
    label(api).remove()
    assert api.labels == {}


@pytest.mark.parametrize("name", ["", "../secrets", "a/b", "Node", "node-1?x=", "node-1 ", "-a", "a" * 254])
def test_names_of_nodes(api: KubeApi, name: str) -> None:
    with pytest.raises(Problem, match="no node's name; set NODE_NAME"):
        label(api, name)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((200, {"kind": "Node", "metadata": {"labels": {}}}), "it is None afterwards"),
        ((200, {"kind": "Node", "metadata": {}}), "it is None afterwards"),
        ((200, {"kind": "Node", "metadata": {"labels": {LABEL: "false"}}}), "it is 'false' afterwards"),
        ((200, ["no node"]), "is not a node"),
        ((409, {"message": "the object\nhas been modified"}), "answers 409: the object has been modified"),
        ((500, "what"), 'answers 500: "what"'),
        ((301, {}), "answers 301"),
    ],
)
def test_answers(api: KubeApi, monkeypatch: pytest.MonkeyPatch, answer: tuple[int, Any], message: str) -> None:
    def answers(asked: Asked) -> tuple[int, Any]:
        return answer

    monkeypatch.setattr(api, "answer", answers)
    with pytest.raises(Problem) as caught:
        label(api).set()
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"set the label {LABEL} of node node-1: ")


def test_the_token_is_read_anew(api: KubeApi) -> None:
    """The kubelet renews it."""
    one = label(api)
    one.set()
    api.token = "new"
    with pytest.raises(Problem, match="answers 401: Unauthorized"):
        one.set()
    api.directory.joinpath("token").write_text("new")
    one.set()


def test_a_name_that_is_not_the_servers(api: KubeApi) -> None:
    with pytest.raises(Problem, match="certificate verify failed"):
        label(api, host="localhost").set()
    assert api.asked == []


def test_no_server_and_no_token(api: KubeApi) -> None:
    with pytest.raises(Problem, match="refused"):
        NodeLabel("node-1", ("127.0.0.1", 1), api.directory).set()
    api.directory.joinpath("token").unlink()
    with pytest.raises(Problem, match="No such file"):
        label(api).set()


@pytest.fixture
def host() -> Iterator[Host]:
    """Another mount namespace."""
    words = ["unshare", "--mount", "sh", "-c", "echo; exec sleep 60"]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield Host(process.pid)
        finally:
            process.kill()


def test_commands_and_files(host: Host, tmp_path: Path) -> None:
    host.check()
    assert host.run("sh", "-c", "echo out; exit 3", timeout=10, capture=True) == (3, "out\n")
    path = f"{tmp_path}/a directory/file"
    assert host.read(path) is None
    host.write(path, b"text\n\n")
    assert host.read(path) == b"text\n\n"
    host.write(path, b"")
    assert host.read(path) == b""
    assert [each.name for each in Path(path).parent.iterdir()] == ["file"]
    assert Path(path).stat().st_mode & 0o777 == 0o644
    with pytest.raises(Problem, match="write /proc/nowhere/file on the node"):
        host.write("/proc/nowhere/file", b"")


def test_a_command_that_hangs(host: Host, tmp_path: Path) -> None:
    """It ends, and what it started with it."""
    note = tmp_path / "pid"
    with pytest.raises(Problem, match="run sh on the node: not done within 1 s"):
        host.run("sh", "-c", f"sleep 61 & echo $! >{note}; wait", timeout=1)
    pid = int(note.read_text())
    deadline = time.monotonic() + 5
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_process_that_is_none_of_the_nodes() -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        with pytest.raises(Problem, match="set hostPID"):
            Host(process.pid).check()
        process.kill()
    with pytest.raises(Problem, match="No such file"):
        Host(process.pid).check()


def test_mountinfo(tmp_path: Path) -> None:
    file = tmp_path / "mountinfo"
    file.write_text(
        "22 1 0:20 / /proc rw - proc proc rw\n31 22 0:45 /a\\040b /with\\040space\\134 rw shared:1 - nfs4 s:/x rw\n"
    )
    assert [one[1:] for one in mounts(file)] == [("0:20", "/", "/proc"), ("0:45", "/a b", "/with space\\")]


def device_of(mounted: Path) -> str:
    return next(one.device for one in mounts(Path("/proc/self/mountinfo")) if one.point == str(mounted))


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[Path]:
    """A file system of the node, whose namespace is made with it."""
    directory = tmp_path / "volume"
    directory.mkdir()
    command("mount", "-t", "tmpfs", "-o", "size=1m", "rewarm-test", directory)
    try:
        directory.joinpath("claims/one").mkdir(parents=True)
        directory.joinpath("claims/one/mark").write_text("")
        yield directory
    finally:
        command("umount", directory)


def test_a_volume_that_is_a_directory(volume: Path, host: Host, tmp_path: Path) -> None:
    """As the volumes of a cluster of one node are: no mount of the node begins there."""
    device = device_of(volume)
    own = tmp_path / "mountinfo"
    target = f"{tmp_path}/target"
    store = SharedStore(host, Path("/store"), target, own, f"{tmp_path}/note")
    own.write_text(f"1 1 {device} /claims/one /store rw - tmpfs x rw\n")
    store.provide()
    store.provide()
    assert host.run("ls", target, timeout=10, capture=True) == (0, "mark\n")
    assert [one.root for one in host.mounts() if one.point == target] == ["/claims/one"]
    store.remove()
    store.remove()
    assert host.run("ls", target, timeout=10, capture=True) == (0, "")
    own.write_text(f"1 1 {device} /claims/three /store rw - tmpfs x rw\n")
    with pytest.raises(Problem, match="exit status 32"):
        store.provide()
    own.write_text("1 1 9999:1 / /store rw - nfs x rw\n")
    with pytest.raises(Problem, match="no mount of what the pod has at /store"):
        store.provide()


def test_a_volume_in_place_of_another(volume: Path, host: Host, tmp_path: Path) -> None:
    """What the DaemonSet has bound it knows again, whatever volume its pod has now; others' mounts stay."""
    volume.joinpath("claims/two").mkdir()
    volume.joinpath("claims/two/other").write_text("")
    own, target = tmp_path / "mountinfo", f"{tmp_path}/target"

    def bound(claim: str) -> SharedStore:
        own.write_text(f"1 1 {device_of(volume)} /claims/{claim} /store rw - tmpfs x rw\n")
        return SharedStore(host, Path("/store"), target, own, f"{tmp_path}/note")

    bound("one").provide()
    bound("two").provide()
    assert [one.root for one in host.mounts() if one.point == target] == ["/claims/two"]
    bound("one").remove()
    assert not [one for one in host.mounts() if one.point == target]
    assert not (tmp_path / "note").exists()
    assert host.run("mount", "--bind", f"{volume}/claims/two", target, timeout=10)[0] == 0
    with pytest.raises(Problem, match="has another mount; run there: umount"):
        bound("one").provide()
    bound("one").remove()
    assert [one.root for one in host.mounts() if one.point == target] == ["/claims/two"]
    bound("two").provide()  # as a pod that was killed before it could note it
    bound("one").provide()
    assert [one.root for one in host.mounts() if one.point == target] == ["/claims/one"]
    # One below it is somebody's, whatever was on top.
    volume.joinpath("claims/three").mkdir()
    assert host.run("mount", "--bind", f"{volume}/claims/two", target, timeout=10)[0] == 0
    bound("two").provide()
    (tmp_path / "note").rename(tmp_path / "noted")
    assert host.run("mount", "--bind", f"{volume}/claims/one", target, timeout=10)[0] == 0
    bound("one").provide()
    with pytest.raises(Problem, match="has another mount; run there: umount"):
        bound("three").provide()
    assert [one.root for one in host.mounts() if one.point == target] == ["/claims/one", "/claims/two"]


def test_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Doubled after each failure, up to five minutes; the interval after a success."""
    outcomes = [*"fffffff", "ok", "f", "ok"]
    slept: list[float] = []

    class Keeper:
        def keep(self) -> None:
            if not outcomes:
                raise Stopped
            if outcomes.pop(0) == "f":
                raise Problem("told so by the test")

    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setattr(random, "uniform", lambda low, high: 1.0)
    with pytest.raises(Stopped):
        daemonset.stay(Keeper(), False, 300.0)  # type: ignore[arg-type]
    assert slept == [10, 20, 40, 80, 160, 300, 300, 300, 10, 300]


def check(name: str, status: str, found: str = "found", mend: str = "mend") -> Check:
    return {"name": name, "status": status, "found": found, "mend": mend}


WELL = check("containerd", "ok")
DISABLED = check("containerd", "ok", "its CRI plugin is disabled; ctr takes the runtime by its path, /x")
CRIO = check("CRI-O", "ok")


@pytest.mark.parametrize(
    ("general", "node", "texts"),
    [
        pytest.param([check("cache", "warning")], [WELL, check("Docker", "failed")], [], id="well"),
        pytest.param([check("store", "failed")], [WELL], [], id="the store is away, pods start cold"),
        pytest.param([check("criu", "failed")], [WELL], ["criu: found (mend)"], id="nothing can be restored"),
        pytest.param(
            [check("runc", "failed")], [check("runc", "failed"), WELL], ["runc: found (mend)"], id="said once"
        ),
        pytest.param([], [check("containerd", "failed")], ["containerd: found (mend)"], id="not restarted"),
        pytest.param([], [check("containerd", "warning")], ["containerd: found (mend)"], id="does not run"),
        pytest.param(
            [], [DISABLED, check("Docker", "ok")], ["containerd: its CRI plugin is disabled"], id="cri-dockerd"
        ),
        pytest.param([], [DISABLED, CRIO], [], id="Docker beside CRI-O"),
        pytest.param([check("containerd", "ok", "not on this node")], [CRIO], [], id="CRI-O"),
        pytest.param([check("containerd", "warning")], [check("containerd", "warning"), CRIO], [], id="another unused"),
        pytest.param([], [WELL, check("CRI-O", "warning")], [], id="CRI-O unused"),
        pytest.param([], [WELL, check("CRI-O", "failed")], ["CRI-O: found (mend)"], id="CRI-O broken"),
        pytest.param([], [check("CRI-O", "failed")], ["CRI-O: found (mend)"], id="CRI-O alone, broken"),
        pytest.param([], [check("engines", "failed")], ["neither containerd nor CRI-O"], id="none"),
        pytest.param([], [check("Podman", "ok")], ["neither containerd nor CRI-O"], id="none of a kubelet"),
    ],
)
def test_verdict(general: list[Check], node: list[Check], texts: list[str]) -> None:
    found = unwell(general, node)
    assert len(found) == len(texts) and all(text in one for text, one in zip(texts, found, strict=True)), found


@pytest.mark.parametrize("said", ["", "[]", "{}", '{"checks": [1]}', '{"checks": [{"name": "x"}]}', "null"])
def test_no_answer(said: str) -> None:
    with pytest.raises(Problem, match=r"rewarm doctor --node has no answer \(exit status 7\)"):
        checks_of("rewarm doctor --node", 7, said)
