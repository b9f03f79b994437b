#!/usr/bin/env python3
"""Adds the runtime `rewarm` to containerd's configuration, and takes it out again.

Standard library only: install.sh runs it with the system's python3 (>= 3.11, for tomllib).

The runtime goes, as one marked block, to the end of the file that has the last word on the CRI plugin: a drop-in of
rewarm's own would switch the node's settings off, since containerd merges whole plugin tables. Where no file names
any runtime the block names the built-in ones too, or `runc` would be gone. The user's file is edited as text and
never printed anew: comments and layout are the user's.

The file as it was found is kept in the state directory; `unregister` puts it back byte for byte as long as nobody
else changed the file since, and takes out only the marked block when somebody did.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

from containerd_config import (
    BEGIN,
    BLOCK,
    CRI_NAMES,
    END,
    ConfigFile,
    Containerd,
    Refused,
    cri_table,
    load,
    owner_of,
    plugin_for,
    runtimes_in,
    toml_table,
)

RUNTIME = "rewarm"
ANNOTATIONS = "rewarm.dev/*"
BUILT_IN: dict[str, dict[str, Any]] = {"runc": {"runtime_type": "io.containerd.runc.v2"}}


def derive(runtimes: dict[str, dict[str, Any]], default: str, binary: str) -> tuple[dict[str, Any], str]:
    """rewarm's runtime: runc's (or, where there is none, the default one's), with our binary and our annotations.

    Returns the table and the binary that the copied runtime named ("" for plain runc).
    """
    name = "runc" if "runc" in runtimes else default
    source = runtimes.get(name)
    if source is None:
        raise Refused(f"containerd has neither a runtime 'runc' nor its default runtime '{name}': nothing to copy")
    if source.get("runtime_type") != "io.containerd.runc.v2":
        raise Refused(
            f"the runtime '{name}' has runtime_type {source.get('runtime_type')!r}; "
            "rewarm works under 'io.containerd.runc.v2' only: change it, then run again"
        )
    options = dict(source.get("options", {}))
    replaced = str(options.get("BinaryName", ""))
    annotations = list(source.get("pod_annotations", []))
    if ANNOTATIONS not in annotations:
        annotations.append(ANNOTATIONS)
    table = {**source, "pod_annotations": annotations, "options": {**options, "BinaryName": binary}}
    return table, replaced


def atomic_write(path: Path, data: bytes) -> None:
    """Writes by rename in the same directory, at a symlink its target. Keeps mode and owner (new file: 0644)."""
    path = Path(os.path.realpath(path))
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".rewarm-tmp")
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(data)
            if path.exists():
                status = path.stat()
                os.fchown(out.fileno(), status.st_uid, status.st_gid)
                os.fchmod(out.fileno(), status.st_mode & 0o7777)
            else:
                os.fchmod(out.fileno(), 0o644)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):  # the rename may have happened
            os.unlink(temporary)
        raise
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Journal:
    """What was found and what was written, a file each: `containerd.json` and the originals beside it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.file = directory / "containerd.json"
        try:
            self.entries: dict[str, dict[str, str | None]] = json.loads(self.file.read_bytes())
        except FileNotFoundError:
            self.entries = {}
        except ValueError as error:
            raise Refused(
                f"{self.file} is damaged: {error}; remove it and rewarm's block in containerd's files"
            ) from error

    def original(self, path: Path) -> Path:
        return self.directory / (str(path).lstrip("/").replace("-", r"\x2d").replace("/", "-") + ".orig")

    def installed(self, path: Path) -> str | None:
        """The digest of the file as rewarm wrote it last, None if it never did."""
        return self.entries.get(str(path), {}).get("installed")

    def found(self, path: Path) -> bytes | None:
        """The file as it was found, None if there was none. Refused if the saved copy is damaged."""
        expected = self.entries[str(path)]["found"]
        if expected is None:
            return None
        try:
            saved = self.original(path).read_bytes()
        except FileNotFoundError:
            saved = b""
        if digest(saved) != expected:
            raise Refused(f"{self.original(path)} is not what was saved; remove rewarm's block in {path} by hand")
        return saved

    def note(self, path: Path, base: bytes | None, installed: bytes) -> None:
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o755)
        if base is not None:
            atomic_write(self.original(path), base)
        self.entries[str(path)] = {"installed": digest(installed), "found": None if base is None else digest(base)}
        self._save()

    def forget(self, path: Path) -> None:
        self.entries.pop(str(path), None)
        self._save()
        self.original(path).unlink(missing_ok=True)

    def _save(self) -> None:
        if self.entries:
            atomic_write(self.file, json.dumps(self.entries, indent=1, sort_keys=True).encode() + b"\n")
        else:
            self.file.unlink(missing_ok=True)


