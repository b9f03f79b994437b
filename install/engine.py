"""What the engines have in common: the runtime's name, and what registering it has come to. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

RUNTIME = "rewarm"
# The name of its program, to know a path of rewarm's from one of others.
PROGRAM = "rewarm-runc"
ANNOTATIONS = "rewarm.dev/*"


@dataclass(frozen=True)
class Done:
    """`paths` are the files that name the runtime; `runc` is what the node's runc runtime runs, "" for plain runc.

    `copied` is the runtime of containerd's whose options rewarm's has, "" where it has none.
    """

    changed: bool = False
    paths: tuple[Path, ...] = ()
    runc: str = ""
    copied: str = ""
