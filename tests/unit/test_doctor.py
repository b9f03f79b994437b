"""The checks of `rewarm doctor` together, those of settings and containerd, and the command."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from rewarm import cli, deadline, doctor, doctor_containerd
from rewarm.checks import FAILED, OK, WARNING, Check, Node
from rewarm.errors import OciError, RewarmError
from rewarm.settings import Settings
from support.cli import as_process, environment
from support.nodes import containerd_config, killed_restore, program, says, well, with_settings


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return well(tmp_path)


# All of it


def test_every_check_says_what_it_found(node: Node) -> None:
    found = list(doctor.examine(node))
    assert [check.name for check in found] == [name for name, _ in doctor.CHECKS]
    for check in found:
        assert check.found and bool(check.mend) == (check.status != OK), check
        assert "\n" not in check.found + check.mend
    assert [check for check in found if check.status == FAILED] == []


def test_a_check_that_cannot_look_is_a_failed_one(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(node: Node) -> Check:
        raise OciError("find", "it", "it hides", "seek it")

    def break_down(node: Node) -> Check:
        raise PermissionError(13, "Permission denied", "/somewhere")

    monkeypatch.setattr(doctor, "CHECKS", (("one", refuse), ("two", break_down), ("three", doctor.check_settings)))
    one, two, three = doctor.examine(node)
    assert one == Check("one", FAILED, "find it: it hides", "seek it")
    assert (two.status, two.found, three.status) == (FAILED, "/somewhere: Permission denied", OK)


def test_checks_change_nothing(node: Node, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    list(doctor.examine(node))
    assert sorted(tmp_path.rglob("*")) == before


# Settings


def test_settings(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("deadline: 5\n")
    file.chmod(0o600)
    node = doctor.look(file, "/elsewhere")
    assert (node.settings.deadline, node.settings.store, node.settings_file) == (5.0, "/elsewhere", str(file))
    says(doctor.check_settings(node), OK, str(file))
    file.write_text("deadline: soon\n")
    node = doctor.look(file)
    says(doctor.check_settings(node), FAILED, "deadline has the bad value 'soon'")
    assert node.settings == Settings(), "the other checks go on with the defaults"
    assert "nothing was undone" in doctor.fix(node)[0]


def test_a_deadline_for_which_the_kubelet_does_not_wait(node: Node) -> None:
    """Whatever hangs, `create` has to have answered by then: by default, it does."""
    says(doctor.check_settings(with_settings(node, deadline=65)), OK)
    found = doctor.check_settings(with_settings(node, deadline=66))
    says(found, WARNING, "after 121 s", "runtimeRequestTimeout", "set it to 65 at most")
    assert deadline.latest(Settings().deadline) < deadline.KUBELET == 120


def test_settings_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWARM_CONFIG", str(tmp_path / "none"))
    says(doctor.check_settings(doctor.look()), OK, "the defaults", str(tmp_path / "none"))


# containerd


@pytest.fixture
def containerd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a containerd into PATH, alone, that runs this script."""

    def install(script: str) -> None:
        program(tmp_path / "path" / "containerd", script)

    (tmp_path / "path").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    return install


def test_without_containerd(node: Node, containerd: Callable[[str], None]) -> None:
    Path(node.containerd_config).unlink()
    says(doctor_containerd.containerd(node), OK, "not on this node")
    containerd("exit 0")
    says(doctor_containerd.containerd(node), WARNING, "there is no", "install.sh")


@pytest.mark.parametrize("plugin", ["io.containerd.grpc.v1.cri", "io.containerd.cri.v1.runtime"])
def test_registered(node: Node, containerd: Callable[[str], None], plugin: str, tmp_path: Path) -> None:
    Path(node.containerd_config).write_text(containerd_config(node.launcher, plugin=plugin))
    says(doctor_containerd.containerd(node), OK, "runtime rewarm", node.launcher)
    (tmp_path / "link").symlink_to(node.launcher)
    Path(node.containerd_config).write_text(containerd_config(str(tmp_path / "link"), plugin=plugin))
    says(doctor_containerd.containerd(node), WARNING, "no runtime")
    (tmp_path / "rewarm-runc").symlink_to(node.launcher)
    Path(node.containerd_config).write_text(containerd_config(str(tmp_path / "rewarm-runc"), plugin=plugin))
    says(doctor_containerd.containerd(node), OK)


