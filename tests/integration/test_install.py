"""install.sh and uninstall.sh for real: a venv, a C build, CRIU from the machine's mirror, containerd's own opinion.

Prefixes are temporary directories; the default prefix is used in a mount namespace in which /opt, /etc, /usr/local,
/var/lib and /run are copies.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from support.proc import wait_for

REPOSITORY = Path(__file__).parents[2]
INSTALL = REPOSITORY / "install/install.sh"
UNINSTALL = REPOSITORY / "install/uninstall.sh"
CRI = "io.containerd.grpc.v1.cri"

WITH_RUNC = """\
# a node's file
version = 2
[plugins."io.containerd.grpc.v1.cri".containerd]
  default_runtime_name = "runc"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      SystemdCgroup = true
"""
WITH_NVIDIA = (
    WITH_RUNC.replace('name = "runc"', 'name = "nvidia"')
    + """\
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.nvidia]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.nvidia.options]
      BinaryName = "/usr/bin/nvidia-container-runtime"
      SystemdCgroup = true
"""
)
PLAIN = """\
version = 2
[plugins."io.containerd.grpc.v1.cri".cni]
  bin_dir = "/usr/lib/cni"
"""


def run(
    *command: str | Path, env: Mapping[str, str] | None = None, timeout: float = 240
) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    return subprocess.run(words, capture_output=True, text=True, timeout=timeout, check=False, env=env)


def ok(*command: str | Path, env: Mapping[str, str] | None = None, timeout: float = 240) -> str:
    done = run(*command, env=env, timeout=timeout)
    assert done.returncode == 0, f"{done.args}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@contextlib.contextmanager
def environment_without(*programs: str) -> Iterator[dict[str, str]]:
    """This environment, with a PATH on which `programs` are not found."""
    # Not below pytest's directory: apt runs parts of itself as another user, who has to find programs, too.
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        directory.chmod(0o755)
        for source in ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin"):
            for entry in os.scandir(source):
                if entry.name not in programs and not (directory / entry.name).is_symlink():
                    (directory / entry.name).symlink_to(entry.path)
        yield {**os.environ, "PATH": name}


def checkout(directory: Path) -> Path:
    """A copy of what install.sh reads, as a fresh checkout has it."""
    built = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.so", "*.o", "_native.c", "build", ".*")
    for name in ("install", "config", "shim", "hooks", "native"):
        shutil.copytree(REPOSITORY / name, directory / name, ignore=built)
    for name in ("pyproject.toml", "setup.py", "README.md"):
        shutil.copy2(REPOSITORY / name, directory / name)
    return directory


def content(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@dataclass
class Node:
    prefix: Path
    config: Path
    source: Path
    env: dict[str, str]

    def install(self) -> str:
        script = self.source / "install/install.sh"
        return ok(script, "--prefix", self.prefix, "--containerd-config", self.config, "--no-packages", env=self.env)

    def register(self) -> None:
        ok(*self._script("register"), "--binary", self.binary, f"containerd={self.config}:{containerd()}")

    def unregister(self) -> str:
        return ok(*self._script("unregister"), "containerd").split()[1]

    def _script(self, command: str, state: Path | None = None) -> tuple[str | Path, ...]:
        script = REPOSITORY / "install/register.py"
        return "/usr/bin/python3", "-B", script, command, "--state", state or self.state

    @property
    def state(self) -> Path:
        return self.config.parent / "state"

    @property
    def binary(self) -> Path:
        return self.prefix / "bin/rewarm-runc"


def containerd() -> str:
    program = shutil.which("containerd")
    assert program, "containerd is not installed"
    return program


def effective(config: Path) -> dict[str, Any]:
    """The runtimes that containerd has with this configuration file."""
    dump = tomllib.loads(ok(containerd(), "--config", config, "config", "dump"))
    plugin = dump["plugins"].get("io.containerd.cri.v1.runtime") or dump["plugins"][CRI]
    runtimes: dict[str, Any] = plugin["containerd"]["runtimes"]
    return runtimes


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """An installation in a prefix of its own, made with no criu in PATH."""
    directory = tmp_path_factory.mktemp("install")
    config = directory / "config.toml"
    config.write_text(WITH_RUNC)
    with environment_without("criu") as env:
        fresh = Node(directory / "prefix", config, checkout(directory / "checkout"), env)
        before = content(fresh.source)
        fresh.install()
        assert content(fresh.source) == before  # no build artefact, nothing compiled
        yield fresh
    run(UNINSTALL, "--prefix", fresh.prefix, "--force")


def test_layout(node: Node) -> None:
    assert ok(node.binary, "--version") == ok("runc", "--version")
    assert json.loads(ok(node.binary, "features")) == json.loads(ok("runc", "features"))
    assert (node.prefix / "libexec/rewarm-guard").stat().st_mode & 0o777 == 0o755
    assert node.binary.stat().st_mode & 0o777 == 0o755
    assert os.readlink(node.prefix / "bin/rewarm") == "../venv/bin/rewarm"
    assert (node.prefix / "share/rewarm/config/config.yaml").is_file()
    python = node.prefix / "venv/bin/python3"
    assert python.resolve().parent == Path("/usr/bin")  # the system's, not a version manager's
    for package in ("rewarm", "rewarm_hooks", "rewarm_native"):
        assert ok(python, "-I", "-c", f"import {package}; print({package}.__path__[0])").startswith(f"{node.prefix}/")
    assert not list(node.prefix.glob("**/*.new.*"))


def test_command_line_tool(node: Node) -> None:
    assert "capture" in ok(node.prefix / "bin/rewarm", "--help")
    found = json.loads(run(node.prefix / "bin/rewarm", "doctor", "--json").stdout)["checks"]
    checks = {check["name"]: check for check in found}
    for name in ("criu", "criu check", "helper programs", "installation", "runc"):
        assert checks[name]["status"] == "ok", checks[name]


def test_parts_find_each_other_from_every_way_in(node: Node) -> None:
    """rewarm looks for its guard and its CRIU beside `venv`, by sys.prefix; the launcher starts a version by itself."""
    version = (node.prefix / "venv").resolve()
    for python in (node.prefix / "venv/bin/python3", version / "bin/python3", version / "../../venv/bin/python3"):
        found = ok(python, "-I", "-c", "from rewarm import installation; print(installation.prefix())")
        assert Path(os.path.normpath(found.strip())) == node.prefix
    first_line = (node.prefix / "bin/rewarm").read_text().splitlines()[0]
    assert first_line == f"#!{(node.prefix / 'venv').resolve()}/bin/python3 -I"


def test_criu(node: Node) -> None:
    criu = node.prefix / "criu/bin/criu"
    kernel = tuple(int(part) for part in os.uname().release.split(".")[:2])
    version = tuple(int(part) for part in ok(criu, "--version", env={}).split()[1].split("."))
    assert version >= ((4, 2) if kernel >= (6, 16) else (4, 1, 1))
    assert "Looks good" in ok(criu, "check", env={})
    ok(node.prefix / "criu/root/criu", "--version")


def test_containerd_sees_it(node: Node) -> None:
    assert node.config.read_text().startswith(WITH_RUNC)
    runtimes = effective(node.config)
    assert set(runtimes) == {"runc", "rewarm"}
    assert runtimes["rewarm"]["pod_annotations"] == ["rewarm.dev/*"]
    assert runtimes["rewarm"]["options"] == {"BinaryName": str(node.binary), "SystemdCgroup": True}


def test_second_run_is_quick_and_changes_nothing(node: Node) -> None:
    def facts() -> list[object]:
        targets = [(node.prefix / link).resolve() for link in ("venv", "criu/root")]
        return [
            targets,
            [path.stat().st_mtime_ns for path in targets],
            node.config.read_bytes(),
            node.config.stat().st_ino,
        ]

    before = facts()
    began = time.monotonic()
    said = node.install()
    took = time.monotonic() - began
    assert facts() == before
    assert "is installed already" in said
    assert "needs no change" in said
    assert took < 30


def test_an_incomplete_virtual_environment_is_made_anew(node: Node) -> None:
    target = (node.prefix / "venv").resolve()
    shutil.rmtree(next(target.glob("lib/python3*/site-packages/rewarm_hooks")))
    assert "building a virtual environment" in node.install()
    ok(node.prefix / "venv/bin/python3", "-I", "-c", "import rewarm_hooks")


def test_upgrade_keeps_what_running_processes_import_from(node: Node) -> None:
    old = (node.prefix / "venv").resolve()
    with (node.source / "shim/rewarm/errors.py").open("a") as out:
        out.write("NEW_HERE = 1\n")
    assert "building a virtual environment" in node.install()
    new = (node.prefix / "venv").resolve()
    assert new != old
    ok(node.prefix / "venv/bin/python3", "-I", "-c", "from rewarm.errors import NEW_HERE")
    ok(old / "bin/python3", "-I", "-c", "import rewarm.errors; assert not hasattr(rewarm.errors, 'NEW_HERE')")
    assert {path.name for path in new.parent.iterdir()} == {new.name, old.name}


def test_a_version_stays_while_it_is_used(node: Node) -> None:
    """A watcher may wait for its program for as long as that takes, and import what it needs then."""
    versions = node.prefix / "venvs"
    used, unused = versions / "0000000000000001", versions / "0000000000000002"
    for version in (used, unused):
        shutil.copytree((node.prefix / "venv").resolve(), version, symlinks=True)
    script = "import sys; print(flush=True); sys.stdin.read()"
    words: list[str | Path] = [used / "bin/python3", "-I", "-c", script]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        node.install()
        assert used.exists() and not unused.exists()
        process.kill()
    node.install()
    assert not used.exists()


@pytest.mark.parametrize("text", [PLAIN, WITH_RUNC, WITH_NVIDIA, "", None])
def test_registration_that_containerd_reads(node: Node, tmp_path: Path, text: str | None) -> None:
    """Every runtime stays what it was, also those that only containerd's defaults name."""
    here = Node(node.prefix, tmp_path / "config.toml", REPOSITORY, {})
    reference = tmp_path / "reference.toml"
    reference.write_text(text or "version = 2\n")
    before = effective(reference)
    if text is not None:
        here.config.write_text(text)
    here.register()
    after = effective(here.config)
    assert after.pop("rewarm")["options"]["BinaryName"] == str(node.binary)
    assert set(after) == set(before)
    for name, runtime in before.items():
        assert after[name]["runtime_type"] == runtime["runtime_type"]
        assert after[name]["options"].get("SystemdCgroup") == runtime["options"].get("SystemdCgroup")
        assert after[name]["options"].get("BinaryName", "") == runtime["options"].get("BinaryName", "")
    assert here.unregister() == "changed"
    assert (here.config.read_text() if here.config.exists() else None) == text


