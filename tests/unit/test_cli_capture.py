"""rewarm capture: what it asks for, what it prints, and signals."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from rewarm.capture import Captured
from rewarm.cli import capture as capture_command
from rewarm.errors import CaptureError
from rewarm.oci import pod
from rewarm.oci.runc import Container
from rewarm.settings import Settings
from rewarm.store.directory import DirectoryStore
from support.cli import call, filled_store, newest, on, one_line
from support.snapshots import MIB


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return filled_store(tmp_path)


def container(**changed: object) -> Container:
    fields: dict[str, object] = {
        "root": "/run/runc",
        "id": "c1",
        "pid": 1,
        "start_time": 1,
        "bundle": "/b",
        "rootfs": "/b/rootfs",
        "labels": {},
        "cgroup_paths": ("/sys/fs/cgroup/pids/default/c1",),
        "created": "",
    }
    return Container(**{**fields, **changed})  # type: ignore[arg-type]


CONTAINERD = {"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-namespace": "team"}
CRIO = {"io.kubernetes.cri-o.ContainerType": "container", "io.kubernetes.pod.namespace": "team"}


@pytest.mark.parametrize("labels", [CONTAINERD, CRIO], ids=["containerd", "crio"])
def test_the_snapshot_is_in_the_namespace_where_a_restore_looks(labels: dict[str, str]) -> None:
    assert capture_command.pod_namespace(container()) == "default"
    assert capture_command.pod_namespace(container(labels=labels)) == "team" == pod.namespace({"annotations": labels})


def test_a_pod_cannot_choose_another_namespace() -> None:
    """CRI-O hands on what a pod has annotated in containerd's words."""
    made_up = {**CRIO, "io.kubernetes.cri.sandbox-namespace": "victim"}
    assert capture_command.pod_namespace(container(labels=made_up)) == "team"
    with pytest.raises(CaptureError, match=r"find the namespace of container c1: .*no engine writes both; name the"):
        capture_command.pod_namespace(container(labels={**made_up, **CONTAINERD}))


def test_by_systemd() -> None:
    assert not capture_command.by_systemd(container())
    assert not capture_command.by_systemd(container(cgroup_paths=("/sys/fs/cgroup/a.scope/c1",)))
    scope = "/sys/fs/cgroup/kubepods.slice/kubepods-pod1.slice/cri-containerd-c1.scope"
    assert capture_command.by_systemd(container(cgroup_paths=(scope,)))


@pytest.mark.parametrize("name", ["a/b", "../a", "..", "n" * 300, "", "-n", ".hidden"])
def test_capture_under_a_bad_name(name: str, tmp_path: Path) -> None:
    said = one_line(call("capture", "c1", f"--name={name}", "--root", str(tmp_path)))
    assert said.startswith("rewarm: use snapshot name") and len(said) < 250


def test_capture_of_what_is_not_there(tmp_path: Path) -> None:
    said = one_line(call("capture", "c1", "--name", "model", "--root", str(tmp_path)))
    assert said.startswith("rewarm: find container c1: no such container")
    assert "is not a container id" in one_line(call("capture", "../c1", "--name", "model", "--root", str(tmp_path)))


def runc_state(root: Path, id: str, labels: list[str]) -> None:
    (root / id).mkdir(parents=True)
    state = {
        "id": id,
        "init_process_pid": os.getpid(),
        "init_process_start": 1,
        "config": {"rootfs": "/r", "labels": labels},
        "cgroup_paths": {"": "/sys/fs/cgroup/system.slice/runc-c1.scope"},
    }
    (root / id / "state.json").write_text(json.dumps(state))


@pytest.fixture
def captured(store: DirectoryStore, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """rewarm.capture.capture replaced by one that keeps what it was called with."""
    calls: list[dict[str, object]] = []

    def fake(found: Container, namespace: str, name: str, settings: Settings, **rest: object) -> Captured:
        step = rest.pop("step")
        assert callable(step)
        step("dumping memory")
        calls.append({"id": found.id, "namespace": namespace, "name": name, "store": settings.store, **rest})
        ref = newest(store)
        return Captured(ref, store.load(ref), 0.8444, 65.2, 5 * MIB, 3 * MIB, ("a note",))

    monkeypatch.setattr("rewarm.capture.capture", fake)
    return calls


def test_capture(store: DirectoryStore, captured: list[dict[str, object]], tmp_path: Path) -> None:
    root = tmp_path / "roo[t]"
    runc_state(root, "container-one", ["io.kubernetes.cri.sandbox-namespace=team", "bundle=/b"])
    result = on(store, "capture", "container-o", "--name", "model", "--root", str(root))
    assert result.exit_code == 0, result.output
    assert captured == [
        {
            "id": "container-one",
            "namespace": "team",
            "name": "model",
            "store": str(store.root),
            "stop": False,
            "systemd_cgroup": True,
        }
    ]
    assert result.stdout.startswith(f"captured {newest(store)}\n")
    assert "paused for 0.84 s" in result.stdout and "1 min 5 s" in result.stdout
    assert result.stderr == "rewarm: a note\n"


def test_capture_json(store: DirectoryStore, captured: list[dict[str, object]], tmp_path: Path) -> None:
    runc_state(tmp_path / "root", "c1", [])
    words = ["capture", "c1", "--name", "model", "--namespace", "mine", "--stop", "--root", str(tmp_path / "root")]
    document = json.loads(on(store, *words, "--json").stdout)
    assert (captured[0]["stop"], captured[0]["namespace"]) == (True, "mine")
    assert document["id"] == newest(store).id and document["stopped"] is True
    assert (document["stored_bytes"], document["added_bytes"]) == (5 * MIB, 3 * MIB)
    assert (document["paused_seconds"], document["notes"]) == (0.844, ["a note"])
    assert "begins with '.'" in one_line(on(store, *words[:5], "..", *words[6:]))


def test_capture_that_fails(
    store: DirectoryStore, captured: list[dict[str, object]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*args: object, **rest: object) -> None:
        raise CaptureError("capture container", "c1", "it is\npaused \x1b[2J", "resume it first")

    runc_state(tmp_path / "root", "c1", [])
    monkeypatch.setattr("rewarm.capture.capture", fail)
    result = on(store, "capture", "c1", "--name", "model", "--root", str(tmp_path / "root"))
    assert one_line(result) == "rewarm: capture container c1: it is paused \\x1b[2J; resume it first\n"


def test_a_signal_during_the_dump_waits_for_its_end(capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with capture_command.interruptible() as proceed:
        proceed("dumping memory")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)  # it came, and this goes on
        with pytest.raises(KeyboardInterrupt):
            proceed("recording files")
    assert signal.getsignal(signal.SIGTERM) is before
    assert "when it is done with dumping memory" in capfd.readouterr().err


def test_a_signal_elsewhere_ends_the_capture_at_once() -> None:
    with capture_command.interruptible() as proceed:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        proceed("dumping memory")
        proceed("recording files")
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGHUP)
