"""What install.sh registers is what the engines then run: containerd 1.6 and 2.x by the CRI, Docker, Podman.

The registration is install/register.py's, which install.sh calls; the engines are real ones with roots of their own.
After `unregister` every file is what it was, byte for byte.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import tomllib
from pathlib import Path
from typing import Any

import pytest

from support import cgroups, counter, rootfs
from support.bundle import cgroup_parent
from support.cri import CriError
from support.docker import Docker
from support.node import Node
from support.pod import CriContainerd
from support.proc import CommandFailed, command, wait_for
from support.registering import printed_anew

REPOSITORY = Path(__file__).parents[2]
REGISTER = REPOSITORY / "install/register.py"


class Registered:
    """register.py with a state directory of its own and this node's settings, in place of an install's."""

    def __init__(self, directory: Path, node: Node) -> None:
        self.state = directory / "install-state"
        self.node = node
        self.binary = node.prefix / "bin/rewarm-runc"

    def register(self, *engines: str, settings: Path | None = None) -> subprocess.CompletedProcess[str]:
        words: list[str | Path] = ["--binary", self.binary]
        if settings is not None:
            words += ["--settings", settings, "--python", self.node.prefix / "venv/bin/python3"]
        return self._run("register", *words, *engines)

    def unregister(self) -> subprocess.CompletedProcess[str]:
        """As uninstall.sh calls it."""
        return self._run("unregister", "--removes", self.binary)

    def _run(self, name: str, *words: str | Path) -> subprocess.CompletedProcess[str]:
        return command("/usr/bin/python3", "-E", "-s", "-B", REGISTER, name, "--state", self.state, *words)

    def doctor(self, label: str) -> dict[str, Any]:
        """What `rewarm doctor --node` says of one engine. It looks for the record beside its own prefix."""
        code = (
            "import sys, json; from rewarm import checks, doctor; from dataclasses import asdict; "
            f"checks.Node.install_state = {str(self.state)!r}; "
            "print(json.dumps([asdict(check) for check in doctor.examine_node(doctor.look())]))"
        )
        done = command(
            *(self.node.prefix / "venv/bin/python3", "-I", "-c", code), env={**os.environ, **self.node.env}, timeout=90
        )
        found: dict[str, Any] = {check["name"]: check for check in json.loads(done.stdout)}[label]
        return found


@pytest.fixture
def registered(tmp_path: Path, node: Node) -> Registered:
    return Registered(tmp_path, node)


PROGRAM = ("python3", "-c", "import time; print('runs', flush=True); time.sleep(600)")


def pod_runs(engine: CriContainerd, node: Node) -> None:
    """A pod under the handler `rewarm`, with an annotation that only a runtime that gets it can act on."""
    with engine.pod("rewarm", {"rewarm.dev/snapshot": "mine", "other.example/x": "y"}) as pod:
        assert engine.runtime_binary(pod[0]) == str(node.prefix / "bin/rewarm-runc")
        made = engine.run_container(pod, "main", PROGRAM)
        wait_for("the container's output", lambda: "runs" in engine.log_of("main"))
        outcome = node.outcome(made, engine.runc_root_of_pods)
        assert outcome["outcome"] == "cold" and "mine" in json.dumps(outcome), outcome


def custom_runc(directory: Path) -> tuple[Path, Path]:
    """A low-level runtime of the node's own, and where it notes how it was called."""
    program, log = directory / "custom-runc", directory / "custom.log"
    program.write_text(f'#!/bin/sh\necho "$@" >> {log}\nexec /usr/sbin/runc "$@"\n')
    program.chmod(0o755)
    return program, log


CASES = [
    pytest.param(False, 2, True, id="1.6, a custom runc"),
    pytest.param(True, 2, False, id="2.x, in place"),
    pytest.param(True, 3, True, id="2.x, drop-in, a custom runc"),
]


@pytest.mark.parametrize(("newer", "version", "custom"), CASES)
def test_containerd(
    tmp_path: Path, node: Node, registered: Registered, newer: bool, version: int, custom: bool
) -> None:
    """Registered while it runs, restarted, used, checked, unregistered twice."""
    node.store.mkdir()
    program, log = custom_runc(tmp_path)
    settings = node.config.read_bytes()
    runc = str(program) if custom else ""
    with CriContainerd(tmp_path / "c", node, newer=newer, version=version, runc=runc) as engine:
        original = engine.config.read_bytes()
        with pytest.raises(CriError, match="rewarm"), engine.pod("rewarm", {}):
            pytest.fail("the handler is there before it is registered")
        where = f"containerd={engine.config}:{engine.program}"
        assert "containerd changed" in registered.register(where, settings=node.config).stdout
        assert registered.doctor("containerd")["status"] == "failed", "it runs with what the file was before"
        assert "was started before" in registered.doctor("containerd")["found"]
        engine.restart()
        assert registered.doctor("containerd")["status"] == "ok", registered.doctor("containerd")
        log.unlink(missing_ok=True)
        pod_runs(engine, node)
        called = log.read_text() if log.exists() else ""
        for word in ("create", "kill", "delete"):
            assert (f" {word} " in called) == custom, called
        drop_in = engine.directory / "conf.d/rewarm.toml"
        assert drop_in.exists() == (version == 3)
        assert (engine.config.read_bytes() == original) == (version == 3)
        assert "containerd unchanged" in registered.register(where, settings=node.config).stdout
        assert "containerd changed" in registered.unregister().stdout
        assert (engine.config.read_bytes(), node.config.read_bytes()) == (original, settings)
        assert not drop_in.parent.exists()
        assert "containerd unchanged" in registered.unregister().stdout
        engine.restart()
        with pytest.raises(CriError, match="rewarm"), engine.pod("rewarm", {}):
            pytest.fail("the handler is still there")


def test_containerd_that_is_replaced(tmp_path: Path, registered: Registered) -> None:
    """From 1.6 to 2.x and back: the runtime moves to where that one reads it, and nothing stays at the other place."""
    config, drop_in = tmp_path / "config.toml", tmp_path / "conf.d/rewarm.toml"
    nvidia = tmp_path / "conf.d/99-nvidia.toml"
    nvidia.parent.mkdir()
    config.write_text(f'version = 2\nimports = ["{tmp_path}/conf.d/*.toml"]')
    table = 'plugins."io.containerd.grpc.v1.cri".containerd'
    nvidia.write_text(
        f'version = 2\n[{table}]\ndefault_runtime_name = "nvidia"\n[{table}.runtimes.nvidia]\n'
        f'runtime_type = "io.containerd.runc.v2"\n[{table}.runtimes.nvidia.options]\nSystemdCgroup = true\n'
    )
    before = config.read_bytes(), nvidia.read_bytes()
    old, new = "/usr/bin/containerd", str(rootfs.containerd2() / "containerd")
    for program in (old, new, old, new, new):
        registered.register(f"containerd={config}:{program}")
        dump = tomllib.loads(command(program, "--config", config, "config", "dump").stdout)["plugins"]
        plugin = dump.get("io.containerd.cri.v1.runtime") or dump["io.containerd.grpc.v1.cri"]
        assert plugin["containerd"]["default_runtime_name"] == "nvidia"
        runtimes = plugin["containerd"]["runtimes"]
        assert set(runtimes) - {"runc"} == {"nvidia", "rewarm"}  # 1.6 has no runc beside those that are named
        assert runtimes["rewarm"]["options"]["BinaryName"] == str(registered.binary)
        assert runtimes["rewarm"]["options"]["SystemdCgroup"] is True, "as the node's default runtime has it"
        assert (drop_in.exists(), nvidia.read_bytes() == before[1]) == (program == new, program == new)
        assert config.read_bytes() == before[0]
    registered.unregister()
    assert (config.read_bytes(), nvidia.read_bytes()) == before
    assert list(nvidia.parent.iterdir()) == [nvidia]


def test_registered_again_where_a_drop_in_does_not_do(tmp_path: Path, registered: Registered) -> None:
    """A main file of version 2 with an import of version 3, where a drop-in of either would hide the other's tables."""
    config, nvidia = tmp_path / "config.toml", tmp_path / "conf.d/99-nvidia.toml"
    nvidia.parent.mkdir()
    config.write_text(f'version = 2\nimports = ["{tmp_path}/conf.d/*.toml"]\n')
    table = "plugins.'io.containerd.cri.v1.runtime'.containerd"
    nvidia.write_text(f"version = 3\n[{table}.runtimes.nvidia]\nruntime_type = 'io.containerd.runc.v2'\n")
    before = config.read_bytes(), nvidia.read_bytes()
    program = rootfs.containerd2() / "containerd"
    said = []
    for _ in range(4):
        done = registered.register(f"containerd={config}:{program}")
        assert done.stderr == ""
        said.append("containerd changed" in done.stdout)
        dump = tomllib.loads(command(program, "--config", config, "config", "dump").stdout)["plugins"]
        assert "rewarm" in dump["io.containerd.cri.v1.runtime"]["containerd"]["runtimes"]
        if len(said) == 1:
            written, changed = nvidia.read_bytes(), nvidia.stat().st_mtime_ns
        assert (nvidia.read_bytes(), nvidia.stat().st_mtime_ns) == (written, changed)
    assert said == [True, False, False, False]
    registered.unregister()
    assert (config.read_bytes(), nvidia.read_bytes()) == before
    assert list(nvidia.parent.iterdir()) == [nvidia]


@pytest.mark.parametrize("newer", [False, True], ids=["1.6", "2.x"])
def test_a_relative_pattern(tmp_path: Path, registered: Registered, newer: bool) -> None:
    """1.6 looks for it where it is started, which for a service is the root directory, and not beside the file."""
    program = rootfs.containerd2() / "containerd" if newer else Path("/usr/bin/containerd")
    config, other = tmp_path / "config.toml", tmp_path / "conf.d/10-other.toml"
    table = 'plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc'
    text = f'[{table}]\nruntime_type = "io.containerd.runc.v2"\n[{table}.options]\nSystemdCgroup = %s\n'
    config.write_text('version = 2\nimports = ["conf.d/*.toml"]\n' + text % "true")
    other.parent.mkdir()
    other.write_text("version = 2\n" + text % "false")
    before = config.read_bytes(), other.read_bytes()
    registered.register(f"containerd={config}:{program}")
    dump = tomllib.loads(command("env", "--chdir=/", program, "--config", config, "config", "dump").stdout)["plugins"]
    plugin = dump.get("io.containerd.cri.v1.runtime") or dump["io.containerd.grpc.v1.cri"]
    assert plugin["containerd"]["runtimes"]["rewarm"]["options"]["SystemdCgroup"] is not newer
    assert other.read_bytes() == before[1]
    assert (other.parent / "rewarm.toml").exists() == newer
    registered.unregister()
    assert (config.read_bytes(), other.read_bytes()) == before


