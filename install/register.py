#!/usr/bin/env python3
"""Registers the runtime `rewarm` with the node's engines, and takes it out again.

    register.py register --binary FILE --state DIRECTORY [--settings FILE] [--python FILE] ENGINE=FILE[:PROGRAM]...
    register.py unregister --state DIRECTORY [--removes FILE] [ENGINE...]

Standard library only: install.sh runs it with the system's python3 (>= 3.11, for tomllib). ENGINE is containerd, crio,
docker or podman, FILE its configuration (of CRI-O and Podman: rewarm's drop-in), PROGRAM what checks the result.

Every engine is tried. Prints a line for each: `ENGINE changed`, `unchanged` or `refused`, whose cause is on standard
error; exit status 1 if any was refused. `engines.json` in the state directory says where each engine is registered and
which runtime was copied, for `rewarm doctor --node`, and what its runc runtime runs, for the settings: they stand for
all engines, also for those that a run leaves out.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from functools import partial
from pathlib import Path

import register_containerd
import register_crio
import register_docker
import register_podman
import register_settings
import still_named
from engine import Done
from journal import Journal, Refused, anew, atomic_write, read_bytes

ENGINES = {
    "containerd": register_containerd,
    "crio": register_crio,
    "docker": register_docker,
    "podman": register_podman,
}
RECORD = "engines.json"


def complain(label: str, error: Exception) -> None:
    print(f"rewarm: error: {label}: {error}", file=sys.stderr)


def register(wanted: dict[str, tuple[Path, str]], binary: str, state: Path, settings: Path | None, python: str) -> bool:
    """Registers with each engine. False if one refused."""
    done = {}
    for name, (config, program) in wanted.items():
        try:
            done[name] = anew(partial(ENGINES[name].register, config, binary, state, program))
        except (Refused, OSError) as error:
            complain(name, error)
    well = len(done) == len(wanted)
    programs = _programs(state, _record(state, wanted, done))
    if settings is not None:
        try:
            note = partial(register_settings.note, settings, programs or (), binary, state, python)
            noted = Done() if programs is None else anew(note)
            print(f"settings {'changed' if noted.changed else 'unchanged'}")
        except (Refused, OSError) as error:
            complain("settings", error)
            well = False
    for name in wanted:
        print(f"{name} {_word(done.get(name))}")
    return well


def _word(done: Done | None) -> str:
    if done is None:
        return "refused"
    return "changed" if done.changed else "unchanged"


def _record(state: Path, wanted: dict[str, tuple[Path, str]], done: dict[str, Done]) -> dict[str, object]:
    state.mkdir(parents=True, exist_ok=True)
    # Of engines that are left out this time, or refuse, the last registration still stands.
    record = _recorded(state) | {
        name: {
            "config": str(config),
            "program": program,
            "files": [str(path) for path in done[name].paths],
            "runc": done[name].runc,
            "copied": done[name].copied,
        }
        for name, (config, program) in wanted.items()
        if name in done
    }
    atomic_write(state / RECORD, json.dumps(record, indent=1).encode() + b"\n")
    return record


def _programs(state: Path, record: dict[str, object]) -> list[str] | None:
    """What the runc runtimes of all registered engines run; None where that is not known: what was noted stays then."""
    found = []
    unknown = False
    for name in ENGINES:
        entry = record.get(name)
        program = entry.get("runc") if isinstance(entry, dict) else None
        found += [program] if isinstance(program, str) and program else []
        # An earlier rewarm's record has no program in it, and a damaged one nothing.
        unknown |= not isinstance(program, str) and (state / f"{name}.json").exists()
    return None if unknown and not found else found


def _recorded(state: Path) -> dict[str, object]:
    try:
        found = json.loads(read_bytes(state / RECORD) or b"{}")
    except ValueError:  # a registration makes it anew
        return {}
    return found if isinstance(found, dict) else {}


# In TOML and JSON, and not in a comment; Podman's has no `default` in its name.
_DEFAULT = re.compile(
    r"""^[^#\n]*\b(?:default[-_]runtime(?:_name)?|runtime)["']?\s*[=:]\s*["']rewarm["']""", re.MULTILINE
)


