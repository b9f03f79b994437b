"""Reads containerd's configuration the way containerd does, and asks containerd itself what it makes of it.

Standard library only; used by register_containerd.py. Nothing here writes a file.

What it rests on (seen with containerd 1.6 and 2.1): files named by `imports` are loaded after the file that names
them, and a plugin's table in a later file replaces the whole table of an earlier one; a `runtimes` table in a file
replaces the built-in one, so that naming only one runtime would lose `runc`.
"""

from __future__ import annotations

import glob
import json
import os
import re
import subprocess
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PLUGINS = {2: "io.containerd.grpc.v1.cri", 3: "io.containerd.cri.v1.runtime", 4: "io.containerd.cri.v1.runtime"}
CRI_NAMES = {"cri", *PLUGINS.values()}
BEGIN = "# BEGIN rewarm runtime (written by rewarm's install.sh, removed by its uninstall.sh)"
END = "# END rewarm runtime"
BLOCK = re.compile(r"^# BEGIN rewarm runtime[^\n]*\n.*?^# END rewarm runtime[^\n]*(?:\n|\Z)", re.MULTILINE | re.DOTALL)


class Refused(Exception):
    """The configuration cannot be changed safely. The text says which file, why, and what to do about it."""


@dataclass(frozen=True)
class ConfigFile:
    """One file of containerd's configuration; `text` is None when there is no such file yet."""

    path: Path
    text: str | None
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def base(self) -> str:
        """The text without rewarm's block."""
        return BLOCK.sub("", self.text or "")

    def runtimes(self) -> dict[str, dict[str, Any]]:
        """The runtimes that the text without rewarm's block names."""
        return runtimes_in(parse(self.base, self.path))


def parse(text: str, path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise Refused(f"{path} is not valid TOML: {error}; mend it and run again") from error


def read(path: Path) -> ConfigFile:
    """Reads one file. Bytes are decoded without newline translation, so that what is written back is the same."""
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        return ConfigFile(path, None)
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"{path} cannot be read: {error}") from error
    if text.count("# BEGIN rewarm runtime") != len(BLOCK.findall(text)):
        raise Refused(f"{path} has '{BEGIN[:22]}' without '{END}'; remove what is left of the block by hand")
    return ConfigFile(path, text, parse(text, path))


def load(main: Path) -> list[ConfigFile]:
    """The main file and what it imports, in the order in which containerd merges them (the last one wins)."""
    files: list[ConfigFile] = []
    pending, seen = [main], set[Path]()
    while pending:
        path = pending.pop(0)
        if path in seen:
            continue
        seen.add(path)
        config = read(path)
        if config.text is None and path != main:
            raise Refused(f"{path}, imported by {main}, does not exist; containerd itself would not start with it")
        files.append(config)
        for pattern in config.data.get("imports", []):
            absolute = os.path.normpath(path.parent / pattern)
            pending += [Path(p) for p in sorted(glob.glob(absolute))] if "*" in pattern else [Path(absolute)]
    return files


def cri_table(data: dict[str, Any]) -> dict[str, Any]:
    plugins = data.get("plugins", {})
    return next((plugins[name] for name in PLUGINS.values() if name in plugins), {})


def runtimes_in(data: dict[str, Any]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = cri_table(data).get("containerd", {}).get("runtimes", {})
    return found


class Containerd:
    """The containerd program, asked for its version and for what it makes of a configuration."""

    def __init__(self, program: str) -> None:
        self.program = program

    def _run(self, *args: str) -> str:
        try:
            done = subprocess.run([self.program, *args], capture_output=True, text=True, timeout=60, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise Refused(f"{self.program} could not be run: {error}") from error
        if done.returncode != 0:
            said = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no message"]
            raise Refused(f"{' '.join((self.program, *args))}: exit {done.returncode}: {said[0]}")
        return done.stdout

    def default_version(self) -> int:
        """The configuration version of a file that does not exist yet."""
        found = re.search(r"\sv?(\d+)\.\d+", self._run("--version"))
        if found is None:
            raise Refused(f"{self.program} --version does not say its version")
        return 2 if int(found[1]) < 2 else 3

    def effective(self, main: Path) -> dict[str, dict[str, Any]]:
        """The runtimes that containerd would have with this configuration, without values that say nothing."""
        dump = self._run("--config", str(main), "config", "dump") if main.exists() else self._run("config", "default")
        return {name: without_empty(table) for name, table in runtimes_in(parse(dump, main)).items()}


def without_empty(table: dict[str, Any]) -> dict[str, Any]:
    """`config dump` prints every field; empty strings, lists and zeros are what an absent field means, too."""
    kept = {k: without_empty(v) if isinstance(v, dict) else v for k, v in table.items()}
    return {k: v for k, v in kept.items() if isinstance(v, bool) or v not in ("", 0, [], {})}


def toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, str):
        # A JSON string is a TOML basic string, but for DEL, which TOML wants escaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")
    if isinstance(value, list):
        return "[" + ", ".join(toml_value(v) for v in value) + "]"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{toml_key(k)} = {toml_value(v)}" for k, v in value.items()) + " }"
    raise Refused(f"a runtime option has the value {value!r}, which cannot be copied")


def toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else toml_value(key)


def toml_table(path: tuple[str, ...], table: dict[str, Any]) -> list[str]:
    lines = [f"[{'.'.join(toml_key(p) for p in path)}]"]
    lines += [f"  {toml_key(k)} = {toml_value(v)}" for k, v in table.items() if not isinstance(v, dict)]
    for key, value in table.items():
        if isinstance(value, dict):
            lines += toml_table((*path, key), value)
    return lines


def owner_of(files: list[ConfigFile]) -> ConfigFile:
    """The file with the last word on the CRI plugin: the last one that has its table, else the main file."""
    return next((f for f in reversed(files) if cri_table(parse(f.base, f.path))), files[0])


def plugin_for(owner: ConfigFile, main: ConfigFile, containerd: Containerd | None) -> tuple[str, str]:
    """The name of the CRI plugin's table in `owner`, and the `version` line that an empty file needs."""
    base = parse(owner.base, owner.path)
    named = [name for name in PLUGINS.values() if name in base.get("plugins", {})]
    if named:
        return named[0], ""
    top = parse(main.base, main.path)
    if not top:
        version = containerd.default_version() if containerd else 2
        return PLUGINS[version], f"version = {version}\n"
    version = top.get("version", 1)
    if version not in PLUGINS:
        raise Refused(
            f"{main.path} has configuration version {version}, rewarm can edit {', '.join(map(str, PLUGINS))}; "
            f"convert it ('containerd --config {main.path} config migrate') and run again"
        )
    return PLUGINS[version], ""