def test_registration_with_an_import(node: Node, tmp_path: Path) -> None:
    """containerd takes the plugin's whole table from the last file that has it, so that one gets the block."""
    here = Node(node.prefix, tmp_path / "config.toml", REPOSITORY, {})
    main = f'imports = ["{tmp_path}/conf.d/*.toml"]\n' + PLAIN
    here.config.write_text(main)
    drop_in = tmp_path / "conf.d/90-nvidia.toml"
    drop_in.parent.mkdir()
    drop_in.write_text(WITH_NVIDIA)
    here.register()
    assert set(effective(here.config)) == {"runc", "nvidia", "rewarm"}
    assert here.config.read_text() == main
    here.unregister()
    assert drop_in.read_text() == WITH_NVIDIA


def test_refuses_to_leave_a_running_container_without_its_runtime(node: Node) -> None:
    """conmon and the shims call the runtime by its path to kill and to delete."""
    script = "import sys, time; print(flush=True); time.sleep(600)"
    command = ["/usr/bin/python3", "-c", script, "--runtime", str(node.binary)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as user:
        assert user.stdout is not None
        user.stdout.readline()
        try:
            done = run(UNINSTALL, "--prefix", node.prefix)
        finally:
            user.kill()
    assert done.returncode == 1
    assert f"process {user.pid}: /usr/bin/python3" in done.stderr
    assert node.binary.exists()
    assert "BEGIN rewarm" in node.config.read_text()


def test_each_engine_by_its_file(node: Node, tmp_path: Path) -> None:
    """Files that are named choose the engines; a second run changes nothing, and a left-out one stays as it is."""
    places = {
        "--docker-config": tmp_path / "etc/docker/daemon.json",
        "--podman-config": tmp_path / "etc/containers/containers.conf.d/rewarm.conf",
        "--crio-config": tmp_path / "etc/crio/crio.conf.d/99-rewarm.conf",
    }
    words: list[str | Path] = [node.source / "install/install.sh", "--prefix", node.prefix, "--no-packages"]
    for option, path in places.items():
        words += [option, path]
    before = node.config.read_bytes()
    settings = tmp_path / "etc/rewarm/config.yaml"
    said = ok(*words, "--settings", settings, env=node.env)
    assert "containerd: not registered (left out)" in said
    assert all(f"{name}: the runtime 'rewarm' is registered" in said for name in ("docker", "podman", "crio"))
    assert re.search("^ok +Podman ", said, re.MULTILINE), said
    assert all(str(node.binary) in path.read_text() for path in places.values())
    assert not settings.exists() and node.config.read_bytes() == before
    again = ok(*words, "--exclude-engines", "crio", "--settings", settings, env=node.env)
    assert "docker: needs no change" in again and "crio: not registered (left out)" in again
    places["--docker-config"].write_text("{")
    failed = run(*words, "--settings", settings, env=node.env)
    assert failed.returncode == 1
    assert f"docker: {places['--docker-config']} is not valid JSON" in failed.stderr
    assert "mend this and run again" in failed.stderr
    places["--docker-config"].unlink()
    ok(*node._script("unregister", node.prefix / "install-state"), "docker", "podman", "crio")
    assert not (tmp_path / "etc").exists()


def test_installed_but_not_ready(node: Node, tmp_path: Path) -> None:
    """What `doctor --node` finds at the end is the exit status and the last line."""
    settings = tmp_path / "config.yaml"
    settings.write_text("deadlin: 30\n")
    words: list[str | Path] = [node.source / "install/install.sh", "--prefix", node.prefix, "--no-packages"]
    done = run(*words, "--containerd-config", node.config, "--settings", settings, env=node.env)
    assert done.returncode == 3, done.stdout + done.stderr
    assert re.search("^failed +settings ", done.stdout, re.MULTILINE)
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"rewarm: error: installed in {node.prefix}, but the node is not ready: ")
    assert "rewarm: installed in" not in done.stdout
    assert "Exit status: 0" in ok(INSTALL, "--help")


