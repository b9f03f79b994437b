"""Where this rewarm is installed: the prefix that holds its virtual environments, C programs and CRIU."""

from __future__ import annotations

import os
import sys


def prefix() -> str:
    """The install's prefix (absolute path).

    `<prefix>/venv` is a link to `<prefix>/venvs/<build>`, and Python reports the one it was started by.
    """
    parent = os.path.dirname(sys.prefix)
    return os.path.dirname(parent) if os.path.basename(parent) == "venvs" else parent


def guard() -> str:
    return os.path.join(prefix(), "libexec", "rewarm-guard")


def device_memory() -> str:
    return os.path.join(prefix(), "lib", "rewarm-device-memory.so")


def hooks() -> str:
    """The directory with what programs in containers may import: `rewarm_hooks.workload`, and nothing else."""
    return os.path.join(prefix(), "lib", "rewarm-hooks")


def criu() -> str:
    return os.path.join(prefix(), "criu", "bin", "criu")
