"""What to look at after a failure on a machine that is gone by then."""

from __future__ import annotations

import json
from pathlib import Path

from support.node import Node
from support.runtime import Runtime

_LOG_LINES = 12
_CRIU_LINES = 25


def of(node: Node, *others: Runtime) -> str:
    """The ends of the runtimes' logs, CRIU's kept logs, every outcome.json, and what the containers printed."""
    parts: list[str] = []
    for runtime in (node.runtime, *others):
        parts.append(f"--- {runtime.log}")
        parts += [f"{line.get('level')}: {line.get('msg')}" for line in runtime.log_lines()[-_LOG_LINES:]]
        for container in runtime.containers.values():
            text = (container.stdout.text() + container.stderr.text())[-1500:].strip()
            if text and text != "ready":
                parts += [f"--- output of {container.id}", text]
    for path in sorted(node.state.glob("last-failed-*")):
        parts += [f"--- {path.name}", *_tail(path, _CRIU_LINES)]
    for path in sorted((node.state / "containers").glob("*/*/outcome.json")):
        parts.append(f"--- {path.parent.name}: {_outcome(path)}")
    return "\n".join(parts)[-12000:]


def _tail(path: Path, lines: int) -> list[str]:
    text = path.read_text(errors="replace").splitlines()
    errors = [line for line in text[:-lines] if "Error" in line]
    return [*errors[-10:], *text[-lines:]]


def _outcome(path: Path) -> str:
    try:
        return json.dumps(json.loads(path.read_text()))[:1000]
    except (OSError, ValueError) as error:
        return str(error)
