"""install/register.py and the settings, in which it notes what the runc runtimes of the node's engines run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rewarm.settings import Settings, load
from support.registering import BINARY, Registering, at, content, without_state, write

CONTAINERD = """\
version = 2
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
"""


def with_custom_runc(directory: Path, name: str, said: str = "runc version 1.1.5") -> tuple[Registering, Path, str]:
    program = write(directory / name, f"#!/bin/sh\necho {said}\n")
    program.chmod(0o755)
    one = at(directory, "containerd")
    write(one.config, CONTAINERD + f'  options = {{ BinaryName = "{program}" }}\n')
    return one, directory / "etc/rewarm/config.yaml", str(program)


def noted(one: Registering, settings: Path) -> subprocess.CompletedProcess[str]:
    words = ("--binary", BINARY, "--settings", str(settings), "--python", sys.executable)
    return one.run("register", *words, f"containerd={one.config}")


@pytest.mark.parametrize("text", [None, "deadline: 60", "# nothing\n"])
def test_a_custom_runc_goes_into_the_settings(tmp_path: Path, text: str | None) -> None:
    one, settings, program = with_custom_runc(tmp_path, "custom-runc")
    if text is not None:
        write(settings, text)
    before = content(tmp_path)
    done = noted(one, settings)
    assert done.stdout == "settings changed\ncontainerd changed\n", done.stderr
    assert f"runs {program}: so does rewarm" in done.stderr
    assert load(settings).runtimes == (program,)
    assert load(settings).deadline == (60 if text == "deadline: 60" else Settings().deadline)
    assert noted(one, settings).stdout == "settings unchanged\ncontainerd unchanged\n"
    assert one.run("unregister").returncode == 0
    assert without_state(tmp_path) == before


def test_settings_of_the_users_own_stand(tmp_path: Path) -> None:
    one, settings, program = with_custom_runc(tmp_path, "custom-runc")
    write(settings, "runtimes: [runc]\n")
    done = noted(one, settings)
    assert done.stdout == "settings unchanged\ncontainerd changed\n"
    assert f"put {program} first there" in done.stderr
    assert settings.read_text() == "runtimes: [runc]\n"


def test_settings_that_cannot_be_extended(tmp_path: Path) -> None:
    one, settings, program = with_custom_runc(tmp_path, "custom-runc")
    write(settings, "{deadline: 60}\n")
    done = noted(one, settings)
    assert done.returncode == 1
    assert f"add 'runtimes: [\"{program}\"]' there by hand" in done.stderr
    assert settings.read_text() == "{deadline: 60}\n"


@pytest.mark.parametrize(
    ("name", "said", "message"),
    [
        ("crun", "crun version 1.8.1", "runs crun"),
        ("a\u00e9 b", "runc", "does rewarm"),
        ("gone", "", "does not run"),
    ],
)
def test_what_can_stand_below(tmp_path: Path, name: str, said: str, message: str) -> None:
    one, settings, program = with_custom_runc(tmp_path, name, said)
    if name == "gone":
        Path(program).unlink()
    done = noted(one, settings)
    assert message in done.stderr
    assert settings.exists() == (message == "does rewarm")
    assert not settings.exists() or load(settings).runtimes == (program,)


def test_the_note_goes_when_the_node_runs_runc_again(tmp_path: Path) -> None:
    one, settings, program = with_custom_runc(tmp_path, "custom-runc")
    noted(one, settings)
    one.config.write_text(one.config.read_text().replace(f'  options = {{ BinaryName = "{program}" }}\n', ""))
    assert noted(one, settings).stdout == "settings changed\ncontainerd unchanged\n"
    assert not settings.exists()


# The settings stand for all engines


def noted_of(one: Registering, settings: Path, *engines: Registering) -> subprocess.CompletedProcess[str]:
    words = ("--binary", BINARY, "--settings", str(settings), "--python", sys.executable)
    return one.run("register", *words, *(f"{each.engine}={each.config}" for each in engines))


def test_an_engine_that_is_left_out_keeps_its_runc(tmp_path: Path) -> None:
    """It is registered still: plain runc would run below all its pods."""
    one, settings, program = with_custom_runc(tmp_path, "custom-runc")
    docker, podman = at(tmp_path, "docker"), at(tmp_path, "podman")
    noted_of(one, settings, one, docker)
    before = settings.read_bytes()
    done = noted_of(one, settings, docker, podman)
    assert done.stdout == "settings unchanged\ndocker unchanged\npodman changed\n", done.stderr
    assert settings.read_bytes() == before
    assert one.unregister() == "changed"
    assert "settings changed" in noted_of(one, settings, docker).stdout, "nobody runs it any more"
    assert not settings.exists()
    assert program not in (one.state / "engines.json").read_text()


def test_an_engine_that_is_refused_keeps_its_runc(tmp_path: Path) -> None:
    one, settings, program = with_custom_runc(tmp_path, "custom-runc")
    noted(one, settings)
    text = one.config.read_text()
    one.config.write_text("version = \n")
    done = noted(one, settings)
    assert (done.returncode, done.stdout) == (1, "settings unchanged\ncontainerd refused\n")
    assert load(settings).runtimes == (program,)
    one.config.write_text(text)
    assert noted(one, settings).stdout == "settings unchanged\ncontainerd unchanged\n"


def test_a_record_that_does_not_say_what_runc_runs(tmp_path: Path) -> None:
    """An earlier rewarm's: what it noted stays until the engine is registered anew."""
    one, settings, program = with_custom_runc(tmp_path, "custom-runc")
    docker = at(tmp_path, "docker")
    noted(one, settings)
    record = json.loads((one.state / "engines.json").read_text())
    del record["containerd"]["runc"]
    for text in (json.dumps(record), "{"):
        (one.state / "engines.json").write_text(text)
        assert "settings unchanged" in noted_of(one, settings, docker).stdout
        assert load(settings).runtimes == (program,)
    one.config.write_text(CONTAINERD)
    assert "settings changed" in noted_of(one, settings, one).stdout
