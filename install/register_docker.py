"""Adds the runtime `rewarm` to Docker's daemon.json: `runtimes.rewarm.path`. Standard library only.

The file is edited as text: key order, layout and the user's other keys stay. There is nothing to copy from the node's
runc: Docker's own is built in, and what it runs containers with (cgroup driver, roots) is the same for every runtime.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import json_text
from engine import PROGRAM, RUNTIME, Done
from journal import Journal, Refused, read_text

LABEL = "docker"
DEFAULT = Path("/etc/docker/daemon.json")
parse = json_text.parse


def journal_in(state: Path) -> Journal:
    return Journal(state, "docker", LABEL, strip)


def reads(config: Path, journal: Journal) -> list[Path]:
    """The files that dockerd reads."""
    del journal
    return [config]


def strip(text: str, path: Path, blocks: Collection[str] | None) -> str:
    """The text without the runtime, if that is rewarm's; without `runtimes` if nothing else is in it."""
    del blocks  # JSON has no comments to mark one with
    if not text.strip("\ufeff \t\r\n"):
        return text
    data = json_text.parse(text, path)
    mine = _runtimes(data, path).get(RUNTIME)
    if not isinstance(mine, dict) or os.path.basename(str(mine.get("path", ""))) != PROGRAM:
        return text
    where = json_text.top(text)
    member = where.find("runtimes")
    assert member is not None
    if len(member.value) == 1:
        return json_text.remove(text, where, "runtimes")
    return json_text.remove(text, json_text.inner(text, member), RUNTIME)


def _runtimes(data: Any, path: Path) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise Refused(f"{path} is not a JSON object; mend it and run again")
    found = data.get("runtimes", {})
    if not isinstance(found, dict):
        raise Refused(f"{path}: runtimes is not an object; mend it and run again")
    return found


def register(config: Path, binary: str, state: Path, program: str) -> Done:
    """Adds or refreshes the runtime. Raises Refused, with nothing changed."""
    journal = journal_in(state)
    text = read_text(config)
    blank = text is None or not text.strip("\ufeff \t\r\n")
    runtimes = {} if blank else _runtimes(json_text.parse(text or "", config), config)
    if RUNTIME in runtimes:
        mine = runtimes[RUNTIME]
        path = str(mine.get("path", "")) if isinstance(mine, dict) else ""
        if path != binary and os.path.basename(path) == PROGRAM:
            raise Refused(
                f"{config} has the runtime '{RUNTIME}' of another rewarm, {path}; run that one's uninstall.sh first"
            )
        if path != binary:
            cause = f"has a runtime '{RUNTIME}' of its own that is not {binary}"
            raise Refused(f"{config} {cause}; rename or remove it, then run again")
        if str(config) not in journal.entries:
            journal.say(f"{config} names the runtime '{RUNTIME}' with {binary} already: left alone")
        return Done(paths=(config,))
    _refuse_flag(config)
    new = _add(text or "", binary) if not blank else f'{{\n    "runtimes": {_runtime(binary)}\n}}\n'
    if not blank and json_text.parse(new, config) != _expected(json_text.parse(text or "", config), binary):
        raise Refused(f"{config} is written in a form that cannot be extended; add by hand: {_runtime(binary)}")
    current = None if text is None else text.encode()
    journal.write(config, current, current, new.encode())
    try:
        _validate(config, program)
    except Refused as error:
        raise Refused(f"{error}; {journal.undo(config, current)}") from error
    return Done(changed=True, paths=(config,))


def _runtime(binary: str) -> str:
    return f'{{\n        "{RUNTIME}": {{\n            "path": "{binary}"\n        }}\n    }}'


def _add(text: str, binary: str) -> str:
    where = json_text.top(text)
    member = where.find("runtimes")
    if member is None:
        return json_text.add(text, where, "runtimes", {RUNTIME: {"path": binary}})
    return json_text.add(text, json_text.inner(text, member), RUNTIME, {"path": binary})


def _expected(data: dict[str, Any], binary: str) -> dict[str, Any]:
    return {**data, "runtimes": {**data.get("runtimes", {}), RUNTIME: {"path": binary}}}


def _validate(config: Path, program: str) -> None:
    """Asks dockerd, where it is one that can check a file (23.0 and newer)."""
    if not program:
        return
    try:
        usage = subprocess.run([program, "--help"], capture_output=True, text=True, timeout=30, check=False).stdout
        if "--validate" not in usage:
            return
        words = [program, "--validate", "--config-file", str(config)]
        done = subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Refused(f"{program} could not be run: {error}") from error
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no message"]
        raise Refused(f"{' '.join(words)}: {said[0]}")


def _refuse_flag(config: Path) -> None:
    """A dockerd does not start with `runtimes` both in its file and on its command line."""
    for words in _daemons():
        file = next(
            (_value(words, n) for n, word in enumerate(words) if word.startswith("--config-file")), str(DEFAULT)
        )
        if file == str(config) and any(word.startswith("--add-runtime") for word in words):
            raise Refused(
                f"dockerd is started with --add-runtime, which excludes runtimes in {config}; "
                f"move those of its command line to the file, or add --add-runtime {RUNTIME}=… there"
            )


def _value(words: list[str], number: int) -> str:
    _, equals, value = words[number].partition("=")
    return value if equals else "".join(words[number + 1 : number + 2])


def _daemons() -> Iterator[list[str]]:
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and (entry / "comm").read_text() == "dockerd\n":
                yield (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
        except OSError:  # it has ended
            continue