def say(message: str) -> None:
    print(f"rewarm: containerd: {message}", file=sys.stderr)


def foreign(config: Path, binary: str, files: list[ConfigFile]) -> bool:
    """True if the node's files name our runtime already, not by this script. Refused if theirs is another one."""
    for file in files:
        mine = file.runtimes().get(RUNTIME)
        if mine is not None and mine.get("options", {}).get("BinaryName") == binary:
            say(f"{file.path} names the runtime '{RUNTIME}' with {binary} already: left alone")
            return True
        if mine is not None:
            cause = f"has a runtime '{RUNTIME}' of its own that is not {binary}"
            raise Refused(f"{file.path} {cause}; rename or remove it, then run again")
        other = runtimes_in(file.data).get(RUNTIME, {}).get("options", {}).get("BinaryName", binary)
        if other != binary:
            cause = f"has the runtime '{RUNTIME}' of another rewarm, {other}"
            raise Refused(f"{file.path} {cause}; run that one's uninstall.sh first")
    disabled = {name for file in files for name in file.data.get("disabled_plugins", [])} & CRI_NAMES
    if disabled:
        say(f"{config} disables containerd's CRI plugin ({', '.join(sorted(disabled))}): nothing to register there")
        say(f"ctr and nerdctl take the runtime by its path: {binary}")
    return bool(disabled)


def block_for(owner: ConfigFile, plugin: str, effective: dict[str, dict[str, Any]], binary: str) -> list[str]:
    """The lines of the marked block: our runtime, and the built-in ones where the file names no runtime at all."""
    named = owner.runtimes()
    implied = {} if named else effective or BUILT_IN
    default = str(cri_table(owner.data).get("containerd", {}).get("default_runtime_name", "runc"))
    table, replaced = derive(named or implied, default, binary)
    if replaced not in ("", "runc"):
        say(f"note: the copied runtime ran {replaced}, rewarm runs runc below itself;")
        say("to keep it, put it first under 'runtimes:' in /etc/rewarm/config.yaml")
    path = ("plugins", plugin, "containerd", "runtimes")
    lines = [BEGIN]
    for name, built_in in implied.items():
        lines += toml_table((*path, name), built_in)
    return [*lines, *toml_table((*path, RUNTIME), table), END]


def register(config: Path, binary: str, state: Path, containerd: Containerd | None) -> bool:
    """Adds or refreshes the runtime. True if a file was changed. Raises Refused, with nothing changed."""
    main_path = Path(os.path.abspath(config))
    files = load(main_path)
    if foreign(config, binary, files):
        return False
    owner = owner_of(files)
    plugin, version_line = plugin_for(owner, files[0], containerd)
    before = containerd.effective(main_path) if containerd else {}
    before.pop(RUNTIME, None)
    block = "\n".join(block_for(owner, plugin, before, binary)) + "\n"
    base = owner.base
    text = base + ("\n" if base and not base.endswith("\n") else "") + version_line + block
    changed = False
    if text != owner.text:
        try:
            tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            cause = f"writes the runtimes in a form that cannot be extended at the file's end ({error})"
            raise Refused(f"{owner.path} {cause}; use [table] headers there, or add by hand:\n{block}") from error
        write(Journal(state), owner, text)
        changed = True
        if containerd:
            check(containerd, main_path, owner, before, binary, Journal(state))
    for file in files:  # a block that an earlier run left where the last word was then
        if file.path != owner.path and file.text not in (None, file.base):
            changed |= put_back(Journal(state), file.path)
    return changed