@pytest.mark.parametrize("newer", [False, True], ids=["1.6", "2.x"])
@pytest.mark.parametrize("imports", [False, True], ids=["in place", "with a directory"])
def test_files_that_were_printed_anew(tmp_path: Path, registered: Registered, newer: bool, imports: bool) -> None:
    """As nvidia-ctk does, without rewarm's marks: both runtimes keep one cgroup driver, and nothing stays behind."""
    program = rootfs.containerd2() / "containerd" if newer else Path("/usr/bin/containerd")
    config, drop_in = tmp_path / "config.toml", tmp_path / "conf.d/rewarm.toml"
    plugin = "io.containerd.cri.v1.runtime" if newer else "io.containerd.grpc.v1.cri"
    table = f'plugins."{plugin}".containerd.runtimes.runc'
    drop_in.parent.mkdir()
    config.write_text(
        f"version = {3 if newer else 2}\nimports = {json.dumps([f'{drop_in.parent}/*.toml'] if imports else [])}\n"
        f'[{table}]\nruntime_type = "io.containerd.runc.v2"\n[{table}.options]\nSystemdCgroup = false\n'
    )

    def effective() -> dict[str, Any]:
        plugins = tomllib.loads(command(program, "--config", config, "config", "dump").stdout)["plugins"]
        return {name: found["options"] for name, found in plugins[plugin]["containerd"]["runtimes"].items()}

    def print_anew() -> None:
        for path in (config, drop_in):
            if path.exists():
                path.write_text(printed_anew(path.read_text()))

    where = f"containerd={config}:{program}"
    registered.register(where)
    assert drop_in.exists() == (newer and imports)
    print_anew()
    config.write_text(config.read_text().replace("SystemdCgroup = false", "SystemdCgroup = true"))
    before = tomllib.loads(config.read_text())
    assert "containerd changed" in registered.register(where).stdout
    assert {name: found["SystemdCgroup"] for name, found in effective().items()} == {"runc": True, "rewarm": True}
    assert effective()["rewarm"]["BinaryName"] == str(registered.binary)
    assert "containerd unchanged" in registered.register(where).stdout
    print_anew()
    assert "containerd changed" in registered.unregister().stdout
    before["plugins"][plugin]["containerd"]["runtimes"].pop("rewarm", None)
    assert tomllib.loads(config.read_text()) == before
    assert set(effective()) == {"runc"} and not list(drop_in.parent.iterdir())


def test_containerd_with_runc_in_another_file(tmp_path: Path, registered: Registered) -> None:
    """Where tables are merged runc may be named before the file that has the last word; 1.6 has no runc then."""
    config, kata = tmp_path / "config.toml", tmp_path / "kata.toml"
    table = 'plugins."io.containerd.grpc.v1.cri".containerd.runtimes'
    config.write_text(f'version = 2\nimports = ["{kata}"]\n[{table}.runc.options]\nSystemdCgroup = true\n')
    kata.write_text(f'version = 2\n[{table}.kata]\nruntime_type = "io.containerd.kata.v2"\n')
    before = config.read_bytes(), kata.read_bytes()
    with pytest.raises(CommandFailed, match="neither a runtime 'runc'"):
        registered.register(f"containerd={config}:/usr/bin/containerd")
    assert (config.read_bytes(), kata.read_bytes()) == before
    program = rootfs.containerd2() / "containerd"
    registered.register(f"containerd={config}:{program}")
    dump = tomllib.loads(command(program, "--config", config, "config", "dump").stdout)["plugins"]
    runtimes = dump["io.containerd.cri.v1.runtime"]["containerd"]["runtimes"]
    assert set(runtimes) == {"runc", "kata", "rewarm"}
    assert runtimes["rewarm"]["options"]["SystemdCgroup"] is True
    registered.unregister()
    assert (config.read_bytes(), kata.read_bytes()) == before


def test_a_custom_runc_captures_and_restores(tmp_path: Path, node: Node) -> None:
    """What the settings name then is what checkpoints, restores, and runs everything else."""
    program, log = custom_runc(tmp_path)
    node.configure(runtimes=[str(program)])
    counter.captured(node)
    node.runtime.create("copy", counter.bundle(node.directory / "copy"))
    assert node.outcome("copy")["outcome"] == "warm"
    called = log.read_text()
    assert all(f" {word} " in called for word in ("create", "checkpoint", "restore")), called


