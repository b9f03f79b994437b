"""rewarm ls: what the store holds."""

from __future__ import annotations

from pathlib import Path

import click

from rewarm.errors import RewarmError, SnapshotNotFound
from rewarm.store.directory import DirectoryStore, SnapshotRef
from rewarm.store.manifest import Manifest

from . import options, output

Row = tuple[SnapshotRef, Manifest | RewarmError]


@click.command("ls")
@options.namespace
@options.as_json
@options.store
@options.config
def command(namespace: str | None, as_json: bool, store: str | None, config: Path | None) -> None:
    """List the snapshots of the store.

    The newest of each name comes first. A damaged one is shown as such; that its files are whole is not looked
    at, `rewarm verify` does that.
    """
    found = rows(DirectoryStore(options.load(config, store).store), namespace)
    if as_json:
        output.document([_document(ref, manifest) for ref, manifest in found])
        return
    header = ("NAMESPACE", "NAME", "ID", "CREATED", "SIZE", "MEMORY", "IMAGE")
    output.columns(header, [_cells(ref, manifest) for ref, manifest in found])
    for _, manifest in found:
        if isinstance(manifest, RewarmError):
            output.complain(str(manifest))


def rows(store: DirectoryStore, namespace: str | None) -> list[Row]:
    """Every snapshot with its manifest, or with why that cannot be read; by name, newest first, damaged last."""
    found: list[Row] = []
    for ref in store.list(namespace):
        try:
            found.append((ref, store.load(ref)))
        except SnapshotNotFound:
            continue  # removed since the store was listed
        except RewarmError as error:
            found.append((ref, error))
    found.sort(key=lambda row: row[1].created_key if isinstance(row[1], Manifest) else ("", ""), reverse=True)
    found.sort(key=lambda row: row[0][:2])
    return found


def _cells(ref: SnapshotRef, manifest: Manifest | RewarmError) -> tuple[str, ...]:
    if isinstance(manifest, RewarmError):
        return (ref.namespace, ref.name, ref.id[:12], "damaged", "-", "-", "-")
    return (
        ref.namespace,
        ref.name,
        ref.id[:12],
        output.age(manifest.created),
        output.size(manifest.stored_bytes),
        output.size(manifest.memory_bytes),
        manifest.requires.image or "-",
    )


def _document(ref: SnapshotRef, manifest: Manifest | RewarmError) -> dict[str, object]:
    document: dict[str, object] = {"namespace": ref.namespace, "name": ref.name, "id": ref.id}
    if isinstance(manifest, RewarmError):
        return {**document, "damaged": str(manifest)}
    return {
        **document,
        "created": manifest.created,
        "size_bytes": manifest.stored_bytes,
        "memory_bytes": manifest.memory_bytes,
        "image": manifest.requires.image,
        "damaged": None,
    }
