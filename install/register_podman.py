"""Adds the runtime `rewarm` for Podman: a drop-in below /etc/containers/containers.conf.d. Standard library only.

Podman reads the drop-ins after containers.conf and merges tables, so the node's other runtimes stay. It has no daemon:
the next call of podman knows the runtime. There are no options to copy: a runtime is a list of paths there.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

from engine import PROGRAM, RUNTIME, Done
from journal import Journal, Refused, read_text
from marked import block
from toml_own import strip
from toml_text import check_whole, parse, strings, table, toml_table

LABEL = "podman"
DEFAULT = Path("/etc/containers/containers.conf.d/rewarm.conf")
_SHARED = Path("/usr/share/containers/containers.conf")


def journal_in(state: Path) -> Journal:
    return Journal(state, "podman", LABEL, partial(strip, own=own))


def own(data: dict[str, Any], path: Path) -> list[tuple[str, ...]]:
    """Where a file's data has rewarm's runtime, if it runs rewarm: see toml_own."""
    programs = strings(table(data, path, "engine", "runtimes"), path, RUNTIME)
    return [("engine", "runtimes", RUNTIME)] if PROGRAM in map(os.path.basename, programs) else []


def reads(config: Path, journal: Journal) -> list[Path]:
    """The files that Podman reads for root with this drop-in."""
    del journal
    return [*_others(config), config]


def _others(config: Path) -> list[Path]:
    """What else Podman reads for root, in its order, which for a drop-in elsewhere are its directory's files."""
    drop_ins = sorted(config.parent.glob("*.conf"))
    shared = [_SHARED] if config == DEFAULT else []
    main = config.parent.parent / "containers.conf"
    return [path for path in (*shared, main, *drop_ins) if path != config]


def register(config: Path, binary: str, state: Path, program: str) -> Done:
    """Adds or refreshes the drop-in. Raises Refused, with nothing changed."""
    del program  # it has no way to check a file without setting up its storage
    journal = journal_in(state)
    runc = ""
    for other in _others(config):
        text = read_text(other)
        runtimes = {} if text is None else table(parse(text, other), other, "engine", "runtimes")
        if RUNTIME in runtimes and binary in strings(runtimes, other, RUNTIME):
            journal.say(f"{other} names the runtime '{RUNTIME}' with {binary} already: left alone")
            return Done(paths=(other,))
        if RUNTIME in runtimes:
            cause = f"has a runtime '{RUNTIME}' of its own that is not {binary}"
            raise Refused(f"{other} {cause}; rename or remove it, then run again")
        runc = next(iter(strings(runtimes, other, "runc")), runc)
    text = read_text(config)
    check_whole(text or "", config)
    base = journal.base(text or "", config)
    theirs = table(parse(base, config), config, "engine", "runtimes")
    if RUNTIME in theirs:
        raise Refused(f"{config} has a runtime '{RUNTIME}' of its own; rename or remove it, then run again")
    ours = table(parse(text or "", config), config, "engine", "runtimes")
    other_rewarm = [path for path in strings(ours, config, RUNTIME) if path != binary]
    if other_rewarm:
        cause = f"has the runtime '{RUNTIME}' of another rewarm, {other_rewarm[0]}"
        raise Refused(f"{config} {cause}; run that one's uninstall.sh first")
    if "engine" in parse(base, config):
        raise Refused(f"{config} is rewarm's file and has settings of somebody else; move them to another file there")
    new = base + ("\n" if base and not base.endswith("\n") else "")
    new += block(toml_table(("engine", "runtimes"), {RUNTIME: [binary]}))
    parse(new, config)
    if new == text:
        return Done(paths=(config,), runc=runc)
    current = None if text is None else text.encode()
    journal.write(config, current, None if text is None else base.encode(), new.encode())
    return Done(changed=True, paths=(config,), runc=runc)
