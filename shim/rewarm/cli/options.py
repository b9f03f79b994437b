"""Options that several commands share, and the settings that they change."""

from __future__ import annotations

import os
import re
from pathlib import Path

import click

from rewarm import settings
from rewarm.settings import Settings

config = click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Settings file, instead of $REWARM_CONFIG or /etc/rewarm/config.yaml.",
)
store = click.option("--store", metavar="URL", help="The store: a directory or file:// URL, instead of the settings'.")
namespace = click.option("--namespace", "-n", metavar="NS", help="Only snapshots of this namespace.  [default: all]")
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")


def load(config: Path | None, store: str | None) -> Settings:
    """The node's settings with the options put over them. Raises SettingsError."""
    found = settings.load(config)
    if store is None:
        return found
    return found._replace(store=absolute(store))


def absolute(store: str) -> str:
    """The settings want an absolute path or a URL; on a command line a relative path has a meaning."""
    # An empty one, as an unset variable makes it, is left for the store to refuse: it must not be this directory.
    return store if not store or re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", store) else os.path.abspath(store)
