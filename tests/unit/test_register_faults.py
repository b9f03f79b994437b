"""install/register.py where files are odd or it is killed, for every engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from support.registering import BINARY, ENGINES, FILES, INSTALL, at, content, without_state, write

CONTAINERD = """\
version = 2
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
"""


def original_of(engine: str) -> str:
    """A file that the engine may have where rewarm's goes; for a drop-in there is none."""
    return {"containerd": CONTAINERD, "docker": '{"debug": true}'}.get(engine, "")


KILLED = """\
import os, sys
sys.path.insert(0, sys.argv[1])
import register
left = [int(sys.argv[2])]
def counted(real):
    def step(*arguments):
        left[0] -= 1
        if left[0] == 0:
            os._exit(137)
        return real(*arguments)
    return step
os.replace, os.unlink, os.rmdir = counted(os.replace), counted(os.unlink), counted(os.rmdir)
sys.exit(register.main(sys.argv[3:]))
"""


def killed_at(step: int, *words: str) -> bool:
    """Runs register.py until its `step`th rename or removal. False if it came to an end before."""
    command = [sys.executable, "-E", "-s", "-B", "-c", KILLED, str(INSTALL), str(step), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60).returncode == 137


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("command", ["register", "unregister"])
def test_killed_between_two_steps(tmp_path: Path, engine: str, command: str) -> None:
    """A second run of either kind mends it, to the byte; the file has no last newline."""
    step, ended = 0, False
    while not ended:
        step += 1
        for mend in ("unregister", "register"):
            directory = tmp_path / f"{step}-{mend}"
            one = at(directory, engine)
            one.config.parent.parent.mkdir(parents=True)
            if original_of(engine):
                write(one.config, original_of(engine).rstrip("\n")).chmod(0o640)
            before = without_state(directory)
            words = [command, "--state", str(one.state)]
            if command != "register":
                one.register()
            words += [engine] if command == "unregister" else ["--binary", BINARY, f"{engine}={one.config}"]
            ended = not killed_at(step, *words)
            if mend == "register":
                one.register()
                assert BINARY in one.config.read_text()
            one.unregister()
            assert without_state(directory) == before, (step, mend)
    assert step > 1


def test_killed_while_the_block_is_refreshed(tmp_path: Path) -> None:
    """Whichever block is left, it is rewarm's: the file goes back to what it was, its missing newline too."""
    step, ended = 0, False
    while not ended:
        step += 1
        one = at(tmp_path / str(step), "containerd")
        original = write(one.config, CONTAINERD.rstrip("\n")).read_bytes()
        older = one.state / "older"
        older.mkdir(parents=True)
        # An install of an earlier rewarm, whose block had other words.
        for name in INSTALL.glob("*.py"):
            (older / name.name).write_text(name.read_text().replace("written by rewarm's install.sh", "written by it"))
        words = ["register", "--state", str(one.state), "--binary", BINARY, f"containerd={one.config}"]
        subprocess.run([sys.executable, "-B", str(older / "register.py"), *words], check=True, capture_output=True)
        assert "(written by it" in one.config.read_text()
        ended = not killed_at(step, *words)
        one.unregister()
        assert one.config.read_bytes() == original, step
    assert "(written by it" not in one.config.read_text() and step > 2


# Odd files


@pytest.mark.parametrize("engine", ENGINES)
def test_symlink_mode_and_owner_stay(tmp_path: Path, engine: str) -> None:
    one = at(tmp_path, engine)
    real = write(tmp_path / "real/file", original_of(engine))
    one.config.parent.mkdir(parents=True)
    one.config.symlink_to("../" * (len(FILES[engine].split("/")) - 1) + "real/file")
    real.chmod(0o600)
    os.chown(real, 12345, 54321)
    before = content(tmp_path)
    one.register()
    status = real.stat()
    assert one.config.is_symlink()
    assert (status.st_mode & 0o7777, status.st_uid, status.st_gid) == (0o600, 12345, 54321)
    assert BINARY in real.read_text()
    assert all(path.stat().st_mode & 0o077 == 0 for path in one.state.glob("*.orig")), "it may hold secrets"
    one.unregister()
    assert without_state(tmp_path) == before


@pytest.mark.parametrize("engine", ENGINES)
def test_symlink_to_nothing(tmp_path: Path, engine: str) -> None:
    one = at(tmp_path, engine)
    one.config.parent.mkdir(parents=True)
    (tmp_path / "real").mkdir()
    one.config.symlink_to(tmp_path / "real/file")
    before = content(tmp_path)
    one.register()
    assert BINARY in (tmp_path / "real/file").read_text()
    one.unregister()
    assert without_state(tmp_path) == before


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("odd", ["directory", "fifo", "loop", "file above", "not text"])
def test_refused_by_name(tmp_path: Path, engine: str, odd: str) -> None:
    one = at(tmp_path, engine)
    if odd == "file above":
        write(one.config.parent, "")
    else:
        one.config.parent.mkdir(parents=True)
    if odd == "directory":
        one.config.mkdir()
    elif odd == "fifo":
        os.mkfifo(one.config)
    elif odd == "loop":
        one.config.symlink_to(one.config.name)
    elif odd == "not text":
        one.config.write_bytes(b"# \xff\n")
    done = one.try_register()
    assert (done.returncode, done.stdout) == (1, f"{engine} refused\n"), done.stderr
    assert str(one.config) in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("engine", ENGINES)
