"""Notes in rewarm's settings what the node's own runc runtime runs, so that rewarm runs the same below itself.

Standard library only. The launcher finds its low-level runtime by `runtimes` of /etc/rewarm/config.yaml, for every
engine of the node; a `BinaryName` of containerd's runc that is not runc goes there, unless the user has set the key.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Collection, Sequence
from pathlib import Path

from engine import Done
from journal import Journal, Refused, digest, read_text
from marked import block, cut
from toml_text import check_whole

LABEL = "settings"
DEFAULT = Path("/etc/rewarm/config.yaml")
_KEY = re.compile(r"""^(?:runtimes|"runtimes"|'runtimes')[ \t]*:(.*)$""", re.MULTILINE)


_OURS = "# What the node's own runc runtime runs; the line stands for all engines."


def strip(text: str, path: Path, blocks: Collection[str] | None) -> str:
    """The text without rewarm's block; of one that somebody else has written in, without rewarm's lines."""
    check_whole(text, path)

    def keep(block: str, inside: str) -> str:
        if digest(block.encode("utf-8", "surrogateescape")) in (blocks or ()):
            return ""
        lines = inside.splitlines(keepends=True)
        return "".join(line for line in lines if line.rstrip() != _OURS and not _KEY.match(line))

    return cut(text, keep)


def journal_in(state: Path) -> Journal:
    return Journal(state, "settings", LABEL, strip)


def note(config: Path, programs: Sequence[str], binary: str, state: Path, python: str) -> Done:
    """Sets `runtimes` to the first of `programs` that can stand below rewarm; takes it out if there is none.

    `python` is an interpreter that has rewarm, to check the result with ("": nobody checks). Raises Refused.
    """
    journal = journal_in(state)
    wanted = [name for name in dict.fromkeys(programs) if _usable(name, binary, journal)]
    text = read_text(config)
    check_whole(text or "", config)
    base = journal.base(text or "", config)
    theirs = _KEY.search(base)
    if wanted and theirs:
        if wanted[0] not in theirs[0]:
            journal.say(f"note: the node's runc runtime runs {wanted[0]}, and rewarm what {config} says:")
            journal.say(f"note: {theirs[0].strip()}; put {wanted[0]} first there to run it below rewarm, too")
        wanted = []
    for name in wanted[1:]:
        journal.say(f"note: {name} is another engine's; rewarm runs one for all of them: {wanted[0]}")
    if not wanted:
        changed = str(config) in journal.entries and journal.put_back(config)
        return Done(changed=changed, paths=(config,))
    lines = [
        _OURS,
        f"runtimes: {_list(wanted[0])}",
    ]
    new = base + ("\n" if base and not base.endswith("\n") else "") + block(lines)
    if new != text:
        current = None if text is None else text.encode()
        journal.write(config, current, None if text is None else base.encode(), new.encode())
        try:
            _check(python, config, wanted[0])
        except Refused as error:
            journal.undo(config, current)
            raise Refused(f"{error}; add 'runtimes: {_list(wanted[0])}' there by hand") from error
        journal.say(f"the node's runc runtime runs {wanted[0]}: so does rewarm, by `runtimes` in {config}")
        if "nvidia" in os.path.basename(wanted[0]):
            journal.say(
                "note: containers that get their GPUs by it start cold; those that get them by CDI need runc there"
            )
    return Done(changed=new != text, paths=(config,), runc=wanted[0])


def _list(name: str) -> str:
    return f"[{json.dumps(name)}]"


def _usable(name: str, binary: str, journal: Journal) -> bool:
    """Whether a program can be rewarm's low-level runtime; says why where it cannot."""
    if name in ("", "runc") or os.path.realpath(name) == os.path.realpath(binary):
        return False
    if not re.fullmatch(r"/[^\\\"\x00-\x1f\x7f]*|[A-Za-z0-9_.+][A-Za-z0-9_.+-]*", name):
        journal.say(f"note: the node's runc runtime runs {name!r}, which is no path that settings could hold")
        return False
    try:
        said = subprocess.run([name, "--version"], capture_output=True, text=True, errors="replace", timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        journal.say(
            f"note: the node's runc runtime runs {name}, which does not run ({error}): rewarm runs runc below itself"
        )
        return False
    # NVIDIA's own version comes with that of the program below it.
    if re.search(r"^crun\b", said.stdout, re.MULTILINE):
        journal.say(f"note: the node's runc runtime runs crun ({name}), which runs no hooks on a restore:")
        journal.say("note: rewarm runs runc below itself")
        return False
    return True


def _check(python: str, config: Path, name: str) -> None:
    """Has rewarm itself read the settings."""
    if not python:
        return
    code = "import sys, pathlib; from rewarm import settings; print(*settings.load(pathlib.Path(sys.argv[1])).runtimes)"
    done = subprocess.run([python, "-I", "-c", code, str(config)], capture_output=True, text=True, timeout=60)
    if done.returncode != 0 or done.stdout.strip() != name:
        said = done.stderr.strip().splitlines()[-1:] or [f"the key is {done.stdout.strip()!r}"]
        raise Refused(f"{config} would not be read with `runtimes` in it: {said[0]}")
