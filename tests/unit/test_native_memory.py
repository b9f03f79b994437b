"""The C that finds and writes pages, makes pieces of device memory and brings files there, against models: built with
ASan and UBSan, and with all warnings as errors."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize("optimised", ["-O1", "-O3"])
@pytest.mark.parametrize("name", ["memory", "lanes", "pieces"])
def test_against_a_model(tmp_path: Path, name: str, optimised: str) -> None:
    native = REPOSITORY / "native" / "rewarm_native"
    program = tmp_path / "check"
    warnings = ["-Wall", "-Wextra", "-Werror", "-Wshadow", "-Wconversion"]
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    sources = [native / f"{name}.c", REPOSITORY / "tests" / "support" / f"{name}_check.c"]
    words: list[str | Path] = [
        "gcc",
        "-std=gnu17",
        "-D_GNU_SOURCE",
        optimised,
        "-g",
        *warnings,
        *sanitizers,
        "-I",
        native,
        "-o",
        program,
    ]
    subprocess.run([*words, *sources], check=True)
    done = subprocess.run([program], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr
