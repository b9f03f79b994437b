"""rewarm ps: the node's containers, warm or cold, and why."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import click

from rewarm import processes, request
from rewarm.errors import OciError
from rewarm.oci import discover, pod, record, runc, spec
from rewarm.settings import Settings

from . import options, output

_LARGEST = 4 << 20
_HEX = re.compile("[0-9a-f]{64}")


class Row(NamedTuple):
    """A container. `outcome` is none for those that are runc's alone.

    `state` is runc's, "restoring" or "creating" while it is made, or "gone": the container is deleted, and what rewarm
    has of it is removed by the next create. `outcome` is "warm", "cold", or none yet; `snapshot` is what it was
    restored from, or what was looked for; `created` is an RFC 3339 time.
    """

    container: str
    runtime_root: str
    pod: dict[str, str] | None
    state: str
    outcome: str | None
    snapshot: str
    reason: str | None
    created: str


@click.command("ps")
@click.option("--all", "-a", "everything", is_flag=True, help="Those that are runc's alone, too.")
@options.as_json
@options.config
def command(everything: bool, as_json: bool, config: Path | None) -> None:
    """List the containers with an annotation of this node.

    Each was restored from a snapshot (warm), or started as without rewarm (cold), for a reason. All others are runc's
    alone: --all lists them, too, of all runc roots that the settings name (`runtime_roots`), and says why.
    """
    settings = options.load(config, None)
    found = list(_rows(settings.state_dir))
    if everything:
        known = {(os.path.realpath(row.runtime_root), row.container) for row in found}
        found += [_other(*one, settings) for one in discover.every(settings.runtime_roots) if one not in known]
    rows = sorted(found, key=lambda row: (row.created, row.container), reverse=True)
    if as_json:
        output.document([row._asdict() for row in rows])
        return
    header = ("CONTAINER", "POD", "STATE", "CREATED", "START", "FROM, OR WHY NOT")
    output.columns(header, [_cells(row) for row in rows])


def _cells(row: Row) -> tuple[str, ...]:
    place = "-" if row.pod is None else "/".join(row.pod[key] for key in ("namespace", "name", "container"))
    why = row.snapshot if row.outcome == "warm" else row.reason or "-"
    return (
        row.container[:12] if _HEX.fullmatch(row.container) else row.container,
        place,
        row.state,
        output.age(row.created),
        row.outcome or "-",
        why,
    )


def _rows(state_dir: str) -> Iterator[Row]:
    """Raises OSError if the state directory may not be read."""
    base = os.path.join(state_dir, "containers")
    for root in filter(os.path.isdir, (os.path.join(base, name) for name in _names(base))):
        for name in _names(root):
            # With a `~`: about to be there, or to be gone.
            if "~" not in name and (row := _row(os.path.join(root, name))) is not None:
                yield row


def _names(directory: str) -> list[str]:
    with suppress(FileNotFoundError):
        return os.listdir(directory)
    return []


def _row(directory: str) -> Row | None:
    try:
        kept = record.load(directory)
        if kept is None:
            return None
        created = os.stat(os.path.join(directory, "record.json")).st_mtime
    except FileNotFoundError:
        return None  # deleted meanwhile
    except OciError as error:
        now = datetime.now(UTC).isoformat()
        return Row(os.path.basename(directory), "", None, "damaged", None, "", str(error), now)
    outcome = _outcome(directory)
    wanted = f"{kept.namespace}/{kept.request.get('snapshot', '')}"
    return Row(
        kept.id,
        kept.root,
        _pod(kept.bundle),
        _state(kept),
        outcome.get("outcome"),
        outcome.get("snapshot") or kept.snapshot or wanted,
        outcome.get("reason") or kept.reason or None,
        datetime.fromtimestamp(created, UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
    )


def _other(root: str, name: str, settings: Settings) -> Row:
    """A container of runc's alone."""
    try:
        container = runc.load(root, name)
    except OciError as error:
        return Row(name, root, None, "damaged", None, "", str(error), "")
    try:
        reason = request.why_none(spec.load(container.bundle), settings)
    except OciError as error:
        reason = str(error)
    return Row(name, root, _pod(container.bundle), _state_of(container), None, "", reason, container.created)


def _outcome(directory: str) -> dict[str, str]:
    """Empty as long as it is not decided."""
    with suppress(OSError, ValueError), open(os.path.join(directory, "outcome.json"), "rb") as file:
        found = json.loads(file.read(_LARGEST))
        if isinstance(found, dict):
            return {key: value for key, value in found.items() if isinstance(value, str)}
    return {}


def _pod(bundle: str) -> dict[str, str] | None:
    with suppress(OciError):
        return pod.pod(spec.load(bundle))
    return None


def _state(kept: record.Record) -> str:
    if kept.phase == record.RESTORING and kept.owner_lives():
        return "restoring"
    try:
        container = runc.load(kept.root, kept.id)
    except OciError:
        # Rewarm's own process is runc's from the moment on at which that makes the container.
        return "creating" if kept.owner_lives() else "gone"
    return _state_of(container)


def _state_of(container: runc.Container) -> str:
    found = processes.stat(container.pid)
    if found is None or found.start_time != container.start_time or found.state in "ZX":
        return "stopped"
    return "created" if os.path.exists(container.exec_fifo) else "running"
