"""Reads containerd's configuration the way containerd does, and asks containerd itself what it makes of it.

Standard library only; used by register_containerd.py. Nothing here writes a file of the node.

What it rests on (seen with containerd 1.6, 2.1 and 2.4): files named by `imports` are loaded after the file that names
them. In 1.6 a plugin's table in a later file replaces the whole table of an earlier one, and a `runtimes` table in a
file replaces the built-in one, so that naming only one runtime would lose `runc`. From 2.1 on tables are merged, but
only those of one configuration version: a table of version 3 makes containerd 2.1 forget all of version 2.
"""

from __future__ import annotations

import functools
import glob
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine import PROGRAM, RUNTIME
from journal import Journal, Refused, read_text
from toml_text import check_whole, parse, strings, table

PLUGINS = {2: "io.containerd.grpc.v1.cri", 3: "io.containerd.cri.v1.runtime", 4: "io.containerd.cri.v1.runtime"}
CRI_NAMES = {"cri", *PLUGINS.values()}


@dataclass(frozen=True)
class ConfigFile:
    """One file of containerd's configuration; `text` is None when there is no such file yet."""

    path: Path
    text: str | None
    base: str = ""  # the text without rewarm's part
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def base_data(self) -> dict[str, Any]:
        return parse(self.base, self.path)

    def runtimes(self) -> dict[str, dict[str, Any]]:
        """The runtimes that the text without rewarm's part names."""
        return runtimes_in(self.base_data, self.path)


def read(path: Path, journal: Journal) -> ConfigFile:
    """Reads one file. Raises Refused."""
    text = read_text(path)
    if text is None:
        return ConfigFile(path, None)
    check_whole(text, path)
    return ConfigFile(path, text, journal.base(text, path), parse(text, path))


def own(data: dict[str, Any], path: Path) -> list[tuple[str, ...]]:
    """Where a file's data has rewarm's runtime, if it runs rewarm: see toml_own."""
    places = [("plugins", plugin, "containerd", "runtimes") for plugin in dict.fromkeys(PLUGINS.values())]
    return [
        (*place, RUNTIME)
        for place in places
        if os.path.basename(binary_of(table(data, path, *place, RUNTIME), path)) == PROGRAM
    ]


def load(main: Path, journal: Journal, containerd: Containerd | None = None) -> list[ConfigFile]:
    """The main file and what it imports, in the order in which containerd merges them (the last one wins)."""
    files: list[ConfigFile] = []
    pending, seen = [main], set[Path]()
    while pending:
        path = pending.pop(0)
        if path in seen:
            continue
        seen.add(path)
        config = read(path, journal)
        if config.text is None and path != main:
            raise Refused(f"{path}, imported by {main}, does not exist; containerd itself would not start with it")
        files.append(config)
        for pattern in imports_of(config, containerd):
            # Go's patterns take dotfiles, too.
            found = sorted(glob.glob(pattern, include_hidden=True)) if "*" in pattern else [pattern]
            pending += map(Path, found)
    return files


def imports_of(config: ConfigFile, containerd: Containerd | None) -> list[str]:
    """What a file imports: absolute paths and patterns."""
    names = strings(config.data, config.path, "imports")
    relative = any("*" in name and not os.path.isabs(name) for name in names)
    elsewhere = relative and containerd is not None and not containerd.globs_beside()
    return [os.path.normpath(Path("/" if elsewhere and "*" in name else config.path.parent, name)) for name in names]


def plugin_names(data: dict[str, Any]) -> list[str]:
    """Under which names a file may have the runtimes. In version 3 the old name is that of streaming alone."""
    version = data.get("version")
    return [PLUGINS[3]] if version in (3, 4) else [PLUGINS[2], PLUGINS[3]]


def cri_table(data: dict[str, Any], path: Path) -> dict[str, Any]:
    plugins = table(data, path, "plugins")
    return next((table(plugins, path, name) for name in plugin_names(data) if name in plugins), {})


def runtimes_in(data: dict[str, Any], path: Path) -> dict[str, dict[str, Any]]:
    found = table(cri_table(data, path), path, "containerd", "runtimes")
    return {name: table(found, path, name) for name in found}


def binary_of(runtime: dict[str, Any], path: Path) -> str:
    return str(table(runtime, path, "options").get("BinaryName", ""))


