"""Adds the runtime `rewarm` to CRI-O: a drop-in below /etc/crio/crio.conf.d. Standard library only.

CRI-O reads crio.conf and then every file below crio.conf.d in the order of their names, so the node's other handlers
stay; of a handler that two files define it takes the later one's table, and nothing of the earlier one's. The options
are those of the handler `runc`, or where there is none of the default one, less what belongs to that one's program.

`allowed_annotations` is copied and gets nothing of rewarm's: the list is of annotations that CRI-O itself acts on.
Those it does not know go through to the runtime as they are, and a handler that lists one is ignored ("invalid
allowed_annotation": seen with CRI-O 1.37, and so in the sources since 1.24).
"""

from __future__ import annotations

import os
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

from engine import PROGRAM, RUNTIME, Done
from journal import Journal, Refused, read_text
from marked import block
from toml_own import strip
from toml_text import check_whole, parse, table, toml_table

LABEL = "crio"
DEFAULT = Path("/etc/crio/crio.conf.d/99-rewarm.conf")
_HANDLERS = ("crio", "runtime", "runtimes")
_RUNC_ROOT = "/run/runc"
_MONITOR_ENV = ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]
# What is the copied handler's own program, and what would name it again.
_NOT_COPIED = (
    "runtime_path",
    "runtime_type",
    "runtime_config_path",
    "platform_runtime_paths",
    "inherit_default_runtime",
)


def journal_in(state: Path) -> Journal:
    # CRI-O reads whatever lies in that directory, half a file too.
    return Journal(state, "crio", LABEL, partial(strip, own=own), keep_out=True)


def own(data: dict[str, Any], path: Path) -> list[tuple[str, ...]]:
    """Where a file's data has rewarm's handler, if it runs rewarm: see toml_own."""
    mine = table(data, path, *_HANDLERS, RUNTIME).get("runtime_path", "")
    return [(*_HANDLERS, RUNTIME)] if os.path.basename(str(mine)) == PROGRAM else []


def reads(config: Path, journal: Journal) -> list[Path]:
    """The files that CRI-O reads with this drop-in."""
    del journal
    return [*_others(config), config]


def _others(config: Path) -> list[Path]:
    """What else CRI-O reads, in its order."""
    drop_ins = sorted(path for path in config.parent.rglob("*") if path.is_file())
    return [path for path in (config.parent.parent / "crio.conf", *drop_ins) if path != config]


def register(config: Path, binary: str, state: Path, program: str) -> Done:
    """Adds or refreshes the drop-in. Raises Refused, with nothing changed."""
    journal = journal_in(state)
    handlers: dict[str, dict[str, Any]] = {}
    default = ""
    for other in _others(config):
        data = parse(read_text(other) or "", other)
        named = table(data, other, *_HANDLERS)
        for name in named:
            handlers[name] = table(named, other, name)
        default = str(table(data, other, "crio", "runtime").get("default_runtime", default))
        if RUNTIME in named and handlers[RUNTIME].get("runtime_path") == binary:
            journal.say(f"{other} names the runtime '{RUNTIME}' with {binary} already: left alone")
            return Done(paths=(other,))
        if RUNTIME in named:
            cause = f"has a runtime '{RUNTIME}' of its own that is not {binary}"
            raise Refused(f"{other} {cause}; rename or remove it, then run again")
    text = read_text(config)
    check_whole(text or "", config)
    base = journal.base(text or "", config)
    if table(parse(base, config), config, *_HANDLERS):
        raise Refused(f"{config} is rewarm's file and has handlers of somebody else; move them to another file there")
    written = table(parse(text or "", config), config, *_HANDLERS, RUNTIME).get("runtime_path", binary)
    if written != binary:
        cause = f"has the runtime '{RUNTIME}' of another rewarm, {written}"
        raise Refused(f"{config} {cause}; run that one's uninstall.sh first")
    mine, runc = derive(handlers, default, binary)
    new = base + ("\n" if base and not base.endswith("\n") else "") + block(toml_table((*_HANDLERS, RUNTIME), mine))
    parse(new, config)
    if new == text:
        return Done(paths=(config,), runc=runc)
    current = None if text is None else text.encode()
    journal.write(config, current, None if text is None else base.encode(), new.encode())
    try:
        _check(program, config, binary)
    except Refused as error:
        raise Refused(f"{error}; {journal.undo(config, current)}") from error
    return Done(changed=True, paths=(config,), runc=runc)


def derive(handlers: dict[str, dict[str, Any]], default: str, binary: str) -> tuple[dict[str, Any], str]:
    """rewarm's handler, and the copied one's program: "" for plain runc, or where no file names it. Raises Refused."""
    name = "runc" if "runc" in handlers else default
    source = handlers.get(name, {})
    # Whose program it is: a handler may say that it runs what the default one runs.
    program = default if source.get("inherit_default_runtime") and default in handlers else name
    kind = handlers.get(program, {}).get("runtime_type") or "oci"
    if kind != "oci":
        raise Refused(f"the handler '{program}' has runtime_type {kind!r}; rewarm works under 'oci' only")
    mine: dict[str, Any] = {"runtime_path": binary, "runtime_type": "oci", "runtime_root": _RUNC_ROOT}
    mine["monitor_env"] = _MONITOR_ENV
    mine |= {key: value for key, value in source.items() if key not in _NOT_COPIED}
    if program != "runc":  # another program's state is nothing that runc could read
        mine["runtime_root"] = _RUNC_ROOT
    if program not in handlers:
        return mine, ""
    path = str(handlers[program].get("runtime_path") or program)  # without a path CRI-O looks for the handler's name
    return mine, "" if os.path.basename(path) == "runc" and os.path.dirname(path) in _USUAL else path


_USUAL = ("", "/usr/bin", "/usr/sbin", "/usr/local/bin", "/usr/local/sbin", "/bin", "/sbin")


def _check(program: str, config: Path, binary: str) -> None:
    """Asks crio what it makes of its files, where it can be run and these are its own."""
    if not program or config != DEFAULT:
        return
    try:
        done = subprocess.run(
            [program, "config"], capture_output=True, text=True, errors="replace", timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Refused(f"{program} could not be run: {error}") from error
    if done.returncode != 0 or binary not in done.stdout:
        said = done.stderr.strip().splitlines()[-1:] or ["it does not see the runtime"]
        raise Refused(f"{program} config: {said[0]}")
