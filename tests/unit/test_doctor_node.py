"""`rewarm doctor --node`: each engine well and unwell by its files. Real engines answer in test_install_engines.py."""

from __future__ import annotations

import json
import os
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from rewarm import cli, doctor, doctor_engines, doctor_node
from rewarm.checks import FAILED, OK, WARNING, Check, Node
from support.nodes import containerd_config, program, says, well
from support.proc import wait_for


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Node:
    """A node with no engine but those that a test records."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    none = tuple(replace(engine, config=str(tmp_path / "none")) for engine in doctor_node.ENGINES)
    monkeypatch.setattr(doctor_node, "ENGINES", none)
    return well(tmp_path)


def record(node: Node, **engines: Path) -> None:
    state = Path(node.install_state)
    state.mkdir(parents=True, exist_ok=True)
    places = {name: {"config": str(path), "program": "", "files": [str(path)]} for name, path in engines.items()}
    (state / doctor_node.RECORD).write_text(json.dumps(places))


def engine(node: Node, label: str) -> Check:
    return {check.name: check for check in doctor.examine_node(node)}[label]


def test_no_engine_at_all(node: Node) -> None:
    found = list(doctor.examine_node(node))
    assert [check.name for check in found] == ["settings", "runc", "installation", "launcher", "engines"]
    says(found[-1], FAILED, "none of containerd", "--engines")


def test_a_launcher_that_does_not_run(node: Node) -> None:
    says(doctor_node.launcher(node), OK, node.launcher)
    program(Path(node.launcher), "echo no such library; exit 127")
    says(doctor_node.launcher(node), FAILED, "no such library", "install.sh")


def test_an_engine_that_came_later(node: Node, tmp_path: Path) -> None:
    """Without a record the node is as nobody has installed it; with one, somebody has left it out."""
    program(tmp_path / "bin/podman", "exit 1")
    says(engine(node, "Podman"), FAILED, "no runtime rewarm")
    record(node)
    says(engine(node, "Podman"), WARNING, "not told to register", "install.sh")


def test_containerd(node: Node, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    record(node, containerd=config)
    says(engine(node, "containerd"), WARNING, "runtime rewarm", "containerd does not run", "systemctl start")
    config.write_text(containerd_config("/elsewhere/rewarm-runc"))
    says(engine(node, "containerd"), FAILED, "/elsewhere/rewarm-runc")
    config.write_text(containerd_config(node.launcher, '"other/*"'))
    says(engine(node, "containerd"), FAILED, "annotations of pods")
    config.write_text('disabled_plugins = ["cri"]\n')
    says(engine(node, "containerd"), OK, "CRI plugin is disabled")
    config.unlink()
    says(engine(node, "containerd"), FAILED, "there is no")


def test_a_daemon_and_its_configuration(node: Node) -> None:
    placed = replace(doctor_node.ENGINES[0], config="/srv/c.toml")
    for words in (
        ["--config", "/srv/c.toml"],
        ["-c=/srv/c.toml"],
        ["-l=debug", "--config=/srv/../srv/c.toml"],
    ):
        assert doctor_node._reads(["containerd", *words], placed)
    for words in (["--config", "/etc/c.toml"], [], ["--config"]):
        assert not doctor_node._reads(["containerd", *words], placed)
    assert doctor_node._reads(["containerd"], doctor_node.ENGINES[0]), "its own file needs no option"


def test_a_daemon_with_files_of_its_own(tmp_path: Path) -> None:
    """As kind's node on a developer's machine: its configuration has the same name, in another mount namespace."""
    config = tmp_path / "config.toml"
    config.write_text("")
    for hide, seen in (("true", True), (f"mount -t tmpfs tmpfs {tmp_path}; touch {config}", False)):
        words = ["unshare", "--mount", "sh", "-c", f"{hide}; echo; exec sleep 60"]
        with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            try:
                assert doctor_node._sees(str(process.pid), str(config)) == seen
            finally:
                process.kill()
    assert not doctor_node._sees(str(process.pid), str(config)), "it has ended"


def test_a_file_from_the_future(node: Node, tmp_path: Path) -> None:
    """The clock was set back since: no restart would be later than that, so a restart alone is no way to mend it."""
    config = tmp_path / "config.toml"
    config.write_text(containerd_config(node.launcher))
    daemon = program(tmp_path / "containerd", "read -r line")
    record(node, containerd=config)
    with subprocess.Popen([daemon, "--config", config], stdin=subprocess.PIPE) as running:
        wait_for("the daemon's name", lambda: Path(f"/proc/{running.pid}/comm").read_text() == "containerd\n")
        os.utime(config, (0, 0))
        says(engine(node, "containerd"), OK, "containerd runs with it")
        os.utime(config, (time.time() + 3600,) * 2)
        says(engine(node, "containerd"), FAILED, "was started before", f"run touch {config}, then")
        later = time.time() + 0.1
        wait_for("a later time, by coarse clocks too", lambda: time.time() > later)
        os.utime(config)
        found = engine(node, "containerd")
        says(found, FAILED, "was started before", "make it known")
        assert "touch" not in found.mend
        assert running.stdin is not None
        running.stdin.close()


def crio_file(binary: str, **more: Any) -> str:
    lines = [f"{key} = {json.dumps(value)}" for key, value in {"runtime_path": binary, **more}.items()]
    return "[crio.runtime.runtimes.rewarm]\n" + "\n".join(lines) + "\n"


def test_crio(node: Node, tmp_path: Path) -> None:
    config = tmp_path / "99-rewarm.conf"
    says(doctor_engines.crio(node, str(config)), FAILED, "there is no")
    config.write_text(crio_file(node.launcher, allowed_annotations=["io.kubernetes.cri-o.Devices"]))
    says(doctor_engines.crio(node, str(config)), OK, node.launcher)
    record(node, crio=config)
    says(engine(node, "CRI-O"), WARNING, "crio does not run")
    config.write_text(crio_file(node.launcher, allowed_annotations=["rewarm.dev/*"]))
    says(engine(node, "CRI-O"), FAILED, "CRI-O ignores such a handler", "take it out")
    for text, message in (
        (crio_file("/elsewhere"), "is /elsewhere"),
        ("[crio]\nruntime = 1\n", "has no handler rewarm"),
        ("[crio\n", "cannot be understood"),
    ):
        config.write_text(text)
        says(doctor_engines.crio(node, str(config)), FAILED, message)


def test_docker(node: Node, tmp_path: Path) -> None:
    config = tmp_path / "daemon.json"
    settings = {"runtimes": {"rewarm": {"path": node.launcher}}, "hosts": [f"unix://{tmp_path / 'none.sock'}"]}
    says(doctor_engines.docker(node, str(config)), FAILED, "there is no")
    config.write_text(json.dumps(settings))
    record(node, docker=config)
    says(engine(node, "Docker"), WARNING, "dockerd does not answer", "systemctl start docker")
    for text, message in (
        ("{", "is not valid JSON"),
        ("[]", "has no runtime rewarm"),
        ('{"runtimes": {"rewarm": {"path": "/elsewhere"}}}', "is /elsewhere"),
    ):
        config.write_text(text)
        says(doctor_engines.docker(node, str(config)), FAILED, message)


def test_podman(node: Node, tmp_path: Path) -> None:
    config = tmp_path / "rewarm.conf"
    config.write_text(f'[engine.runtimes]\nrewarm = ["{node.launcher}"]\n')
    record(node, podman=config)
    says(engine(node, "Podman"), OK, node.launcher)
    for script, status, message in (
        (f"echo {node.launcher}", OK, "says podman"),
        ("echo /usr/bin/else", FAILED, "podman takes /usr/bin/else"),
        ("echo no storage; exit 125", WARNING, "no storage"),
        ("echo 'default OCI runtime \"rewarm\" not found: invalid argument'; exit 125", FAILED, "not found"),
    ):
        says(doctor_engines.podman(node, str(config), program(tmp_path / "podman", script)), status, message)
    for text, message in (("[engine]\n", "has no runtime"), ("[engine\n", "cannot be understood")):
        config.write_text(text)
        says(doctor_engines.podman(node, str(config), ""), FAILED, message)


def test_a_launcher_that_stopped_to_run(node: Node, tmp_path: Path) -> None:
    config = tmp_path / "rewarm.conf"
    config.write_text(f'[engine.runtimes]\nrewarm = ["{node.launcher}"]\n')
    program(Path(node.launcher), "echo no such library; exit 127")
    says(doctor_engines.podman(node, str(config), ""), FAILED, "which does not run: no such library")


def test_a_record_that_is_no_record(node: Node) -> None:
    state = Path(node.install_state)
    state.mkdir(parents=True)
    for text in ("{", "[]", '{"docker": 7}'):
        (state / doctor_node.RECORD).write_text(text)
        says(engine(node, "engines"), FAILED, "none of")


def test_command(node: Node, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "look", lambda config, store: node)
    config = tmp_path / "rewarm.conf"
    record(node, podman=config)
    done = CliRunner().invoke(cli.main, ["doctor", "--node", "--json"])
    document = json.loads(done.stdout)
    assert (done.exit_code, document["ok"]) == (1, False)
    assert document["checks"][-1] | {"found": ""} == {
        "name": "Podman",
        "status": "failed",
        "found": "",
        "mend": "run install/install.sh again",
    }
    config.write_text(f'[engine.runtimes]\nrewarm = ["{node.launcher}"]\n')
    done = CliRunner().invoke(cli.main, ["doctor", "--node"])
    assert done.exit_code == 0, done.stdout
    assert "Podman" in done.stdout
