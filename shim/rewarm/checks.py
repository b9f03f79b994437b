"""What `rewarm doctor` says about one thing, and the node that it says it about."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from rewarm import installation
from rewarm.settings import Settings

OK: Literal["ok"] = "ok"
WARNING: Literal["warning"] = "warning"
FAILED: Literal["failed"] = "failed"


@dataclass(frozen=True)
class Check:
    """`found` is what is there, `mend` what to do about it: empty exactly when `status` is ok."""

    name: str
    status: Literal["ok", "warning", "failed"]
    found: str
    mend: str = ""


@dataclass(frozen=True)
class Node:
    """Where to look. `settings_error` is why the settings are the defaults, though there is a file."""

    settings: Settings
    settings_file: str
    settings_error: str = ""
    prefix: str = field(default_factory=installation.prefix)
    containerd_config: str = "/etc/containerd/config.toml"

    @property
    def launcher(self) -> str:
        return os.path.join(self.prefix, "bin", "rewarm-runc")

    @property
    def install_state(self) -> str:
        """Where install.sh keeps what it found and did (install/lib.sh has the same rule)."""
        return "/var/lib/rewarm/install" if self.prefix == "/opt/rewarm" else os.path.join(self.prefix, "install-state")


def ask(words: Sequence[str], timeout: float = 20) -> tuple[int, str]:
    """Exit status and output (both streams) of a program; a status of -1 and the reason when it cannot be run."""
    status, said, _ = _run(words, timeout, subprocess.STDOUT)
    return status, said


def ask_apart(words: Sequence[str], timeout: float = 20) -> tuple[int, str, str]:
    """The same with standard output, which is to be parsed, and standard error, which has the warnings, apart."""
    return _run(words, timeout, subprocess.PIPE)


def _run(words: Sequence[str], timeout: float, errors: int) -> tuple[int, str, str]:
    try:
        done = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
        )
    except OSError as error:
        reason = error.strerror or str(error)
    except subprocess.TimeoutExpired:
        reason = f"no answer within {timeout:.0f} s"
    else:
        return done.returncode, done.stdout, done.stderr or ""
    return -1, reason, reason


def last_line(text: str) -> str:
    """The last line that says something, cut to what fits a line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "no message"