def write(journal: Journal, owner: ConfigFile, text: str) -> None:
    """Saves what was found, then writes the new text."""
    owner.path.parent.mkdir(parents=True, exist_ok=True)
    found = None if owner.text is None else owner.base.encode()
    if owner.text is not None and journal.installed(owner.path) == digest(owner.text.encode()):
        # Nobody but us wrote since: what was found the first time is still what uninstall has to put back.
        found = journal.found(owner.path)
    journal.note(owner.path, found, text.encode())
    atomic_write(owner.path, text.encode())


def check(
    containerd: Containerd, main: Path, owner: ConfigFile, before: dict[str, Any], binary: str, journal: Journal
) -> None:
    """Asks containerd whether it sees the new runtime, and every old one as before; else puts the file back."""
    try:
        after = containerd.effective(main)
        ours = after.pop(RUNTIME, {}).get("options", {}).get("BinaryName")
        if ours != binary:
            raise Refused(f"containerd does not see the runtime that was written to {owner.path}")
        if after != before:
            names = [name for name in {**before, **after} if after.get(name) != before.get(name)]
            raise Refused(f"what was written to {owner.path} would change the runtime {names[0]!r} for containerd")
    except Refused as error:
        if owner.text is None:
            owner.path.unlink()
            journal.forget(owner.path)
        else:
            atomic_write(owner.path, owner.text.encode())
            journal.note(owner.path, journal.found(owner.path), owner.text.encode())
        raise Refused(f"{error}; the file was put back as it was") from error


def put_back(journal: Journal, path: Path) -> bool:
    """Takes rewarm's block out of one file: by the original, if nobody changed the file since. True if changed."""
    try:
        current = path.read_bytes()
    except FileNotFoundError:
        current = b""
    base = BLOCK.sub("", current.decode("utf-8", "surrogateescape")).encode("utf-8", "surrogateescape")
    changed = base != current
    if changed and journal.installed(path) == digest(current):
        found = journal.found(path)
        if found is None:
            path.unlink()
            say(f"removed {path}, which was not there before")
        else:
            atomic_write(path, found)
            say(f"put {path} back as it was found")
    elif changed:
        atomic_write(path, base)
        say(f"{path} was changed since: took out rewarm's block only")
    journal.forget(path)
    return changed


def unregister(state: Path) -> bool:
    """Undoes every registration that the state directory records. True if a file was changed."""
    journal = Journal(state)
    changed = False
    for path in list(journal.entries):
        changed |= put_back(journal, Path(path))
    return changed


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("register", help="add or refresh the runtime; prints 'changed' or 'unchanged'")
    add.add_argument("--config", type=Path, required=True, help="containerd's main configuration file")
    add.add_argument("--binary", required=True, help="absolute path of rewarm-runc")
    add.add_argument("--containerd", default="", help="the containerd program that checks the result")
    remove = commands.add_parser("unregister", help="put back what was found; prints 'changed' or 'unchanged'")
    for command in (add, remove):
        command.add_argument("--state", type=Path, required=True, help="directory for the originals")
    args = parser.parse_args(argv)
    try:
        if args.command == "register":
            containerd = Containerd(args.containerd) if args.containerd else None
            changed = register(args.config, args.binary, args.state, containerd)
        else:
            changed = unregister(args.state)
    except (Refused, OSError) as error:
        print(f"rewarm: error: containerd: {error}", file=sys.stderr)
        return 1
    print("changed" if changed else "unchanged")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
