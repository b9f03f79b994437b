"""install/register.py, run as install.sh runs it, on files of a test's own."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

INSTALL = Path(__file__).parents[2] / "install"
BINARY = "/opt/rewarm/bin/rewarm-runc"
ENGINES = ("containerd", "crio", "docker", "podman")
FILES = {
    "containerd": "etc/containerd/config.toml",
    "crio": "etc/crio/crio.conf.d/99-rewarm.conf",
    "docker": "etc/docker/daemon.json",
    "podman": "etc/containers/containers.conf.d/rewarm.conf",
}


class Registering:
    """One engine's configuration file `config`, and a state directory beside it."""

    def __init__(self, engine: str, config: Path, state: Path) -> None:
        self.engine = engine
        self.config = config
        self.state = state

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-E", "-s", "-B", str(INSTALL / "register.py")]
        command += [words[0], "--state", str(self.state), *words[1:]]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    def try_register(self, binary: str = BINARY, program: str = "") -> subprocess.CompletedProcess[str]:
        return self.run("register", "--binary", binary, f"{self.engine}={self.config}:{program}")

    def register(self, binary: str = BINARY) -> str:
        """ "changed" or "unchanged"."""
        return self._word(self.try_register(binary))

    def unregister(self) -> str:
        return self._word(self.run("unregister", self.engine))

    def refused(self, binary: str = BINARY) -> str:
        """The message of a registration that has to fail and to change nothing."""
        before = self._files()
        done = self.try_register(binary)
        assert (done.returncode, done.stdout) == (1, f"{self.engine} refused\n"), done.stderr
        assert "Traceback" not in done.stderr
        assert self.unregister() == "unchanged"
        assert self._files() == before
        assert not list(self.state.iterdir())
        return done.stderr

    def _files(self) -> dict[str, object]:
        return {
            name: what
            for name, what in content(self.config.parent).items()
            if not (self.config.parent / name).is_relative_to(self.state)
        }

    def _word(self, done: subprocess.CompletedProcess[str]) -> str:
        assert done.returncode == 0, done.stderr
        engine, word = done.stdout.split()
        assert engine == self.engine
        return word


def content(directory: Path) -> dict[str, object]:
    """Every path below a directory: a file's bytes, mode and owner, a link's target."""
    found: dict[str, object] = {}
    for path in sorted(directory.rglob("*")):
        name = str(path.relative_to(directory))
        if path.is_symlink():
            found[name] = path.readlink()
        elif path.is_file():
            status = path.stat()
            found[name] = (path.read_bytes(), status.st_mode, status.st_uid, status.st_gid)
        else:
            found[name] = path.stat().st_mode
    return found


def without_state(directory: Path) -> dict[str, object]:
    return {path: what for path, what in content(directory).items() if path.partition("/")[0] != "state"}


def at(directory: Path, engine: str) -> Registering:
    return Registering(engine, directory / FILES[engine], directory / "state")


def write(path: Path, data: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def printed_anew(text: str) -> str:
    """TOML as programs print what they have loaded (nvidia-ctk, by go-toml): no comments, sorted, tables spread."""
    return "".join(_printed(tomllib.loads(text), ()))


def _printed(table: dict[str, Any], path: tuple[str, ...]) -> Iterator[str]:
    values = {key: value for key, value in sorted(table.items()) if not isinstance(value, dict)}
    indent = "  " * len(path)
    # Strings, lists of them, numbers and booleans are written in JSON as in TOML.
    yield from (f"{indent}{key} = {json.dumps(value)}\n" for key, value in values.items())
    for key, value in sorted(table.items()):
        if isinstance(value, dict):
            name = (*path, key if key.isidentifier() else json.dumps(key))
            yield f"\n{indent}[{'.'.join(name)}]\n"
            yield from _printed(value, name)
