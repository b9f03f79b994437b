"""The `rewarm` command: what an operator does with snapshots and with a node.

Each command is a module of its own that is imported when it is called; `rewarm --help` imports none of them. A
RewarmError is one line on standard error and exit status 1, a wrong command line is exit status 2.
"""

from __future__ import annotations

import errno
import importlib
import select
from typing import Any

import click

import rewarm
from rewarm.errors import RewarmError

COMMANDS = {
    "capture": "Make a snapshot of a running container.",
    "ps": "List the containers with an annotation of this node.",
    "ls": "List the snapshots of the store.",
    "inspect": "Show what a snapshot holds and what it needs.",
    "rm": "Remove snapshots.",
    "gc": "Free what no snapshot needs.",
    "verify": "Read snapshots completely and name what is damaged.",
    "doctor": "Check whether this node can capture and restore.",
}


class _Commands(click.Group):
    """A group whose commands are imported by name: command NAME is `command` in module rewarm.cli.NAME."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        found: click.Command = importlib.import_module(f"{__name__}.{cmd_name}").command
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # click's own way asks every command for its help, and so imports them all.
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except RewarmError as error:
            text = str(error)
        except OSError as error:
            if error.errno == errno.EPIPE and _nobody_reads():
                raise  # click ends quietly then
            where = f" {error.filename}" if error.filename else ""
            text = f"{ctx.invoked_subcommand}{where}: {error.strerror or error}"
        from .output import complain  # only for a call that failed

        complain(text)
        ctx.exit(1)


def _nobody_reads() -> bool:
    """Whether standard output is a pipe whose reader has gone, as `rewarm ls | head -1` makes it."""
    poll = select.poll()
    poll.register(1, 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(rewarm.__version__, prog_name="rewarm")
def main() -> None:
    """Start containers warm: capture running ones, and look after the snapshots that they restart from."""
