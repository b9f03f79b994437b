"""install/register.py on containerd's configuration files as nodes have them; the program is run, not imported.

What containerd itself makes of the result is tests/integration/test_install.py's matter.
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any

import pytest

from support.registering import BINARY, Registering

V2 = "io.containerd.grpc.v1.cri"
V3 = "io.containerd.cri.v1.runtime"

KUBEADM_V2 = """\
# the node's own words, which stay
version = 2
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "pause:3.9"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        SystemdCgroup = true
"""
KUBEADM_V3 = KUBEADM_V2.replace("version = 2", "version = 3").replace(f'"{V2}"', f"'{V3}'")
NVIDIA = """\
version = 2
[plugins."io.containerd.grpc.v1.cri".containerd]
  default_runtime_name = "nvidia"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.nvidia]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.nvidia.options]
      BinaryName = "/usr/bin/nvidia-container-runtime"
      SystemdCgroup = true
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    pod_annotations = ["other.example/*"]
    privileged_without_host_devices = true
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      SystemdCgroup = true
      Root = "/srv/a \\"quoted\\" \\\\ path"
"""


class Node(Registering):
    """A directory with containerd's files in it."""

    def __init__(self, directory: Path) -> None:
        super().__init__("containerd", directory / "config.toml", directory / "state")

    def runtimes(self, plugin: str = V2, path: Path | None = None) -> dict[str, Any]:
        data = tomllib.loads((path or self.config).read_text())
        runtimes: dict[str, Any] = data["plugins"][plugin]["containerd"]["runtimes"]
        return runtimes


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


@pytest.mark.parametrize(
    ("text", "plugin"), [(KUBEADM_V2, V2), (KUBEADM_V3, V3), (KUBEADM_V3.replace("= 3", "= 4"), V3)]
)
def test_copies_runc_and_keeps_the_text(node: Node, text: str, plugin: str) -> None:
    node.config.write_text(text)
    assert node.register() == "changed"
    assert node.config.read_text().startswith(text)
    runtimes = node.runtimes(plugin)
    assert set(runtimes) == {"runc", "rewarm"}
    assert runtimes["rewarm"] == {
        "runtime_type": "io.containerd.runc.v2",
        "pod_annotations": ["rewarm.dev/*"],
        "options": {"SystemdCgroup": True, "BinaryName": BINARY},
    }
    assert node.unregister() == "changed"
    assert node.config.read_text() == text
    assert list(node.state.iterdir()) == []


def test_second_run_changes_nothing(node: Node) -> None:
    node.config.write_text(KUBEADM_V2)
    node.register()
    once = node.config.read_bytes(), node.config.stat().st_ino
    assert node.register() == "unchanged"
    assert (node.config.read_bytes(), node.config.stat().st_ino) == once
    node.unregister()
    assert node.unregister() == "unchanged"
    assert node.config.read_text() == KUBEADM_V2


def test_copies_runc_where_nvidia_is_the_default(node: Node) -> None:
    node.config.write_text(NVIDIA)
    node.register()
    runtimes = node.runtimes()
    before = tomllib.loads(NVIDIA)["plugins"][V2]["containerd"]["runtimes"]
    ours = runtimes.pop("rewarm")
    assert runtimes == before
    assert ours["pod_annotations"] == ["other.example/*", "rewarm.dev/*"]
    assert ours["privileged_without_host_devices"] is True
    assert ours["options"] == {**before["runc"]["options"], "BinaryName": BINARY}


def test_copies_the_default_runtime_where_runc_is_not_named(node: Node) -> None:
    node.config.write_text(NVIDIA[: NVIDIA.index('  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]')])
    node.register()
    assert node.runtimes()["rewarm"]["options"] == {"BinaryName": BINARY, "SystemdCgroup": True}


@pytest.mark.parametrize("text", ["", "# nothing but a comment\n", "# no newline"])
def test_file_without_settings(node: Node, text: str) -> None:
    node.config.write_text(text)
    node.register()
    assert tomllib.loads(node.config.read_text())["version"] == 2
    assert set(node.runtimes()) == {"runc", "rewarm"}  # a runtimes table replaces the built-in one: runc must be in it
    assert node.register() == "unchanged"
    node.unregister()
    assert node.config.read_text() == text


def test_no_file(node: Node) -> None:
    node.register()
    assert set(node.runtimes()) == {"runc", "rewarm"}
    assert node.register() == "unchanged"
    node.unregister()
    assert not node.config.exists()


def test_file_of_ours_that_the_user_went_on_with(node: Node) -> None:
    node.register()
    with node.config.open("a") as out:
        out.write("[grpc]\n  uid = 7\n")
    assert node.register() == "changed"  # the block goes to the end again
    assert node.register() == "unchanged"
    node.unregister()
    assert tomllib.loads(node.config.read_text()) == {"version": 2, "grpc": {"uid": 7}}


