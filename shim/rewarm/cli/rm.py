"""rewarm rm: remove snapshots, and what of their bytes no other snapshot needs."""

from __future__ import annotations

from pathlib import Path

import click

from rewarm.errors import RewarmError, StoreError
from rewarm.store.directory import DirectoryStore, SnapshotRef

from . import options, output, pick


@click.command("rm")
@click.argument("snapshots", metavar="NAME|ID...", nargs=-1, required=True)
@click.option("--all-of-name", is_flag=True, help="Remove every snapshot of a name that has several.")
@options.namespace
@options.as_json
@options.store
@options.config
@click.pass_context
def command(
    ctx: click.Context,
    snapshots: tuple[str, ...],
    all_of_name: bool,
    namespace: str | None,
    as_json: bool,
    store: str | None,
    config: Path | None,
) -> None:
    """Remove snapshots.

    Each is a name, 6 or more digits of an id, or NAMESPACE/NAME@ID; damaged ones too. Does not ask. One that cannot
    be removed does not keep the others: the exit status is 1 then.
    """
    where = DirectoryStore(options.load(config, store).store)
    removed: list[dict[str, object]] = []
    failed = False
    for text in snapshots:
        try:
            for ref in _meant(where, text, namespace, all_of_name):
                freed = where.remove(ref)
                removed.append({"namespace": ref.namespace, "name": ref.name, "id": ref.id, "freed_bytes": freed})
                if not as_json:
                    click.echo(f"removed {ref}, {output.size(freed)} freed")
        except RewarmError as error:
            output.complain(str(error))
            failed = True
    if as_json:
        output.document(removed)
    if failed:
        ctx.exit(1)


def _meant(store: DirectoryStore, text: str, namespace: str | None, all_of_name: bool) -> list[SnapshotRef]:
    found = pick.every(store, text, namespace)
    if len(found) > 1 and not all_of_name:
        ids = ", ".join(ref.id[:12] for ref in found[:8]) + (", …" if len(found) > 8 else "")
        step = "give an id, or --all-of-name for all of them"
        raise StoreError("remove", repr(text[:80]), f"it has {len(found)} snapshots: {ids}", step)
    return found