def test_missing_packages_are_named(node: Node, tmp_path: Path) -> None:
    with environment_without("runc", "make") as env:
        done = run(INSTALL, "--prefix", tmp_path / "prefix", "--no-register", "--no-packages", env=env)
    assert done.returncode == 1
    assert "--no-packages was given: apt-get install make runc" in done.stderr
    assert not (tmp_path / "prefix/venv").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prefix", "relative"], "must be an absolute path"),
        (["--prefix", "/"], "must be a plain directory name"),
        (["--prefix", "/tmp/../usr"], "must be a plain directory name"),
        (["--prefix", "/tmp/with space"], "letters, digits"),
        (["--prefix"], "needs a value"),
        (["--what"], "unknown option '--what'"),
    ],
)
@pytest.mark.parametrize("script", [INSTALL, UNINSTALL])
def test_bad_arguments(script: Path, arguments: list[str], message: str) -> None:
    done = run(script, *arguments)
    assert done.returncode == 1
    assert message in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engines", "lxc"], "there is no engine 'lxc'"),
        (["--exclude-engines=docker,"], "there is no engine ''"),
        (["--docker-config", "/tmp/a:b"], "may hold no ':'"),
        (["--runc-config", "/tmp/a"], "unknown option '--runc-config'"),
        (["--docker-config", "/tmp/a", "--no-register"], "exclude each other"),
        (["--engines", "docker", "--no-register"], "exclude each other"),
        (["--engines"], "needs a value"),
    ],
)
def test_bad_engines(arguments: list[str], message: str) -> None:
    # No directory can be made there: whatever gets by the options ends before it could touch this machine.
    done = run(INSTALL, "--prefix", "/proc/never", "--no-packages", *arguments)
    assert done.returncode == 1
    assert message in done.stderr