def test_user_changes_survive(node: Node) -> None:
    node.config.write_text(KUBEADM_V2)
    node.register()
    installed = node.config.read_text()
    node.config.write_text(installed.replace("pause:3.9", "pause:3.10") + "[debug]\n  level = 'debug'\n")
    assert node.unregister() == "changed"
    assert node.config.read_text() == KUBEADM_V2.replace("pause:3.9", "pause:3.10") + "[debug]\n  level = 'debug'\n"


def test_refresh_after_a_change_of_runc(node: Node) -> None:
    node.config.write_text(KUBEADM_V2)
    node.register()
    changed = KUBEADM_V2.replace("SystemdCgroup = true", "SystemdCgroup = false")
    node.config.write_text(node.config.read_text().replace(KUBEADM_V2, changed))
    assert node.register() == "changed"
    assert node.runtimes()["rewarm"]["options"]["SystemdCgroup"] is False
    node.unregister()
    assert node.config.read_text() == changed


@pytest.mark.parametrize("pattern", ["conf.d/*.toml", "{directory}/conf.d/*.toml", "conf.d/90-nvidia.toml"])
def test_the_last_imported_file_with_the_plugin_gets_the_block(node: Node, tmp_path: Path, pattern: str) -> None:
    drop_ins = tmp_path / "conf.d"
    drop_ins.mkdir()
    main = f'imports = ["{pattern.format(directory=tmp_path)}"]\n' + KUBEADM_V2
    node.config.write_text(main)
    last, other = drop_ins / "90-nvidia.toml", drop_ins / "95-debug.toml"
    last.write_text(NVIDIA)
    other.write_text("version = 2\n[debug]\n  level = 'info'\n")
    node.register()
    assert node.config.read_text() == main
    assert "rewarm" in node.runtimes(path=last)
    assert other.read_text() == "version = 2\n[debug]\n  level = 'info'\n"
    node.unregister()
    assert last.read_text() == NVIDIA


def test_a_dotfile_is_imported_too(node: Node, tmp_path: Path) -> None:
    """By Go's patterns it is."""
    node.config.write_text('imports = ["conf.d/*.toml"]\n' + KUBEADM_V2)
    hidden = tmp_path / "conf.d/.90-nvidia.toml"
    hidden.parent.mkdir()
    hidden.write_text(NVIDIA)
    node.register()
    assert "rewarm" in node.runtimes(path=hidden)
    node.unregister()
    assert hidden.read_text() == NVIDIA


def test_block_follows_the_last_word(node: Node, tmp_path: Path) -> None:
    main = 'imports = ["conf.d/*.toml"]\n' + KUBEADM_V2
    node.config.write_text(main)
    node.register()
    assert "rewarm" in node.runtimes()
    drop_in = tmp_path / "conf.d/99.toml"
    drop_in.parent.mkdir()
    drop_in.write_text(NVIDIA)
    assert node.register() == "changed"
    assert node.config.read_text() == main
    assert "rewarm" in node.runtimes(path=drop_in)
    node.unregister()
    assert (node.config.read_text(), drop_in.read_text()) == (main, NVIDIA)


def test_cri_switched_off(node: Node) -> None:
    """What Docker's containerd package ships: configuration version 1 by omission, and no CRI."""
    node.config.write_text('disabled_plugins = ["cri"]\n')
    done = node.try_register()
    assert (done.returncode, done.stdout) == (0, "containerd unchanged\n")
    assert "disables the CRI plugin" in done.stderr
    assert node.config.read_text() == 'disabled_plugins = ["cri"]\n'


def test_a_runtime_of_the_same_name_that_is_ours_is_left_alone(node: Node) -> None:
    text = (
        KUBEADM_V2
        + f"""
[plugins."{V2}".containerd.runtimes.rewarm]
  runtime_type = "io.containerd.runc.v2"
  options = {{ BinaryName = "{BINARY}" }}
"""
    )
    node.config.write_text(text)
    assert node.register() == "unchanged"
    assert node.unregister() == "unchanged"
    assert node.config.read_text() == text


def test_a_runtime_of_the_same_name_that_is_not_ours(node: Node) -> None:
    node.config.write_text(
        KUBEADM_V2 + f'[plugins."{V2}".containerd.runtimes.rewarm]\n  runtime_type = "io.containerd.other.v1"\n'
    )
    assert "has a runtime 'rewarm' of its own" in node.refused()


