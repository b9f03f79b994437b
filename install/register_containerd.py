"""Adds the runtime `rewarm` to containerd's configuration.

Standard library only. Where this containerd merges what is imported, and the main file imports a directory, the runtime
is a drop-in of rewarm's own there. Elsewhere it goes, as one marked block, to the end of the file that has the last
word on the CRI plugin: an imported file would switch the node's settings off, since containerd 1.x replaces a plugin's
whole table. Where no file names any runtime the block names the built-in ones too, or `runc` would be gone.

Afterwards containerd itself is asked whether it has the new runtime, and every old one as before.
"""

from __future__ import annotations

import tomllib
from functools import partial
from pathlib import Path
from typing import Any

from containerd_config import (
    CRI_NAMES,
    PLUGINS,
    ConfigFile,
    Containerd,
    binary_of,
    cri_table,
    drop_in_for,
    load,
    own,
    owner_of,
    plugin_for,
    read,
    runtimes_in,
    version_of,
)
from engine import ANNOTATIONS, RUNTIME, Done
from journal import Changed, Journal, Refused, read_bytes
from marked import block
from toml_own import strip
from toml_text import parse, strings, table, toml_table

LABEL = "containerd"
DEFAULT = Path("/etc/containerd/config.toml")
__all__ = ["DEFAULT", "LABEL", "journal_in", "parse", "reads", "register"]
BUILT_IN: dict[str, dict[str, Any]] = {"runc": {"runtime_type": "io.containerd.runc.v2"}}
Runtimes = dict[str, dict[str, Any]]


def journal_in(state: Path) -> Journal:
    return Journal(state, "containerd", LABEL, partial(strip, own=own))


def reads(config: Path, journal: Journal) -> list[Path]:
    """The files that containerd reads with this main file."""
    try:
        return [file.path for file in load(config, journal)]
    except Refused:  # then it does not start with them either
        return [config]


def derive(runtimes: Runtimes, default: str, binary: str, path: Path) -> tuple[dict[str, Any], str, str]:
    """rewarm's runtime: runc's (or, where there is none, the default one's), with our binary and our annotations.

    Returns the table, the copied runtime's name and the binary that it named ("" for plain runc).
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
    annotations = strings(source, path, "pod_annotations")
    if ANNOTATIONS not in annotations:
        annotations.append(ANNOTATIONS)
    options = {**table(source, path, "options"), "BinaryName": binary}
    return {**source, "pod_annotations": annotations, "options": options}, name, binary_of(source, path)


def left_alone(config: Path, binary: str, files: list[ConfigFile], journal: Journal) -> bool:
    """True if the node's files name our runtime already, not by this script. Refused if theirs is another one."""
    for file in files:
        mine = file.runtimes().get(RUNTIME)
        if mine is not None and binary_of(mine, file.path) == binary:
            journal.say(f"{file.path} names the runtime '{RUNTIME}' with {binary} already: left alone")
            return True
        if mine is not None:
            cause = f"has a runtime '{RUNTIME}' of its own that is not {binary}"
            raise Refused(f"{file.path} {cause}; rename or remove it, then run again")
        written = runtimes_in(file.data, file.path).get(RUNTIME)
        other = binary if written is None else binary_of(written, file.path)
        if other != binary:
            cause = f"has the runtime '{RUNTIME}' of another rewarm, {other}"
            raise Refused(f"{file.path} {cause}; run that one's uninstall.sh first")
    disabled = {name for file in files for name in strings(file.data, file.path, "disabled_plugins")} & CRI_NAMES
    if disabled:
        journal.say(f"{config} disables the CRI plugin ({', '.join(sorted(disabled))}): nothing to register there")
        journal.say(f"ctr and nerdctl take the runtime by its path: {binary}")
    return bool(disabled)


def register(config: Path, binary: str, state: Path, program: str) -> Done:
    """Adds or refreshes the runtime. Raises Refused, with nothing changed."""
    main = Path(config)
    journal = journal_in(state)
    containerd = Containerd(program) if program else None
    files = load(main, journal, containerd)
    if left_alone(main, binary, files, journal):
        return Done()
    drop_in = drop_in_for(files, containerd)
    if drop_in is not None:
        try:
            return _finish(
                journal, main, binary, containerd, _drop_in(read(drop_in, journal), files, binary, containerd)
            )
        except Changed:
            raise
        except Refused as error:
            journal.say(f"a drop-in does not do ({error}): editing in place")
            files = load(main, journal, containerd)
    return _finish(journal, main, binary, containerd, _in_place(files, binary, containerd))


class _Plan:
    """What is to be written where; `copied` is the runtime that was copied, `runc` the binary that it named."""

    def __init__(self, target: ConfigFile, before: str, lines: list[str], copied: str, runc: str) -> None:
        self.target = target
        self.block = block(lines)
        self.text = before + self.block
        self.copied = copied
        self.runc = runc


def _drop_in(target: ConfigFile, files: list[ConfigFile], binary: str, containerd: Containerd | None) -> _Plan:
    """A file of rewarm's own, of the main file's version: tables of two versions are not merged."""
    version = version_of(files[0])
    if target.base.strip() and target.base_data != {"version": version}:
        raise Refused(f"{target.path} holds something else")
    named: Runtimes = {}
    default = "runc"
    for file in files:
        for name, runtime in file.runtimes().items():
            options = {**table(named.get(name, {}), file.path, "options"), **table(runtime, file.path, "options")}
            named[name] = {**named.get(name, {}), **runtime, **({"options": options} if options else {})}
        found = table(cri_table(file.base_data, file.path), file.path, "containerd").get("default_runtime_name")
        default = str(found or default)
    effective = containerd.effective(files[0].path) if containerd else {}
    runtimes = _merged(named, effective, target.path) if named.keys() & {"runc", default} else BUILT_IN
    mine, copied, runc = derive(runtimes, default, binary, target.path)
    lines = [f"version = {version}", *_tables(PLUGINS[version], {RUNTIME: mine})]
    return _Plan(target, "", lines, copied, runc)


