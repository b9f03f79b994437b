"""rewarm gc: free what no snapshot needs."""

from __future__ import annotations

from pathlib import Path

import click

from rewarm.store.directory import DirectoryStore

from . import options, output


@click.command("gc")
@click.option("--dry-run", is_flag=True, help="Only say what would be freed.")
@options.as_json
@options.store
@options.config
def command(dry_run: bool, as_json: bool, store: str | None, config: Path | None) -> None:
    """Free what no snapshot needs.

    Removes packs that no manifest names and what captures that died left behind. Captures and restores may run
    meanwhile. Usually there is nothing: `rewarm rm` frees what it removes, and a capture what died before it.
    """
    found = DirectoryStore(options.load(config, store).store).gc(dry_run=dry_run)
    if as_json:
        output.document({**found._asdict(), "dry_run": dry_run})
        return
    verb = "would be freed" if dry_run else "freed"
    packs = f"{found.packs} pack{'s' * (found.packs != 1)}"
    captures = f"{found.workspaces} dead capture{'s' * (found.workspaces != 1)}"
    click.echo(f"{output.size(found.freed_bytes)} {verb}: {packs}, {captures}")