def test_another_prefix(node: Node, tmp_path: Path) -> None:
    node.config.write_text(KUBEADM_V2)
    node.register("/srv/other/bin/rewarm-runc")
    first, node.state = node.state, tmp_path / "second"
    assert "another rewarm, /srv/other/bin/rewarm-runc" in node.refused()
    node.state = first
    node.unregister()
    assert node.config.read_text() == KUBEADM_V2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("version = 2\n[plugins\n", "is not valid TOML"),
        ("version = 1\n[plugins.cri]\n", "config migrate"),
        ("root = '/srv/containerd'\n", "configuration version 1"),
        ("version = 9\n", "configuration version 9"),
        ('version = 2\nimports = ["missing.toml"]\n', "missing.toml, imported by"),
        (KUBEADM_V2.replace("io.containerd.runc.v2", "io.containerd.kata.v2"), "io.containerd.kata.v2"),
        (KUBEADM_V2 + "# BEGIN rewarm runtime (torn)\n", "without '# END rewarm runtime'"),
        (
            f'version = 2\nplugins."{V2}" = {{ containerd = {{ runtimes = '
            '{ runc = { runtime_type = "io.containerd.runc.v2" } } } }\n',
            "add by hand",
        ),
    ],
)
def test_refused(node: Node, text: str, message: str) -> None:
    node.config.write_text(text)
    assert message in node.refused()


@pytest.mark.parametrize("command", ["dump", "migrate"])
def test_the_command_that_converts_is_one_that_it_has(node: Node, tmp_path: Path, command: str) -> None:
    node.config.write_text("version = 1\n[plugins.cri]\n")
    program = tmp_path / "containerd"
    program.write_text(
        f'#!/bin/sh\ntest "$1" = config || exec cat "$2"\necho "   default  x"; echo "   {command}  y"\n'
    )
    program.chmod(0o755)
    done = node.try_register(program=str(program))
    assert done.returncode == 1
    assert f"('containerd --config {node.config} config {command}' prints it in a newer one)" in done.stderr


def test_not_text(node: Node) -> None:
    node.config.write_bytes(b"version = 2 # \xff\n")
    assert "cannot be read" in node.refused()


def test_keeps_bytes_mode_owner_and_symlink(node: Node, tmp_path: Path) -> None:
    real = tmp_path / "real.toml"
    original = KUBEADM_V2.replace("\n", "\r\n").encode() + b"# the last line has no end"
    real.write_bytes(original)
    real.chmod(0o640)
    node.config.symlink_to("real.toml")
    owner = (12345, 12345) if os.geteuid() == 0 else (os.getuid(), os.getgid())
    os.chown(real, *owner)
    node.register()
    assert node.config.is_symlink()
    assert real.read_bytes().startswith(original)
    assert "rewarm" in node.runtimes()
    status = real.stat()
    assert (status.st_mode & 0o777, status.st_uid, status.st_gid) == (0o640, *owner)
    node.unregister()
    assert real.read_bytes() == original
    assert node.config.is_symlink()


def test_damaged_backup_is_not_put_back(node: Node) -> None:
    node.config.write_text(KUBEADM_V2)
    node.register()
    (original,) = node.state.glob("*.orig")
    original.write_text("something else")
    installed = node.config.read_text()
    done = node.run("unregister", "containerd")
    assert done.returncode == 1
    assert "is not what was saved" in done.stderr
    assert node.config.read_text() == installed


@pytest.mark.parametrize("broken", ["exit 0", "exit 3", "echo 'version = 3'"])
def test_put_back_when_containerd_does_not_agree(node: Node, tmp_path: Path, broken: str) -> None:
    """A containerd that reads the file as it was, and does not see the runtime in the new one. Nothing has changed for
    it then, the file's time included: `doctor --node` would have it restarted."""
    node.config.write_text(KUBEADM_V2)
    os.utime(node.config, ns=(10**18, 10**18 + 7))
    program = tmp_path / "containerd"
    program.write_text(f'#!/bin/sh\nif grep -q rewarm "$2"; then {broken}; else cat "$2"; fi\n')
    program.chmod(0o755)
    done = node.try_register(program=str(program))
    assert done.returncode == 1
    assert "put back as it was" in done.stderr
    assert (node.config.read_text(), node.config.stat().st_mtime_ns) == (KUBEADM_V2, 10**18 + 7)
    assert node.unregister() == "unchanged"


def test_a_refresh_that_is_put_back(node: Node, tmp_path: Path) -> None:
    node.config.write_text(KUBEADM_V2)
    node.register()
    node.config.write_text(node.config.read_text().replace("SystemdCgroup = true", "SystemdCgroup = false", 1))
    os.utime(node.config, ns=(10**18, 10**18))
    before = node.config.read_bytes()
    program = tmp_path / "containerd"
    program.write_text('#!/bin/sh\nif grep -q "SystemdCgroup = true" "$2"; then cat "$2"; else exit 3; fi\n')
    program.chmod(0o755)
    assert "put back as it was" in node.try_register(program=str(program)).stderr
    assert (node.config.read_bytes(), node.config.stat().st_mtime_ns) == (before, 10**18)
