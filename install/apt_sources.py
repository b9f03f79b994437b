#!/usr/bin/env python3
"""Prints the machine's own package sources, pointed at another suite of the same distribution.

    apt_sources.py CODENAME SUITE COMPONENTS DIRECTORY FILE...

Reads apt's source files (one-line `*.list` and deb822 `*.sources`) and writes each source that carries the release
CODENAME, with its -updates and -security companions, to a file of its own in DIRECTORY: same URIs and same
Signed-By, but SUITE in the place of CODENAME. So a private apt can take a newer package from the mirror that this
machine trusts already. `trusted=yes` is not taken over: what comes from there has to be signed.

Standard library only. Exit status 1 if no source fits.
"""

from __future__ import annotations

import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

# The names under which a Debian mirror also offers a release, whatever its codename is.
ALIASES = ("stable", "oldstable", "oldoldstable", "testing")


@dataclass(frozen=True)
class Source:
    """One binary package source; `signed_by` is the field as written, white space included: paths, or a key."""

    uris: tuple[str, ...]
    suites: tuple[str, ...]
    components: tuple[str, ...]
    signed_by: str


def parse_list(text: str) -> list[Source]:
    """The `deb` lines of a one-line-style file."""
    sources = []
    for line in text.splitlines():
        found = re.match(r"\s*deb\s+(?:\[([^\]]*)\]\s*)?(.*)", line.split("#", 1)[0])
        if not found:
            continue
        options = dict(option.split("=", 1) for option in (found[1] or "").split() if "=" in option)
        signed_by = " " + options["signed-by"].replace(",", " ") if "signed-by" in options else ""
        words = shlex.split(found[2])
        if len(words) >= 3:
            sources.append(Source((words[0],), (words[1],), tuple(words[2:]), signed_by))
    return sources


def parse_deb822(text: str) -> list[Source]:
    """The stanzas of a deb822 file that are for binary packages and not switched off."""
    sources = []
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    for stanza in re.split(r"\n[ \t]*\n", "\n".join(lines)):
        found = re.finditer(r"^([A-Za-z-]+):(.*(?:\n[ \t].*)*)", stanza, re.MULTILINE)
        fields = {match[1].lower(): match[2].rstrip() for match in found}
        if "deb" not in fields.get("types", "").split() or fields.get("enabled", "yes").strip().lower() in (
            "no",
            "false",
        ):
            continue
        names = [tuple(fields.get(key, "").split()) for key in ("uris", "suites", "components")]
        sources.append(Source(names[0], names[1], names[2], fields.get("signed-by", "")))
    return sources


def pointed_at(source: Source, codename: str, suite: str, components: tuple[str, ...]) -> Source | None:
    """The same source with `suite` for `codename`, None if the source is not one of this release."""
    if not set(source.components) & set(components):
        return None
    pattern = rf"({'|'.join(map(re.escape, (codename, *ALIASES)))})(-updates|-security)?"
    found = [re.fullmatch(pattern, name) for name in source.suites]
    suites = tuple(f"{suite}{match[2] or ''}" for match in found if match)
    wanted = tuple(c for c in components if c in source.components)
    return Source(source.uris, tuple(dict.fromkeys(suites)), wanted, source.signed_by) if suites else None


def to_deb822(source: Source) -> str:
    signed = f"Signed-By:{source.signed_by}\n" if source.signed_by else ""
    return (
        f"Types: deb\nURIs: {' '.join(source.uris)}\nSuites: {' '.join(source.suites)}\n"
        f"Components: {' '.join(source.components)}\n{signed}"
    )


def main(argv: list[str]) -> int:
    codename, suite, components, directory, *files = argv
    sources: list[Source] = []
    for name in files:
        text = Path(name).read_text(encoding="utf-8", errors="surrogateescape")
        sources += parse_deb822(text) if name.endswith(".sources") else parse_list(text)
    fitting = [pointed_at(source, codename, suite, tuple(components.split())) for source in sources]
    written = list(dict.fromkeys(to_deb822(source) for source in fitting if source))
    for number, stanza in enumerate(written):
        path = Path(directory, f"{number}.sources")
        path.write_text(stanza, encoding="utf-8", errors="surrogateescape")
    return 0 if written else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