def test_purge_is_for_the_node(tmp_path: Path) -> None:
    done = run(UNINSTALL, "--prefix", tmp_path / "prefix", "--purge")
    assert done.returncode == 1
    assert "with --prefix /opt/rewarm only" in done.stderr


@pytest.mark.parametrize("script", [INSTALL, UNINSTALL])
def test_needs_root(script: Path, tmp_path: Path) -> None:
    # A copy, since the checkout may lie where nobody else than root can look.
    copy = tmp_path / "install"
    shutil.copytree(script.parent, copy)
    for path in (tmp_path, *tmp_path.parents):
        if path == Path("/tmp"):
            break
        path.chmod(0o755)
    done = run("setpriv", "--reuid=65534", "--clear-groups", copy / script.name, "--prefix", "/tmp/never")
    assert done.returncode == 1
    assert "has to run as root" in done.stderr
    assert run(script, "--help").stdout.startswith(f"usage: {script.name}")


def test_one_at_a_time(node: Node) -> None:
    with subprocess.Popen(["flock", "--no-fork", str(node.prefix / ".lock"), "sleep", "600"]) as holder:
        try:
            deadline = time.monotonic() + 10
            while run("flock", "-n", node.prefix / ".lock", "true").returncode == 0:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            done = run(INSTALL, "--prefix", node.prefix, "--no-register", "--no-packages", env=node.env)
        finally:
            holder.kill()
    assert done.returncode == 1
    assert "another install.sh or uninstall.sh" in done.stderr