def test_where_nothing_can_be_written(tmp_path: Path, engine: str) -> None:
    """A read-only mount: the error names the file, and nothing is on record."""
    one = at(tmp_path, engine)
    one.config.parent.mkdir(parents=True)
    script = 'mount --bind "$1" "$1" && mount -o remount,bind,ro "$1" && shift && exec "$@"'
    words = [sys.executable, "-B", str(INSTALL / "register.py"), "register", "--state", str(one.state)]
    words += ["--binary", BINARY, f"{engine}={one.config}"]
    command = ["unshare", "--mount", "sh", "-c", script, "sh", str(tmp_path / "etc"), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, f"{engine} refused\n"), done.stderr
    assert f"{one.config} cannot be written" in done.stderr and "Read-only file system" in done.stderr
    assert one.unregister() == "unchanged"


DAEMONSET = "-all,+chown,+dac_override,+net_admin,+mknod,+sys_admin,+sys_chroot,+sys_ptrace"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("agrees", [True, False])
def test_a_file_that_is_not_roots(tmp_path: Path, engine: str, agrees: bool) -> None:
    """With the DaemonSet's capabilities root may change the mode and the times of its own files only."""
    one = at(tmp_path, engine)
    write(one.config, original_of(engine)).chmod(0o640)
    os.utime(one.config, (10**9, 10**9))
    os.setxattr(one.config, "user.mine", b"x")
    os.chown(one.config, 12345, 54321)
    validates = f'test "$1" != --help || exec echo --validate\ntest ! -e {tmp_path}/no'
    reads = f'if test -e {tmp_path}/no && grep -q rewarm-runc "$2"; then exit 1; else cat "$2"; fi'
    program = write(tmp_path / "program", f"#!/bin/sh\n{validates if engine == 'docker' else reads}\n")
    program.chmod(0o755)
    asked = engine in ("containerd", "docker")
    if not agrees:
        write(tmp_path / "no", "")
    words = [sys.executable, "-B", str(INSTALL / "register.py"), "register", "--state", str(one.state)]
    words += ["--binary", BINARY, f"{engine}={one.config}:{program if asked else ''}"]
    done = subprocess.run(["setpriv", "--bounding-set", DAEMONSET, *words], capture_output=True, text=True, timeout=60)
    registered = agrees or not asked
    assert done.stdout == f"{engine} {'changed' if registered else 'refused'}\n", done.stderr
    assert registered or "put back as it was" in done.stderr
    status = one.config.stat()
    assert (status.st_mode & 0o7777, status.st_uid, status.st_gid) == (0o640, 12345, 54321)
    assert os.getxattr(one.config, "user.mine") == b"x"
    assert (BINARY in one.config.read_text()) == registered
    assert registered or status.st_mtime == 10**9


@pytest.mark.parametrize("engine", ENGINES)
def test_a_part_that_somebody_has_torn(tmp_path: Path, engine: str) -> None:
    """Where rewarm's part ends would be a guess: it is said, and the original stays on record."""
    one = at(tmp_path, engine)
    if original_of(engine):
        write(one.config, original_of(engine))
    one.register()
    whole = one.config.read_text()
    one.config.write_text(whole[: whole.rindex("\n", 0, -1)] if engine != "docker" else whole[:-2])
    done = one.run("unregister", engine)
    assert (done.returncode, done.stdout) == (1, f"{engine} refused\n")
    assert str(one.config) in done.stderr and "Traceback" not in done.stderr
    one.config.write_text(whole)
    assert one.unregister() == "changed"
    assert (one.config.read_text() if one.config.exists() else "") == original_of(engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_read_only_file(tmp_path: Path, engine: str) -> None:
    one = at(tmp_path, engine)
    if original_of(engine):
        write(one.config, original_of(engine)).chmod(0o444)
    one.config.parent.mkdir(parents=True, exist_ok=True)
    before = content(tmp_path)
    one.register()
    one.unregister()
    assert without_state(tmp_path) == before


def test_imports_in_a_loop(tmp_path: Path) -> None:
    one = at(tmp_path, "containerd")
    other = write(one.config.parent / "other.toml", f'version = 2\nimports = ["{one.config}", "other.toml"]\n')
    write(one.config, 'imports = ["other.toml", "config.toml"]\n' + CONTAINERD)
    before = content(tmp_path)
    one.register()
    assert BINARY in one.config.read_text() and BINARY not in other.read_text()
    one.unregister()
    assert without_state(tmp_path) == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("imports = 7\n", "imports is not a list of strings"),
        ('version = 2\nplugins = "x"\n', "plugins is not a table"),
        ('version = [2]\nroot = "/x"\n', "configuration version [2]"),
        (CONTAINERD.replace('"io.containerd.runc.v2"', "7"), "runtime_type 7"),
        (CONTAINERD + "  pod_annotations = 7\n", "pod_annotations is not a list of strings"),
        (CONTAINERD + "  options = 7\n", "options is not a table"),
    ],
)
def test_containerd_of_odd_form(tmp_path: Path, text: str, message: str) -> None:
    one = at(tmp_path, "containerd")
    write(one.config, text)
    assert message in one.refused()


