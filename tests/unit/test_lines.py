"""Settings of plain lines, compared with PyYAML: what is read without it is what it would have read."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rewarm import lines, settings
from rewarm.errors import SettingsError

REPOSITORY = Path(__file__).parents[2]


def by_yaml(text: str) -> object:
    try:
        return settings._parse_yaml("/f", text.encode())
    except SettingsError as error:
        return error


def same(text: str) -> bool:
    """Whether it was read; fails if something else was than what PyYAML reads."""
    found = lines.read(text.encode())
    if found is None:
        return False
    wanted = by_yaml(text)
    # Also of the same types: 1, 1.0 and True are equal.
    assert repr(found) == repr(wanted), text
    return True


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n\n# nothing\n   # at all",
        "store: /srv/rewarm\ndeadline: 30\n",
        'store: "/srv/a store"  # ours\ncriu: auto # as ever',
        'runtimes: ["crun", runc,/usr/bin/youki]\nthreads: 0',
        "runtime_roots: []",
        'runtimes:\n  - crun\n  # the other\n\n  - "runc"\ndeadline: 2.5',
        "cache_size: 50G\ncache:   auto  ",
        'empty: ""\npath: /',
        "word: a.b-c/d+e_f",
    ],
)
def test_plain_lines(text: str) -> None:
    assert same(text)


@pytest.mark.parametrize(
    "text",
    [
        "a: 1\na: 2",
        "cache: off",
        "cache: OFF",
        "compression: n",
        "criu: null",
        "criu: ~",
        "on: 1",
        "a" * 65 + ": 1",
        "yes:\n  - a",
        "runtimes:",
        "runtimes:\nstore: /a",
        "runtimes:\n- runc",
        "runtimes:\n   - runc",
        "runtimes:\n  - runc\n    and more",
        "  - a",
        "store: /a\n  - b",
        "runtimes: [runc]\n  - crun",
        "runtimes: [runc,]",
        "runtimes: [off]",
        "namespaces:\n  a:\n    share: []",
        "namespaces: {}",
        "store: '/a'",
        'store: "a\\n"',
        'store: "a" b',
        'store: "a',
        "store: /a\r\n",
        "store:\t/a",
        "store: /a\tb",
        "store: /a/*",
        "store: a b",
        "store: a: b",
        "store:/a",
        "store : /a",
        " store: /a",
        "store: /a#b",
        "---\nstore: /a",
        "%YAML 1.1\n---\na: 1",
        "threads: 08",
        "threads: 1_000",
        "threads: -1",
        "threads: 0x10",
        "threads: 1e3",
        "deadline: 1.",
        "deadline: .5",
        "deadline: 01.5",
        "deadline: 1:30",
        "deadline: 2026-01-31",
        "threads: 1234567890123456789012",
        "a: &x 1",
        "a: !!str 1",
        "a: |\n  text",
        "a: b\n  c",
        "a: b\n c: d",
        "a: [b,\n  c]",
        "A: 1",
        "a-b: 1",
        "größe: 1",
        "a: größe",
        "# größe",
        "# a\x01b",
        "a: 1 #\x7f",
        "a: 1#b",
        "just text",
        "[]",
        "\ufeffa: 1",
    ],
)
def test_anything_else_is_for_yaml(text: str) -> None:
    assert lines.read(text.encode()) is None


def test_bytes_that_are_no_text() -> None:
    assert lines.read(b"store: /\xff") is None
    assert lines.read(b"store: /\0") is None


@pytest.mark.parametrize("name", ["config.yaml", "kubernetes/components/store/config.yaml"])
def test_the_files_that_come_with_rewarm(name: str) -> None:
    assert same((REPOSITORY / "config" / name).read_text())


def test_many() -> None:
    """Files out of pieces that are near the border: none is read otherwise, and many are read."""
    source = random.Random(7)
    atoms = [
        "runc",
        "/a/b",
        "/",
        '"x y"',
        '""',
        '"#"',
        "off",
        "On",
        "5",
        "0",
        "07",
        "1.5",
        "1.",
        "50G",
        "5g",
        "a:b",
        "-",
    ]
    atoms += [
        "a",
        "'q'",
        "[a, b]",
        "[]",
        '["a",b]',
        "[a b]",
        "null",
        "~",
        "",
        "x # c",
        "x #",
        "a#b",
        "1e5",
        "0.0",
        "9T",
    ]

    def line() -> str:
        key = source.choice(["a", "b", "store", "key_x", "on", "y", "c"])
        kinds: list[Callable[[], str]] = [
            lambda: f"{key}:{source.choice([' ', '  ', ''])}{source.choice(atoms)}{source.choice(['', ' ', ' # c'])}",
            lambda: f"{key}:",
            lambda: f"{source.choice(['  ', ' ', '', '   '])}- {source.choice(atoms)}",
            lambda: source.choice(["", "# c", "  # c", "#", " "]),
        ]
        return source.choices(kinds, [5, 1, 2, 1])[0]()

    read = sum(same("\n".join(line() for _ in range(source.randrange(5)))) for _ in range(6000))
    assert read > 1000


def test_one_character_more_or_less() -> None:
    text = (
        'store: "/srv/a"  # b\nruntimes:\n  - crun\n  - "ru nc"\nthreads: 4\nlist: [a, "b c"]\nsize: 5G\ntime: 2.50\n'
    )
    assert same(text)
    source = random.Random(8)
    letters = " \n\t:#-[]{},\"'\\&*!|>%@`~?=<.0159azAZ/_+\r\x00\x85é"
    for _ in range(6000):
        at, end = sorted(source.randrange(len(text) + 1) for _ in range(2))
        changed = source.choice(
            [text[:at] + source.choice(letters) + text[at:], text[:at] + text[at + 1 :], text[:at] + text[end:]]
        )
        same(changed)


@pytest.mark.parametrize("line", ["a:{}\t", "a: b{}\t", "a: [b]{}\t", "  - a{}\t", "{}\t", "a: b{}#\t", "a: [{}\t"])
def test_long_lines_take_no_time(line: str) -> None:
    began = time.process_time()
    assert lines.read(("a:\n" + line.format(" " * (1 << 19))).encode()) is None
    assert time.process_time() - began < 1


def test_plain_settings_need_no_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(f"store: {json.dumps(str(tmp_path))}\ndeadline: 12.5\nruntimes:\n  - crun\n")
    monkeypatch.setattr(settings, "_parse_yaml", None)
    found = settings.load(file)
    assert (found.store, found.deadline, found.runtimes) == (str(tmp_path), 12.5, ("crun",))