class Containerd:
    """The containerd program, asked for its version and for what it makes of a configuration."""

    def __init__(self, program: str) -> None:
        self.program = program

    def _run(self, *args: str) -> str:
        try:
            # Where a service runs: 1.6 looks for relative patterns in the directory that it is started in.
            done = subprocess.run(
                [self.program, *args], cwd="/", capture_output=True, text=True, errors="replace", timeout=60
            )
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
        return {name: without_empty(found) for name, found in runtimes_in(parse(dump, main), main).items()}

    def merges_imports(self, version: int) -> bool:
        """Whether an imported file adds to a plugin's table, tried with two files: versions alone do not say it."""
        return {"rewarm-a", "rewarm-b"} <= self._tried(version, "{directory}/other.toml")

    @functools.cache  # noqa: B019 - there is one for a run
    def globs_beside(self) -> bool:
        """Whether a relative pattern is one for files beside the importing one; for 1.6 it is not."""
        found = self._tried(2, "other*.toml")
        return "rewarm-b" in found or not found

    def migration(self) -> str:
        """The command that prints a configuration in a newer version."""
        return "migrate" if re.search(r"^\s+migrate\s", self._run("config", "--help"), re.MULTILINE) else "dump"

    def _tried(self, version: int, imported: str) -> set[str]:
        """The runtimes of two files in a directory of their own: `rewarm-a` is in the one that imports the other."""
        runtime = f'[plugins."{PLUGINS[version]}".containerd.runtimes.%s]\n  runtime_type = "io.containerd.runc.v2"\n'
        with tempfile.TemporaryDirectory(prefix="rewarm-try-") as name:
            main, other = Path(name, "main.toml"), Path(name, "other.toml")
            imports = imported.format(directory=name)
            main.write_text(f'version = {version}\nimports = ["{imports}"]\n' + runtime % "rewarm-a")
            other.write_text(f"version = {version}\n" + runtime % "rewarm-b")
            try:
                return set(self.effective(main))
            except Refused:  # a version that this containerd does not know; its own file will say so, too
                return set()


def without_empty(found: dict[str, Any]) -> dict[str, Any]:
    """`config dump` prints every field; empty strings, lists and zeros are what an absent field means, too."""
    kept = {k: without_empty(v) if isinstance(v, dict) else v for k, v in found.items()}
    return {k: v for k, v in kept.items() if isinstance(v, bool) or v not in ("", 0, [], {})}


def owner_of(files: list[ConfigFile]) -> ConfigFile:
    """The file with the last word on the CRI plugin: the last one that has its table, else the main file."""
    return next((f for f in reversed(files) if cri_table(f.base_data, f.path)), files[0])


def version_of(main: ConfigFile, containerd: Containerd | None = None) -> int:
    """The configuration version of a main file that says something. Raises Refused for one that rewarm cannot edit."""
    version = main.base_data.get("version", 1)
    if not isinstance(version, int) or version not in PLUGINS:
        command = containerd.migration() if containerd else "migrate"
        raise Refused(
            f"{main.path} has configuration version {version}, rewarm can edit {', '.join(map(str, PLUGINS))}; "
            f"convert it ('containerd --config {main.path} config {command}' prints it in a newer one) and run again"
        )
    return version


def plugin_for(owner: ConfigFile, main: ConfigFile, containerd: Containerd | None) -> tuple[str, str]:
    """The name of the CRI plugin's table in `owner`, and the `version` line that an empty file needs."""
    plugins = table(owner.base_data, owner.path, "plugins")
    named = [name for name in plugin_names(owner.base_data) if name in plugins]
    if named:
        return named[0], ""
    if not main.base_data:
        version = containerd.default_version() if containerd else 2
        return PLUGINS[version], f"version = {version}\n"
    return PLUGINS[version_of(main, containerd)], ""


def drop_in_for(files: list[ConfigFile], containerd: Containerd | None) -> Path | None:
    """Where a drop-in of rewarm's own would be read and merged: in the first directory that the main file imports.

    None where this containerd replaces tables, where files have the plugin's table in different versions, which are not
    merged, or where the main file imports no directory: then it would have to be edited for the import, and one edited
    file is better than two.
    """
    main = files[0]
    if containerd is None or not main.base_data:
        return None
    version = version_of(main, containerd)
    named = [file.base_data.get("version", version) for file in files if cri_table(file.base_data, file.path)]
    for pattern in imports_of(main, containerd):
        place = Path(pattern)
        if place.name == "*.toml" and "*" not in str(place.parent):
            merged = all(other == version for other in named) and containerd.merges_imports(version)
            return place.parent / "rewarm.toml" if merged else None
    return None
