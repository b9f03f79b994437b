"""rewarm verify: read everything, say what is damaged."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import click

from rewarm.errors import RewarmError
from rewarm.store.directory import DirectoryStore, SnapshotRef

from . import options, output, pick
from .progress import Progress


@click.command("verify")
@click.argument("snapshot", metavar="[NAME|ID]", required=False)
@options.namespace
@options.as_json
@options.store
@options.config
@click.pass_context
def command(
    ctx: click.Context,
    snapshot: str | None,
    namespace: str | None,
    as_json: bool,
    store: str | None,
    config: Path | None,
) -> None:
    """Read snapshots completely and name what is damaged.

    All of the store, or all snapshots of a name, or the one with an id. Exit status 1 when something is damaged.
    """
    from rewarm.store.verify import verify

    where = DirectoryStore(options.load(config, store).store)
    refs = where.list(namespace) if snapshot is None else pick.every(where, snapshot, namespace)
    read = 0
    with Progress("reading snapshots", _bytes(where, refs)) as progress:

        def advance(count: int) -> None:
            nonlocal read
            read += count
            progress.advance(count)

        findings = list(verify(where, refs, advance))
    if as_json:
        damage = [{"object": finding.object, "problem": finding.problem} for finding in findings]
        output.document({"snapshots": len(refs), "bytes_read": read, "findings": damage})
    else:
        for finding in findings:
            click.echo(output.printable(f"{finding.object}: {finding.problem}"))
        total = f"{len(findings)} found" if findings else "none"
        click.echo(f"{len(refs)} snapshot{'s' * (len(refs) != 1)}, {output.size(read)} read, damage: {total}")
    if findings:
        ctx.exit(1)


def _bytes(store: DirectoryStore, refs: Iterable[SnapshotRef]) -> int:
    """How much there is to read, for the progress display: each pack once, those of damaged manifests unknown."""
    sizes: dict[str, int] = {}
    for ref in refs:
        try:
            manifest = store.load(ref)
        except RewarmError:
            continue  # verify will say it
        for entry in manifest.files:
            sizes[entry.pack] = max(sizes.get(entry.pack, 0), entry.offset + entry.size)
        sizes.update((pack.digest, pack.size) for pack in manifest.packs)
    return sum(sizes.values())
