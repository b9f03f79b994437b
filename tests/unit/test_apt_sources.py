"""install/apt_sources.py on source files as Debian and Ubuntu machines have them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "install/apt_sources.py"

DEB822 = """\
# written by the installer
Types: deb deb-src
# a comment inside
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates bookworm-backports
Components: main contrib
Signed-By: /usr/share/keyrings/archive.gpg

Types: deb
URIs: http://security.example/debian-security
Suites: bookworm-security
Components: main
Trusted: yes

Types: deb-src
URIs: http://sources.example/debian
Suites: bookworm
Components: main

Types: deb
Enabled: no
URIs: http://off.example/debian
Suites: bookworm
Components: main
"""
INLINE_KEY = """\
Types: deb
URIs: https://mirror.example/debian
Suites: stable
Components: main
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 mQINBFit
 -----END PGP PUBLIC KEY BLOCK-----
"""
ONE_LINE = """\
deb http://mirror.example/debian bookworm main non-free-firmware # the main one
deb [arch=amd64 signed-by=/etc/apt/keyrings/k.gpg] http://signed.example/debian bookworm-security main
# deb http://off.example/debian bookworm main
deb-src http://sources.example/debian bookworm main
deb [trusted=yes] http://third.example/apt bookworm third
deb http://flat.example/ ./
deb http://other.example/debian bullseye main
"""


def pointed(tmp_path: Path, name: str, text: str, codename: str = "bookworm", components: str = "main") -> list[str]:
    source, out = tmp_path / name, tmp_path / "out"
    source.write_text(text)
    out.mkdir()
    command = [sys.executable, "-I", str(SCRIPT), codename, "trixie", components, str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == ""
    stanzas = [path.read_text() for path in sorted(out.iterdir())]
    assert done.returncode == (0 if stanzas else 1)
    return stanzas


def test_deb822(tmp_path: Path) -> None:
    assert pointed(tmp_path, "debian.sources", DEB822) == [
        "Types: deb\nURIs: http://mirror.example/debian\nSuites: trixie trixie-updates\nComponents: main\n"
        "Signed-By: /usr/share/keyrings/archive.gpg\n",
        # Trusted is not taken over: what comes from there has to be signed.
        "Types: deb\nURIs: http://security.example/debian-security\nSuites: trixie-security\nComponents: main\n",
    ]


def test_a_key_in_the_source_is_kept(tmp_path: Path) -> None:
    assert pointed(tmp_path, "x.sources", INLINE_KEY) == [INLINE_KEY.replace("stable", "trixie")]


def test_one_line(tmp_path: Path) -> None:
    assert pointed(tmp_path, "sources.list", ONE_LINE) == [
        "Types: deb\nURIs: http://mirror.example/debian\nSuites: trixie\nComponents: main\n",
        "Types: deb\nURIs: http://signed.example/debian\nSuites: trixie-security\nComponents: main\n"
        "Signed-By: /etc/apt/keyrings/k.gpg\n",
    ]


def test_ubuntu(tmp_path: Path) -> None:
    text = (
        "deb http://archive.example/ubuntu noble main universe\ndeb http://archive.example/ubuntu noble-security main\n"
    )
    assert pointed(tmp_path, "sources.list", text, "noble", "main universe") == [
        "Types: deb\nURIs: http://archive.example/ubuntu\nSuites: trixie\nComponents: main universe\n",
        "Types: deb\nURIs: http://archive.example/ubuntu\nSuites: trixie-security\nComponents: main\n",
    ]


@pytest.mark.parametrize("text", ["", "# nothing\n", "deb http://other.example/debian bullseye main\n"])
def test_no_source_fits(tmp_path: Path, text: str) -> None:
    assert pointed(tmp_path, "sources.list", text) == []