@contextlib.contextmanager
def in_a_container(prefix: Path) -> Iterator[None]:
    """A program that has the name of one of the prefix, where that is another directory: it needs nothing of this."""
    script = 'mount -t tmpfs tmpfs "$1" && mkdir "$1/bin" && cp /bin/sleep "$1/bin" && exec "$1/bin/sleep" 60'
    with subprocess.Popen(["unshare", "--mount", "sh", "-c", script, "sh", prefix]) as process:
        try:
            wait_for("it running", lambda: Path(f"/proc/{process.pid}/comm").read_text() == "sleep\n")
            yield
        finally:
            process.kill()


def test_uninstall_leaves_what_it_found(node: Node) -> None:
    """Last of the tests that use the installation: it is taken away, by the copy that was installed with it."""
    stranger = node.prefix / "bin/somebody-elses"
    stranger.write_text("")
    with in_a_container(node.prefix):
        said = ok(node.prefix / "share/rewarm/uninstall.sh", "--prefix", node.prefix)
    assert "removed from" in said
    assert node.config.read_text() == WITH_RUNC
    assert [path for path in node.prefix.rglob("*") if not path.is_dir()] == [stranger]
    stranger.unlink()
    assert "removed from" in ok(UNINSTALL, "--prefix", node.prefix)
    assert not node.prefix.exists()
    assert "nothing is installed" in ok(UNINSTALL, "--prefix", node.prefix)


NODE_SCRIPT = """
set -eu
scratch=$1 repository=$2
mount -t tmpfs tmpfs "$scratch"
for directory in /opt /etc /usr/local /var/lib; do
    upper=$scratch/upper$directory work=$scratch/work$directory
    mkdir -p "$upper" "$work"
    mount -t overlay overlay -o "lowerdir=$directory,upperdir=$upper,workdir=$work" "$directory"
done
mount -t tmpfs tmpfs /run
rm -rf /opt/rewarm /etc/rewarm /var/lib/rewarm /usr/local/bin/rewarm /usr/local/sbin/rewarm-runc
mkdir -p /etc/containerd /run/systemd/system
printf 'version = 2\\n' > /etc/containerd/config.toml
mkdir -p /etc/docker
printf '{"debug": true}' > /etc/docker/daemon.json
rm -rf /etc/containers/containers.conf.d
printf '#!/bin/sh\\necho "$@" >> %s/systemctl.log\\n' "$scratch" > /usr/local/bin/systemctl
chmod +x /usr/local/bin/systemctl
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin
"""