def test_version_3_with_streaming_under_the_old_name(tmp_path: Path) -> None:
    one = at(tmp_path, "containerd")
    old, new = "io.containerd.grpc.v1.cri", "io.containerd.cri.v1.runtime"
    text = CONTAINERD.replace("version = 2", "version = 3").replace(old, new)
    write(one.config, text + f'[plugins."{old}"]\n  disable_tcp_service = true\n')
    one.register()
    plugins = tomllib.loads(one.config.read_text())["plugins"]
    assert set(plugins[new]["containerd"]["runtimes"]) == {"runc", "rewarm"}
    assert plugins[old] == {"disable_tcp_service": True}


def test_one_engines_refusal_is_no_other_ones(tmp_path: Path) -> None:
    docker, podman = at(tmp_path, "docker"), at(tmp_path, "podman")
    write(docker.config, "{")
    done = docker.run("register", "--binary", BINARY, f"docker={docker.config}", f"podman={podman.config}")
    assert (done.returncode, done.stdout) == (1, "docker refused\npodman changed\n")
    record = json.loads((docker.state / "engines.json").read_text())
    place = {"config": str(podman.config), "program": "", "files": [str(podman.config)], "runc": "", "copied": ""}
    assert record == {"podman": place}


# The default runtime


@pytest.mark.parametrize(
    ("engine", "line"),
    [
        ("containerd", '[plugins."io.containerd.grpc.v1.cri".containerd]\n  default_runtime_name = "rewarm"\n'),
        ("docker", '{"default-runtime": "rewarm"}'),
    ],
)
def test_the_default_runtime_is_not_taken_away(tmp_path: Path, engine: str, line: str) -> None:
    """An engine whose default runtime is gone does not start."""
    one = at(tmp_path, engine)
    write(one.config, original_of(engine))
    one.register()
    text = one.config.read_text()
    changed = text + line if engine == "containerd" else json.dumps(json.loads(text) | json.loads(line))
    one.config.write_text(changed)
    done = one.run("unregister")
    assert done.returncode == 1 and "makes rewarm the default runtime" in done.stderr, done.stderr
    assert one.config.read_text() == changed
    if engine == "containerd":
        one.config.write_text(text + '# default_runtime_name = "rewarm"\n')
        assert "makes rewarm" not in one.run("unregister").stderr
        write(one.config, original_of(engine))
        one.register()
        text = one.config.read_text()
    one.config.write_text(text)
    assert one.unregister() == "changed" and one.config.read_text() == original_of(engine)


@pytest.mark.parametrize(
    ("engine", "file", "text"),
    [
        ("crio", "etc/crio/crio.conf", '[crio.runtime]\ndefault_runtime = "rewarm"\n'),
        ("crio", "etc/crio/crio.conf.d/10-ours.conf", 'crio.runtime.default_runtime = "rewarm"\n'),
        ("podman", "etc/containers/containers.conf", '[engine]\nruntime = "rewarm"\n'),
    ],
)
def test_the_default_runtime_that_another_file_names(tmp_path: Path, engine: str, file: str, text: str) -> None:
    """By a drop-in it is never rewarm's own file that says so, and the engine would not start with it either."""
    one = at(tmp_path, engine)
    other = write(tmp_path / file, text)
    one.register()
    before = content(tmp_path)
    done = one.run("unregister", engine)
    assert (done.returncode, done.stdout) == (1, f"{engine} refused\n")
    assert f"{other} makes rewarm the default runtime" in done.stderr
    assert content(tmp_path) == before
    other.write_text(text.replace('"rewarm"', '"runc"'))
    assert one.unregister() == "changed" and not one.config.exists()


def test_what_is_left_out_stays_recorded(tmp_path: Path) -> None:
    """doctor --node goes by the record: an engine that is registered fails there when its runtime is lost."""
    docker, podman = (at(tmp_path, name) for name in ("docker", "podman"))
    write(docker.config, original_of("docker"))
    docker.register()
    done = podman.run("register", "--binary", BINARY, f"podman={podman.config}:")
    assert done.returncode == 0, done.stderr
    assert set(json.loads((docker.state / "engines.json").read_text())) == {"docker", "podman"}
    assert docker.unregister() == "changed"
    assert set(json.loads((docker.state / "engines.json").read_text())) == {"podman"}


def test_originals_that_others_could_read(tmp_path: Path) -> None:
    """Earlier versions kept them so; the next run of any kind takes that away."""
    one = at(tmp_path, "docker")
    write(one.config, original_of("docker"))
    one.register()
    (original,) = one.state.glob("*.orig")
    original.chmod(0o644)
    one.register()
    assert original.stat().st_mode & 0o777 == 0o600