def test_registered_as_containerd_itself_says(node: Node, containerd: Callable[[str], None], tmp_path: Path) -> None:
    dump = tmp_path / "dump.toml"
    dump.write_text(Path(node.containerd_config).read_text())
    Path(node.containerd_config).write_text('version = 2\nimports = ["/etc/containerd/conf.d/*.toml"]\n')
    containerd(
        f'test "$*" = "--config {node.containerd_config} config dump" && while read -r l; do echo "$l"; done < {dump}'
    )
    says(doctor_containerd.containerd(node), OK, "runtime rewarm")
    containerd("echo containerd: bad config; exit 1")
    says(doctor_containerd.containerd(node), WARNING, "containerd: bad config")


def test_not_registered(node: Node, containerd: Callable[[str], None]) -> None:
    config = Path(node.containerd_config)
    config.write_text("version = 2\n")
    says(doctor_containerd.containerd(node), WARNING, "it has none")
    config.write_text(containerd_config("/usr/bin/runc"))
    says(doctor_containerd.containerd(node), WARNING, "runc, rewarm")
    config.write_text(containerd_config("/elsewhere/bin/rewarm-runc"))
    says(doctor_containerd.containerd(node), WARNING, "/elsewhere/bin/rewarm-runc")
    config.write_text(containerd_config(node.launcher, annotations=""))
    says(doctor_containerd.containerd(node), WARNING, "annotations of pods", "pod_annotations")
    config.write_text("version = [")
    says(doctor_containerd.containerd(node), WARNING, "cannot be understood")
    config.write_text('version = 2\ndisabled_plugins = ["cri"]\n')
    says(doctor_containerd.containerd(node), OK, "CRI plugin is disabled")


# The command


@pytest.fixture
def command(node: Node, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    def call(*words: str) -> tuple[int, str, str]:
        result = CliRunner().invoke(cli.main, ["doctor", *words], prog_name="rewarm")
        return result.exit_code, result.stdout, result.stderr

    monkeypatch.setattr(doctor, "look", lambda config, store: node)
    return call


def test_command(command: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    found = (Check("one", OK, "fine"), Check("two", WARNING, "slow\x1b", "hurry"))
    monkeypatch.setattr(doctor, "examine", lambda node: iter(found))
    status, said, _ = command()
    assert status == 0, "a warning is no failure"
    assert [line.split() for line in said.splitlines()] == [
        ["ok", "one", "fine"],
        ["warning", "two", "slow\\x1b"],
        ["mend:", "hurry"],
    ]
    monkeypatch.setattr(doctor, "examine", lambda node: iter([*found, Check("three", FAILED, "gone", "bring it")]))
    status, said, _ = command("--json")
    assert status == 1
    document = json.loads(said)
    assert document["ok"] is False
    assert document["checks"][2] == {"name": "three", "status": "failed", "found": "gone", "mend": "bring it"}


def test_command_fix(command: Callable[..., tuple[int, str, str]], node: Node, tmp_path: Path) -> None:
    path = killed_restore(node, tmp_path)
    status, said, complaints = command("--fix", "--json")
    assert not complaints and not os.path.exists(path)
    left = next(check for check in json.loads(said)["checks"] if check["name"] == "left-overs")
    assert left["status"] == OK
    Path(killed_restore(node, tmp_path), "record.json").write_text("{")
    status, _, complaints = command("--fix")
    assert status == 1 and complaints.startswith("rewarm: read record")


def test_command_as_a_process(tmp_path: Path) -> None:
    words = as_process("doctor", "--json", "--store", str(tmp_path))
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd="/", env=environment())
    document = json.loads(done.stdout)
    assert not done.stderr and done.returncode == (0 if document["ok"] else 1)
    assert len(document["checks"]) == len(doctor.CHECKS)


def test_fix_without_a_runtime_is_an_error_of_one_line(node: Node) -> None:
    with pytest.raises(RewarmError, match="none of them is in PATH"):
        doctor.fix(with_settings(node, runtimes=("no-such-runc",)))