def _check_default(state: Path, name: str, journal: Journal) -> None:
    """An engine whose default runtime is gone does not start: by a drop-in it is another file that names it.

    Raises Refused.
    """
    ours = list(map(Path, journal.entries))
    for path in dict.fromkeys((*ours, *(_files(state, name, journal) if ours else ()))):
        try:
            text = (read_bytes(path) or b"").decode(errors="replace")
        except Refused:
            if path in ours:
                raise
            continue  # no engine makes anything of it either
        if _DEFAULT.search(text):
            raise Refused(f"{path} makes rewarm the default runtime: name another there, then run again")


def _files(state: Path, name: str, journal: Journal) -> list[Path]:
    """The files that an engine reads, by where it is registered."""
    engine = ENGINES.get(name)
    record = _recorded(state).get(name)
    config = record.get("config") if isinstance(record, dict) else None
    return engine.reads(Path(config), journal) if engine is not None and isinstance(config, str) else []


def _check_removal(state: Path, name: str, journal: Journal, binary: str) -> None:
    """Raises Refused if the engine would still be told of a program that is removed then."""
    engine = ENGINES.get(name)
    if engine is None or not binary:
        return
    # What is not on record may be registered by hand (--no-register, --exclude-engines), or its record be lost.
    files = [*_files(state, name, journal), *engine.reads(engine.DEFAULT, journal)]
    still_named.check(journal, files, engine.parse, binary)


def unregister(state: Path, names: list[str], removes: str) -> bool:
    """Undoes what the state directory records, of the engines named or of all. False if one refused."""
    well = True
    for name in names or [*ENGINES, "settings"]:
        engine = ENGINES.get(name, register_settings)
        try:
            journal = engine.journal_in(state)
            _check_default(state, name, journal)
            _check_removal(state, name, journal, removes)
            changed = journal.put_all_back()
        except (Refused, OSError) as error:
            complain(name, error)
            print(f"{name} refused")
            well = False
            continue
        print(f"{name} {'changed' if changed else 'unchanged'}")
        _forget(state, name)
    return well


def _forget(state: Path, name: str) -> None:
    record = _recorded(state)
    if record.pop(name, None) is not None and record:
        atomic_write(state / RECORD, json.dumps(record, indent=1).encode() + b"\n")
    elif not record:
        (state / RECORD).unlink(missing_ok=True)


def place(text: str) -> tuple[str, tuple[Path, str]]:
    """ENGINE=FILE[:PROGRAM], as argparse wants it."""
    name, equals, rest = text.partition("=")
    config, _, program = rest.partition(":")
    if name not in ENGINES or not equals or not config:
        raise argparse.ArgumentTypeError(f"{text!r} is not ENGINE=FILE[:PROGRAM]; engines: {', '.join(ENGINES)}")
    return name, (Path(os.path.abspath(config)), program)


def recorded(name: str) -> str:
    """What has a record of its own, as argparse wants it."""
    if name not in (*ENGINES, "settings"):
        raise argparse.ArgumentTypeError(f"there is no engine {name!r}; there are {', '.join(ENGINES)} and settings")
    return name


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("register", help="add or refresh the runtime")
    add.add_argument("--binary", required=True, help="absolute path of rewarm-runc")
    add.add_argument("--settings", type=Path, help="rewarm's settings, for a low-level runtime that is not runc")
    add.add_argument("--python", default="", help="an interpreter that has rewarm, which checks the settings")
    add.add_argument("engines", metavar="ENGINE=FILE[:PROGRAM]", type=place, nargs="+")
    remove = commands.add_parser("unregister", help="put back what was found")
    remove.add_argument("--removes", default="", help="refuse where an engine's files would still name this program")
    remove.add_argument("engines", metavar="ENGINE", type=recorded, nargs="*")
    for command in (add, remove):
        command.add_argument("--state", type=Path, required=True, help="directory for the originals")
    args = parser.parse_args(argv)
    if args.command == "unregister":
        return 0 if unregister(args.state, args.engines, args.removes) else 1
    settings = Path(os.path.abspath(args.settings)) if args.settings else None
    return 0 if register(dict(args.engines), args.binary, args.state, settings, args.python) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
