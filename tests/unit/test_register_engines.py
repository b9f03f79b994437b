"""install/register.py on the files of Docker, Podman and CRI-O.

What the engines themselves make of the result is tests/integration/test_install_engines.py's matter.
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from support.registering import BINARY, Registering, at, content, write

# Docker


DAEMON_JSON = {
    "empty": b"",
    "blank": b" \n\t",
    "object": b"{}",
    "spread": b"{\n}\n",
    "one line": b'{"debug":true,"hosts":["unix:///run/docker.sock"]}',
    "tabs and CRLF": b'{\r\n\t"debug": true,\r\n\t"labels": ["a=}"]\r\n}\r\n',
    "byte order mark": b'\xef\xbb\xbf{"debug": true}\n',
    "nothing in runtimes": b'{\n  "runtimes": {},\n  "debug": true\n}',
    "others": b"""{
    "default-runtime": "nvidia",
    "runtimes": {
        "nvidia": {
            "args": [],
            "path": "nvidia-container-runtime"
        }
    },
    "log-opts": {"tag": "\\"},{\\u007d"}
}
""",
}


@pytest.mark.parametrize("original", DAEMON_JSON.values(), ids=list(DAEMON_JSON))
def test_docker_keeps_what_is_there(tmp_path: Path, original: bytes) -> None:
    docker = at(tmp_path, "docker")
    write(docker.config, original)
    before = json.loads(original.decode("utf-8-sig").strip() or "{}")
    assert docker.register() == "changed"
    text = docker.config.read_bytes().decode()
    after = json.loads(text.removeprefix("\ufeff"))
    assert after["runtimes"]["rewarm"] == {"path": BINARY}
    assert {**after, "runtimes": before.get("runtimes")} == {**before, "runtimes": before.get("runtimes")}
    assert [key for key in after if key in before] == list(before), "the order of the keys"
    assert b"\r\n" not in original or "\n" not in text.replace("\r\n", "")
    lines = [line for line in original.decode().splitlines() if line.strip(" \t{},") and "runtimes" not in line]
    assert all(line.rstrip("} ,") in text for line in lines if len(original.splitlines()) > 1), "the layout stays"
    once = content(tmp_path)
    assert docker.register() == "unchanged"
    assert content(tmp_path) == once
    assert docker.unregister() == "changed"
    assert docker.config.read_bytes() == original
    assert docker.unregister() == "unchanged"


def test_docker_without_a_file(tmp_path: Path) -> None:
    docker = at(tmp_path, "docker")
    docker.register()
    assert json.loads(docker.config.read_text()) == {"runtimes": {"rewarm": {"path": BINARY}}}
    assert docker.register() == "unchanged"
    docker.unregister()
    assert content(tmp_path) == {"state": 0o40755}, "directories that were made are gone, too"


@pytest.mark.parametrize(
    ("edit", "left"),
    [
        (
            lambda text: text.replace('"debug": true', '"debug": false'),
            {"debug": False, "runtimes": {"a": {"path": "/a"}}},
        ),
        (lambda text: text.replace('"path": "/a"', '"path": "/b"'), {"debug": True, "runtimes": {"a": {"path": "/b"}}}),
        (
            lambda text: json.dumps(dict(reversed(json.loads(text).items()))),
            {"debug": True, "runtimes": {"a": {"path": "/a"}}},
        ),
    ],
)
def test_docker_users_changes_survive(tmp_path: Path, edit: Any, left: object) -> None:
    docker = at(tmp_path, "docker")
    write(docker.config, '{\n "debug": true,\n "runtimes": {"a": {"path": "/a"}}\n}\n')
    docker.register()
    docker.config.write_text(edit(docker.config.read_text()))
    assert docker.register() == "unchanged"
    docker.unregister()
    assert json.loads(docker.config.read_text()) == left


def test_docker_a_file_of_ours_that_the_user_went_on_with(tmp_path: Path) -> None:
    docker = at(tmp_path, "docker")
    docker.register()
    docker.config.write_text(docker.config.read_text().replace("{\n", '{\n  "debug": true,\n', 1))
    docker.unregister()
    assert json.loads(docker.config.read_text()) == {"debug": True}
    docker.register()
    docker.unregister()
    docker.config.unlink()
    docker.register()
    docker.config.write_text(json.dumps(json.loads(docker.config.read_text())))
    docker.unregister()
    assert not docker.config.exists(), "it held nothing but rewarm, in another layout"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ('{"a": 1,}', "is not valid JSON"),
        ('{"a": 1} // why', "is not valid JSON"),
        ('{"a": NaN}', "NaN is no JSON number"),
        ('{"debug": true, "debug": false}', "has the key 'debug' twice"),
        ("[" * 100000, "is not valid JSON"),
        ("[]", "is not a JSON object"),
        ('{"runtimes": []}', "runtimes is not an object"),
        ('{"runtimes": null}', "runtimes is not an object"),
        ('{"runtimes": {"rewarm": {"path": "/usr/bin/else"}}}', "has a runtime 'rewarm' of its own"),
        ('{"runtimes": {"rewarm": "x"}}', "has a runtime 'rewarm' of its own"),
        ('{"runtimes": {"rewarm": {"path": "/srv/r/bin/rewarm-runc"}}}', "another rewarm, /srv/r/bin/rewarm-runc"),
        (b"{\xff}", "is not UTF-8"),
        (b" " * (9 << 20), "more than 8 MiB"),
    ],
)
def test_docker_refuses_by_name(tmp_path: Path, text: str | bytes, message: str) -> None:
    docker = at(tmp_path, "docker")
    write(docker.config, text)
    said = docker.refused()
    assert message in said and str(docker.config) in said


def test_docker_that_is_registered_by_hand(tmp_path: Path) -> None:
    docker = at(tmp_path, "docker")
    text = f'{{"runtimes": {{"rewarm": {{"path": "{BINARY}"}}}}}}'
    write(docker.config, text)
    assert docker.register() == "unchanged"
    assert docker.unregister() == "unchanged"
    assert docker.config.read_text() == text


def test_docker_is_put_back_when_dockerd_does_not_agree(tmp_path: Path) -> None:
    docker = at(tmp_path, "docker")
    write(docker.config, '{"debug": true}')
    program = write(
        tmp_path / "dockerd", '#!/bin/sh\ntest "$1" != --help || exec echo --validate\necho no >&2; exit 1\n'
    )
    program.chmod(0o755)
    done = docker.try_register(program=str(program))
    assert done.returncode == 1
    assert "no; the file was put back as it was" in done.stderr
    assert docker.config.read_text() == '{"debug": true}'
    assert not (docker.state / "docker.json").exists()


# Podman and CRI-O


def test_podman(tmp_path: Path) -> None:
    podman = at(tmp_path, "podman")
    main = write(tmp_path / "etc/containers/containers.conf", '[engine]\nruntime = "runc"\n')
    podman.register()
    assert tomllib.loads(podman.config.read_text()) == {"engine": {"runtimes": {"rewarm": [BINARY]}}}
    assert podman.register() == "unchanged"
    podman.unregister()
    assert not podman.config.parent.exists()
    assert main.read_text() == '[engine]\nruntime = "runc"\n'


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("containers.conf", '[engine.runtimes]\nrewarm = ["/usr/bin/else"]\n', "has a runtime 'rewarm' of its own"),
        ("containers.conf.d/10.conf", '[engine.runtimes]\nrewarm = "x"\n', "rewarm is not a list of strings"),
        ("containers.conf.d/10.conf", "[engine]\nruntimes = 7\n", "engine.runtimes is not a table"),
        ("containers.conf.d/10.conf", "[engine\n", "is not valid TOML"),
        ("containers.conf.d/rewarm.conf", "[engine]\nno_pivot_root = true\n", "settings of somebody else"),
    ],
)
def test_podman_refuses_by_name(tmp_path: Path, name: str, text: str, message: str) -> None:
    podman = at(tmp_path, "podman")
    write(tmp_path / "etc/containers" / name, text)
    podman.config.parent.mkdir(exist_ok=True)
    said = podman.refused()
    assert message in said and name in said


CRIO = """\
[crio.runtime]
default_runtime = "crun"
[crio.runtime.runtimes.crun]
runtime_path = "/usr/libexec/crio/crun"
runtime_root = "/run/crun"
monitor_path = "/usr/libexec/crio/conmon"
allowed_annotations = ["io.containers.trace-syscall"]
"""
CRIO_RUNC = """\
[crio.runtime.runtimes.runc]
runtime_path = "/usr/libexec/crio/runc"
runtime_root = "/srv/runc"
runtime_type = "oci"
monitor_cgroup = "system.slice"
monitor_path = "/usr/libexec/crio/conmon"
privileged_without_host_devices = true
allowed_annotations = ["io.kubernetes.cri-o.Devices"]
[crio.runtime.runtimes.runc.platform_runtime_paths]
"linux/arm64" = "/usr/libexec/crio/runc-arm64"
[crio.runtime.runtimes.runc.default_annotations]
"a.example/b" = "c"
"""


def handler(crio: Registering) -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads(crio.config.read_text())["crio"]["runtime"]["runtimes"]
    assert list(found) == ["rewarm"]
    rewarm: dict[str, Any] = found["rewarm"]
    return rewarm


def test_crio_copies_runc(tmp_path: Path) -> None:
    """CRI-O's own annotations only: it ignores a handler that lists another."""
    crio = at(tmp_path, "crio")
    write(tmp_path / "etc/crio/crio.conf", CRIO)
    write(tmp_path / "etc/crio/crio.conf.d/10-runc.conf", CRIO_RUNC)
    before = content(tmp_path)
    crio.register()
    assert handler(crio) == {
        "runtime_path": BINARY,
        "runtime_type": "oci",
        "runtime_root": "/srv/runc",
        "monitor_env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
        "monitor_cgroup": "system.slice",
        "monitor_path": "/usr/libexec/crio/conmon",
        "privileged_without_host_devices": True,
        "allowed_annotations": ["io.kubernetes.cri-o.Devices"],
        "default_annotations": {"a.example/b": "c"},
    }
    assert crio.register() == "unchanged"
    crio.unregister()
    after = content(tmp_path)
    after.pop("state")
    assert after == before


def test_crio_with_crun_alone(tmp_path: Path) -> None:
    crio = at(tmp_path, "crio")
    write(tmp_path / "etc/crio/crio.conf", CRIO)
    crio.register()
    made = handler(crio)
    assert made["runtime_root"] == "/run/runc", "crun's state is nothing that runc could read"
    assert made["monitor_path"] == "/usr/libexec/crio/conmon"
    assert made["allowed_annotations"] == ["io.containers.trace-syscall"]


def test_crio_takes_a_handlers_last_table_whole(tmp_path: Path) -> None:
    """As CRI-O does (TOML's map elements are made anew): what a later drop-in leaves out is not there any more."""
    crio = at(tmp_path, "crio")
    write(tmp_path / "etc/crio/crio.conf.d/10-runc.conf", CRIO_RUNC)
    write(tmp_path / "etc/crio/crio.conf.d/20-less.conf", '[crio.runtime.runtimes.runc]\nruntime_root = "/srv/other"\n')
    crio.register()
    assert handler(crio) == {
        "runtime_path": BINARY,
        "runtime_type": "oci",
        "runtime_root": "/srv/other",
        "monitor_env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
    }


@pytest.mark.parametrize(
    ("text", "said", "noted"),
    [
        ('[crio.runtime.runtimes.nvidia]\nruntime_path = "{program}"\n', "runc version 1.2.4", True),
        ('[crio.runtime.runtimes.nvidia]\nruntime_path = "{program}"\n', "NVIDIA\n\ncrun version 1.19", False),
        (
            '[crio.runtime.runtimes.nvidia]\nruntime_path = "{program}"\nruntime_root = "/run/other"\n'
            "[crio.runtime.runtimes.runc]\ninherit_default_runtime = true\n"
            'allowed_annotations = ["io.kubernetes.cri-o.Devices"]\n',
            "runc version 1.2.4",
            True,
        ),
        ('[crio.runtime.runtimes.nvidia]\nruntime_path = "{program}"\n' + CRIO_RUNC, "runc version 1.2.4", None),
        ("", "", None),
    ],
)
def test_crio_whose_default_handler_runs_another_program(
    tmp_path: Path, text: str, said: str, noted: bool | None
) -> None:
    """What rewarm runs below itself is what the copied handler ran; one that no file names is CRI-O's own choice."""
    crio = at(tmp_path, "crio")
    program = write(tmp_path / "nvidia-container-runtime", f"#!/bin/sh\nprintf '{said}\\n'\n")
    program.chmod(0o755)
    settings = tmp_path / "etc/rewarm/config.yaml"
    write(
        tmp_path / "etc/crio/crio.conf", f'[crio.runtime]\ndefault_runtime = "nvidia"\n{text.format(program=program)}'
    )
    done = crio.run("register", "--binary", BINARY, "--settings", str(settings), f"crio={crio.config}")
    assert done.returncode == 0, done.stderr
    assert settings.exists() == bool(noted)
    assert not noted or f'runtimes: ["{program}"]' in settings.read_text()
    assert ("runs crun" in done.stderr) == (noted is False)
    made = handler(crio)
    assert made["runtime_root"] == ("/srv/runc" if "/srv/runc" in text else "/run/runc")
    assert ("allowed_annotations" in made) == ("allowed_annotations" in text)


def test_crio_without_files(tmp_path: Path) -> None:
    crio = at(tmp_path, "crio")
    crio.register()
    assert handler(crio)["runtime_path"] == BINARY
    crio.unregister()
    assert content(tmp_path) == {"state": 0o40755}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("crio.conf", CRIO_RUNC.replace('"oci"', '"vm"'), "runtime_type 'vm'"),
        ("crio.conf.d/10", CRIO.replace(".crun]", ".rewarm]"), "has a runtime 'rewarm' of its own"),
        ("crio.conf.d/deep/10", "[crio]\nruntime = 1\n", "crio.runtime is not a table"),
        ("crio.conf.d/99-rewarm.conf", CRIO_RUNC, "handlers of somebody else"),
    ],
)
def test_crio_refuses_by_name(tmp_path: Path, name: str, text: str, message: str) -> None:
    crio = at(tmp_path, "crio")
    write(tmp_path / "etc/crio" / name, text)
    crio.config.parent.mkdir(exist_ok=True)
    assert message in crio.refused()