def test_docker(tmp_path: Path, node: Node, registered: Registered) -> None:
    """A signal is enough; the user's keys and layout stay."""
    with Docker(node, registered=False) as engine:
        # dockerd would keep the runtimes it knows if the whole key went away again: it has one of the user's own.
        own = {"other": {"path": "/usr/sbin/runc"}}
        engine.config.write_text(json.dumps({**json.loads(engine.config.read_text()), "runtimes": own}, indent=3))
        original = engine.config.read_bytes()
        where = f"docker={engine.config}:/usr/sbin/dockerd"
        with pytest.raises(Exception, match="rewarm"), engine.container(["true"]):
            pytest.fail("the runtime is there before it is registered")
        assert "docker changed" in registered.register(where).stdout
        new = json.loads(engine.config.read_bytes())
        assert new.pop("runtimes") == {**own, "rewarm": {"path": str(registered.binary)}}
        assert {**new, "runtimes": own} == json.loads(original)
        assert "has not read it" in registered.doctor("Docker")["found"]
        engine.reload()
        found = registered.doctor("Docker")
        assert found["status"] == ("ok" if engine.annotations else "warning"), found
        assert "runs with it" in found["found"]
        with engine.container(["sh", "-c", "echo runs; sleep 600"]) as made:
            wait_for("the container's output", lambda: made.get_logs()[0] == b"runs\n")
            assert engine.under_rewarm(made.get_container_id())
        assert "docker unchanged" in registered.register(where).stdout
        assert "docker changed" in registered.unregister().stdout
        assert engine.config.read_bytes() == original
        engine.reload()
        with pytest.raises(Exception, match="rewarm"), engine.container(["true"]):
            pytest.fail("the runtime is still there")


# Podman reads its drop-ins from /etc/containers only, so that is a copy, in a mount namespace of the test's own.
PODMAN = """
set -eu
scratch=$1 register=$2 binary=$3 state=$4 rootfs=$5
run=$6 cgroup=$7
mkdir -p "$scratch/upper" "$scratch/work"
mount -t overlay overlay -o "lowerdir=/etc,upperdir=$scratch/upper,workdir=$scratch/work" /etc
rm -rf /etc/containers/containers.conf.d
cat > /etc/containers/containers.conf <<EOF
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]
log_driver = "k8s-file"
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
lock_type = "file"
static_dir = "$scratch/graph/libpod"
tmp_dir = "$run/tmp"
volume_path = "$scratch/graph/volumes"
[engine.runtimes]
runc = ["/usr/sbin/runc"]
EOF
cp /etc/containers/containers.conf "$scratch/before"
podman="podman --root $scratch/graph --runroot $run/storage --storage-driver vfs"
run() {
    $podman --runtime "$1" run --rm --network none --cgroup-parent "$cgroup" --rootfs "$rootfs:O" sh -c 'echo runs'
}
! run rewarm 2>/dev/null
python3 -E -s -B "$register" register --binary "$binary" --state "$state" \
    podman=/etc/containers/containers.conf.d/rewarm.conf:/usr/bin/podman
echo "rewarm: $(run rewarm)"
echo "runc: $(run runc)"
$podman --runtime rewarm info --format 'path: {{.Host.OCIRuntime.Path}}'
python3 -E -s -B "$register" unregister --state "$state" podman
! run rewarm 2>/dev/null
cmp /etc/containers/containers.conf "$scratch/before"
test ! -e /etc/containers/containers.conf.d
"""


def test_podman(tmp_path: Path, registered: Registered) -> None:
    """Nothing has to be told: the next podman knows the runtime, and the node's other ones stay."""
    with tempfile.TemporaryDirectory(prefix="rwt-", dir="/run") as run:  # podman wants a short path
        cgroup = f"{cgroup_parent()}/{Path(run).name}"
        done = command(
            *("unshare", "--mount", "bash", "-c", PODMAN, "podman", tmp_path / "p", REGISTER, registered.binary),
            *(registered.state, rootfs.base(), run, cgroup),
            timeout=120,
        )
    cgroups.remove(cgroup)
    cgroups.remove_empty(cgroup_parent())
    words = done.stdout.splitlines()
    assert words[0] == "podman changed"
    assert words[1:] == ["rewarm: runs", "runc: runs", f"path: {registered.binary}", "podman changed"]