def _in_place(files: list[ConfigFile], binary: str, containerd: Containerd | None) -> _Plan:
    """A block at the end of the file with the last word, with the built-in runtimes where it names none at all."""
    owner = owner_of(files)
    plugin, version_line = plugin_for(owner, files[0], containerd)
    named = owner.runtimes()
    effective = containerd.effective(files[0].path) if containerd else {}
    effective.pop(RUNTIME, None)
    implied = {} if named else effective or BUILT_IN
    default = str(
        table(cri_table(owner.base_data, owner.path), owner.path, "containerd").get("default_runtime_name", "runc")
    )
    runtimes = _merged(named, effective, owner.path) or implied
    if not runtimes.keys() & {"runc", default}:  # another file may have it, where tables are merged
        runtimes = effective or runtimes
    mine, copied, runc = derive(runtimes, default, binary, owner.path)
    base = owner.base
    before = base + ("\n" if base and not base.endswith("\n") else "") + version_line
    return _Plan(owner, before, _tables(plugin, {**implied, RUNTIME: mine}), copied, runc)


def _merged(named: Runtimes, effective: Runtimes, path: Path) -> Runtimes:
    """The runtimes that a file names, with what containerd has for them from elsewhere: built in, from other files."""
    runtimes = {}
    for name, runtime in named.items():
        theirs = effective.get(name, {})
        options = _with(table(runtime, path, "options"), table(theirs, path, "options"))
        runtimes[name] = _with({**runtime, **({"options": options} if options else {})}, theirs)
    return runtimes


def _with(values: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """The values, and of `more` those that are none of containerd's defaults."""
    return {**{k: v for k, v in more.items() if k not in values and v and v != "podsandbox"}, **values}


def _tables(plugin: str, runtimes: Runtimes) -> list[str]:
    path = ("plugins", plugin, "containerd", "runtimes")
    return [line for name, runtime in runtimes.items() for line in toml_table((*path, name), runtime)]


def _finish(journal: Journal, main: Path, binary: str, containerd: Containerd | None, plan: _Plan) -> Done:
    """Writes the plan, has containerd check it, and takes away what an earlier run has left elsewhere."""
    target = plan.target
    try:
        tomllib.loads(plan.text.removeprefix("\ufeff"))
    except tomllib.TOMLDecodeError as error:
        cause = f"writes the runtimes in a form that cannot be extended at the file's end ({error})"
        raise Refused(f"{target.path} {cause}; use [table] headers there, or add by hand:\n{plan.block}") from error
    before = containerd.effective(main) if containerd else {}
    before.pop(RUNTIME, None)
    # A block where the last word was then; a drop-in that a containerd which replaces tables would still obey.
    written = [file.path for file in load(main, journal, containerd) if file.text not in (None, file.base)]
    stale = dict.fromkeys(path for path in (*written, *map(Path, journal.entries)) if path != target.path)
    changed = plan.text != target.text
    if changed:
        current = None if target.text is None else target.text.encode()
        base = None if target.text is None else target.base.encode()
        journal.write(target.path, current, base, plan.text.encode())
    kept = {path: _Kept(journal, path, data) for path in stale if (data := read_bytes(path)) is not None}
    moved = [path for path in stale if journal.put_back(path, quiet=True)]
    if changed and containerd:
        try:
            _check(containerd, main, target.path, before if not moved else None, binary)
        except Refused as error:
            undone = journal.undo(target.path, current)
            for path in moved:
                kept[path].restore()
            raise Refused(f"{error}; {undone}") from error
    for path in moved:
        journal.say(f"took out of {path} what an earlier run has written there")
    # Where no file names `runc` the options are the default runtime's, but below rewarm runs what `runc` does.
    runc = binary_of(before["runc"], main) if "runc" in before else plan.runc
    return Done(changed=changed or bool(moved), paths=(target.path,), runc=runc, copied=plan.copied)


class _Kept:
    """A file with rewarm's part in it, which may have to go back there."""

    def __init__(self, journal: Journal, path: Path, data: bytes) -> None:
        self._journal, self._path, self._data = journal, path, data
        self._rest = journal.left(path, data)
        self._changed_ns = path.stat().st_mtime_ns

    def restore(self) -> None:
        """Puts the part back: the file is as before then, its time of change included, since doctor goes by it."""
        if read_bytes(self._path) != self._rest:
            self._journal.say(f"{self._path} was changed meanwhile: rewarm's part stays out of it")
            return
        self._journal.write(self._path, self._rest, self._rest, self._data, self._changed_ns)


def _check(containerd: Containerd, main: Path, path: Path, before: Runtimes | None, binary: str) -> None:
    """Asks containerd whether it sees the new runtime, and every old one as before."""
    after = containerd.effective(main)
    ours = binary_of(after.pop(RUNTIME, {}), main)
    if ours != binary:
        raise Refused(f"containerd does not see the runtime that was written to {path}")
    if before is not None and after != before:
        names = [name for name in {**before, **after} if after.get(name) != before.get(name)]
        raise Refused(f"what was written to {path} would change the runtime {names[0]!r} for containerd")