def in_node(tmp_path: Path, script: str) -> str:
    return ok("unshare", "--mount", "bash", "-c", NODE_SCRIPT + script, "node", tmp_path, REPOSITORY)


def test_the_nodes_own_install(tmp_path: Path) -> None:
    """The default prefix: links in /usr/local, each engine that is there, one restart or reload, state and purge.

    Before that, a containerd that does not start with the runtime: it gets its configuration back.
    """
    said = in_node(
        tmp_path,
        """
        cp /usr/local/bin/systemctl "$scratch/well"
        printf '#!/bin/sh\n! grep -q "BEGIN rewarm" /etc/containerd/config.toml || test "$1" != restart\n' \
            > /usr/local/bin/systemctl
        ! "$repository/install/install.sh" --no-packages --exclude-engines docker,podman 2>&1
        test "$(cat /etc/docker/daemon.json)" = '{"debug": true}'
        test "$(cat /etc/containerd/config.toml)" = 'version = 2'
        printf '#!/bin/sh\ntest "$1" != restart || kill -9 $PPID\n' > /usr/local/bin/systemctl
        ! "$repository/install/install.sh" --no-packages --exclude-engines docker,podman 2>&1
        grep -q 'BEGIN rewarm' /etc/containerd/config.toml
        cp "$scratch/well" /usr/local/bin/systemctl
        echo "---"
        "$repository/install/install.sh" --no-packages
        test "$(readlink /usr/local/bin/rewarm)" = /opt/rewarm/bin/rewarm
        rewarm-runc --version | cmp - <(runc --version)
        grep -q 'BinaryName = "/opt/rewarm/bin/rewarm-runc"' /etc/containerd/config.toml
        test -s /var/lib/rewarm/install/containerd.json
        grep -qF '"rewarm": {"path": "/opt/rewarm/bin/rewarm-runc"}' /etc/docker/daemon.json
        grep -qF 'rewarm = ["/opt/rewarm/bin/rewarm-runc"]' /etc/containers/containers.conf.d/rewarm.conf
        rewarm doctor --node || true
        "$repository/install/install.sh" --no-packages >/dev/null
        mkdir -p /run/rewarm/containers/run-runc/left /etc/rewarm /var/lib/rewarm/store/v1
        echo 'store: /srv/shared' > /etc/rewarm/config.yaml
        ! /opt/rewarm/share/rewarm/uninstall.sh 2>/dev/null
        rmdir /run/rewarm/containers/run-runc/left
        /opt/rewarm/share/rewarm/uninstall.sh
        test "$(cat /etc/containerd/config.toml)" = 'version = 2'
        test "$(cat /etc/docker/daemon.json)" = '{"debug": true}'
        test ! -e /etc/containers/containers.conf.d
        test ! -e /opt/rewarm -a ! -L /usr/local/bin/rewarm -a ! -L /usr/local/sbin/rewarm-runc
        test ! -e /var/lib/rewarm/install -a -e /var/lib/rewarm/store/v1
        mkdir -p "/var/lib/a claim" /var/lib/rewarm/shared
        : > "/var/lib/a claim/theirs"
        mount --bind "/var/lib/a claim" /var/lib/rewarm/shared
        ! "$repository/install/uninstall.sh" --purge 2>&1
        test -e "/var/lib/a claim/theirs" -a -e /etc/rewarm/config.yaml
        umount /var/lib/rewarm/shared
        "$repository/install/uninstall.sh" --purge
        test ! -e /var/lib/rewarm -a ! -e /etc/rewarm -a ! -e /run/rewarm
        cat "$scratch/systemctl.log"
        """,
    )
    failed, _, said = said.partition("---\n")
    assert "containerd: needs no change, but to be told of the last one" in said
    assert "its configuration was put back" in failed
    assert "installed in /opt/rewarm" in said
    assert "--purge: /var/lib/rewarm/shared is a mount" in said
    assert "remove the store, too: /srv/shared" in said
    assert said.count("restart containerd\n") == 2  # once for the install, once for the uninstall
    assert said.count("reload docker\n") == 2
    assert re.search("^ok +Podman +.* says podman$", said, re.MULTILINE)
    assert re.search("^warning +Docker +.*; dockerd does not answer", said, re.MULTILINE)
    assert not Path("/run/rewarm/containers/run-runc/left").exists()


