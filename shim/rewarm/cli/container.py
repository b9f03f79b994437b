"""What became of one container: for `rewarm inspect --container`."""

from __future__ import annotations

import glob
import json
import os
from typing import Any

import click

from rewarm.errors import OciError
from rewarm.settings import Settings

from . import output


def find(container: str, settings: Settings) -> dict[str, Any]:
    """outcome.json of the container with this id, or of the only one whose id begins so. Raises OciError."""
    base = os.path.join(settings.state_dir, "containers")
    found = sorted(glob.glob(os.path.join(glob.escape(base), "*", f"{glob.escape(container)}*", "outcome.json")))
    exact = [path for path in found if os.path.basename(os.path.dirname(path)) == container]
    if "/" in container or not found:
        raise OciError("look up container", container[:80], "rewarm has not created it, or it is deleted")
    if len(exact or found) > 1:
        raise OciError("look up container", container[:80], f"{len(exact or found)} containers are called so")
    [path] = exact or found
    try:
        with open(path, "rb") as file:
            outcome: dict[str, Any] = json.load(file)
    except (OSError, ValueError) as error:
        raise OciError("read outcome", path, str(error)) from None
    return {"container": os.path.basename(os.path.dirname(path)), **outcome}


def show(outcome: dict[str, Any]) -> None:
    """Print it for people."""
    lines = [("outcome", str(outcome.get("outcome")))]
    lines += [(key, output.printable(str(outcome[key]))) for key in ("snapshot", "reason") if outcome.get(key)]
    if "devices" in outcome:
        moved = [
            f"{one['source']} (/dev/nvidia{one['source_minor']}) -> {one['target']} (/dev/nvidia{one['target_minor']})"
            for one in outcome["devices"]
        ]
        lines += [("GPU", line) for line in moved] or [("GPUs", "the snapshot's own")]
    lines += [("note", output.printable(str(note))) for note in outcome.get("notes") or []]
    click.echo(outcome["container"])
    output.fields(lines, "  ")
