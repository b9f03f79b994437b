"""rewarm doctor: can this node capture and restore, and if not, what to do about it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from rewarm import doctor
from rewarm.checks import FAILED, OK, Check

from . import options, output

_COLOURS = {"ok": "green", "warning": "yellow", "failed": "red"}


@click.command("doctor")
@click.option("--fix", is_flag=True, help="First undo what killed restores and captures left behind.")
@click.option("--node", "registration", is_flag=True, help="Check how the node's engines reach rewarm instead.")
@options.as_json
@options.store
@options.config
@click.pass_context
def command(
    ctx: click.Context, fix: bool, registration: bool, as_json: bool, store: str | None, config: Path | None
) -> None:
    """Check whether this node can capture and restore.

    Each check says what was found and, where it is not well, how to mend it. Exit status 1 when one has failed; a
    warning is something that costs time or that only some containers need.

    With --node each container engine of the node is asked whether it knows the runtime `rewarm`, hands it annotations
    and runs with that configuration.
    """
    node = doctor.look(config, None if store is None else options.absolute(store))
    problems = doctor.fix(node) if fix else []
    for problem in problems:
        output.complain(problem)
    checks = []
    for check in doctor.examine_node(node) if registration else doctor.examine(node):
        checks.append(check)
        if not as_json:
            _show(check)
    healthy = not problems and all(check.status != FAILED for check in checks)
    if as_json:
        output.document({"ok": healthy, "checks": [asdict(check) for check in checks]})
    if not healthy:
        ctx.exit(1)


def _show(check: Check) -> None:
    click.echo(f"{click.style(check.status.ljust(7), fg=_COLOURS[check.status])}   ", nl=False)
    click.echo(f"{check.name.ljust(doctor.WIDTH)}   {output.printable(check.found)}")
    if check.status != OK:
        click.echo(f"{' ' * (7 + 3 + doctor.WIDTH + 3)}mend: {output.printable(check.mend)}")
