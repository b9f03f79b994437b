"""python -m rewarm.cli: the command without its installed script."""

from __future__ import annotations

from . import main

main(prog_name="rewarm")
