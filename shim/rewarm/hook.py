"""The OCI hook of a restore: the one process in which all runs that has to wait for runc and CRIU (rewarm_hooks)."""

from __future__ import annotations

import os
import sys

import rewarm_hooks
from rewarm_hooks.series import SEPARATOR

_CODE = "import sys; sys.path.append(sys.argv.pop(1)); from rewarm_hooks.series import main; "
_CODE += "sys.exit(main(sys.argv[1:], sys.stdin.buffer))"


def words(*hooks: list[str]) -> list[str]:
    """Its command line: each of `hooks` is a hook's name and arguments, as rewarm_hooks.series has them.

    Neither -m, since runpy takes longer than a small diff, nor `site`, which the hooks have no use for: CRIU waits.
    """
    line: list[str] = []
    for hook in hooks:
        line += [SEPARATOR, *hook] if line else hook
    packages = os.path.dirname(os.path.dirname(os.path.abspath(rewarm_hooks.__file__)))
    return [sys.executable, "-I", "-S", "-c", _CODE, packages, *line]