def test_a_configuration_that_cannot_be_put_back(tmp_path: Path) -> None:
    """The runtime has become the default one meanwhile: then it is not said to be gone."""
    said = in_node(
        tmp_path,
        """
        table='plugins."io.containerd.grpc.v1.cri".containerd'
        install() { "$repository/install/install.sh" --no-packages --engines containerd "$@" 2>&1; }
        printf 'version = 2\n[%s.runtimes.runc]\n  runtime_type = "io.containerd.runc.v2"\n' "$table" \
            >/etc/containerd/config.toml
        install --no-restart >/dev/null
        printf '[%s]\n  default_runtime_name = "rewarm"\n' "$table" >>/etc/containerd/config.toml
        printf '[%s.runtimes.runc.options]\n  SystemdCgroup = true\n' "$table" >>/etc/containerd/config.toml
        cp /etc/containerd/config.toml "$scratch/before"
        printf '#!/bin/sh\ntest "$1" != restart\n' >/usr/local/bin/systemctl
        install && exit 1
        ! cmp -s /etc/containerd/config.toml "$scratch/before" # it was refreshed, which nobody has undone
        """,
    )
    assert "makes rewarm the default runtime" in said
    assert "could not be put back; mend what is named above" in said.splitlines()[-1]
    assert "was put back" not in said


def test_a_containerd_that_is_not_restarted(tmp_path: Path) -> None:
    """As asked: no failure, but another is one. As nobody asked, since systemd does not run it: status 3, until it is
    restarted by hand."""
    said = in_node(
        tmp_path,
        """
        begin() {
            rm -f /run/containerd/containerd.sock
            containerd >>"$scratch/containerd.log" 2>&1 &
            until [ -S /run/containerd/containerd.sock ]; do sleep 0.05; done
        }
        install() {
            status=0
            "$repository/install/install.sh" --no-packages --exclude-engines docker,podman "$@" 2>&1 || status=$?
            echo "status $status"
        }
        trap 'kill $!' EXIT
        begin
        install --no-restart
        mkdir -p /etc/rewarm && echo 'deadline: none' >/etc/rewarm/config.yaml
        install --no-restart
        rm /etc/rewarm/config.yaml
        printf '#!/bin/sh\nexit 3\n' > /usr/local/bin/systemctl
        install
        kill $! && wait $! || true
        sleep 3
        begin
        install
        """,
    )
    asked, wrong, unasked, well, last = said.split("status ")
    assert "ready when the engines named above are told (--no-restart was given)" in asked.splitlines()[-1]
    assert wrong.startswith("0\n") and "but the node is not ready" in wrong.splitlines()[-1]
    assert [part[0] for part in (unasked, well, last)] == ["3", "3", "0"]
    assert "containerd: not running under systemd; restart it yourself" in unasked
    assert "containerd was started before /etc/containerd/config.toml was changed" in unasked
    assert "but the node is not ready" in unasked.splitlines()[-1]
    assert "containerd runs with it" in well and "installed in /opt/rewarm; check" in well.splitlines()[-1]
    assert "containerd: needs no change\n" in well and "restart it" not in well, "it was told"


def test_sources_name_no_host() -> None:
    """Mirrors are the machine's own matter."""
    for path in (*REPOSITORY.glob("install/*"), *REPOSITORY.glob("config/*")):
        if path.is_file():
            text = path.read_text()
            assert "://" not in text.replace("file://", ""), path
            assert "debian.org" not in text and "ubuntu.com" not in text, path


def test_shell_scripts_are_clean() -> None:
    ok("shellcheck", "-x", *sorted(REPOSITORY.glob("install/*.sh")))
