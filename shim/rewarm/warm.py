"""`create` with a snapshot: choose the newest that fits, restore it, write down how it went."""

from __future__ import annotations

import json
import os
import time

from rewarm import compat, node
from rewarm.errors import RewarmError, SnapshotNotFound, Unfit
from rewarm.oci import log, record, spec
from rewarm.oci.argv import Invocation
from rewarm.oci.spec import write_atomically
from rewarm.request import Request
from rewarm.restore import Plan, restore
from rewarm.settings import Settings
from rewarm.store.directory import DirectoryStore, SnapshotRef
from rewarm.store.manifest import Manifest, Requires
from rewarm.trace import Trace


def attempt(
    invocation: Invocation, bundle_spec: spec.Spec, wanted: Request, settings: Settings, binary: str, directory: str
) -> str:
    """Restore the container; returns "" when it is warm. Raises RewarmError or OSError with everything undone."""
    deadline = time.monotonic() + settings.deadline
    trace = Trace()
    with trace.phase("find"):
        store = DirectoryStore(settings.store)
        here = requirements(bundle_spec, settings, binary)
        ref, manifest = choose(store, wanted, here)
    plan = Plan(invocation, bundle_spec, wanted, settings, binary, directory, store, ref, manifest, trace, deadline)
    with trace.phase("restore"):
        try:
            notes = restore(plan)
        except BaseException:
            _clear(directory)
            raise
    _report(plan, notes)
    return ""


def _report(plan: Plan, notes: list[str]) -> None:
    """Say how it went. The container is there: nothing here may fail the call."""
    name = f"{plan.ref.namespace}/{plan.ref.name}/{plan.ref.id[:12]}"
    plan.trace.note("container", plan.invocation.container_id)
    plan.trace.note("snapshot", name)
    seconds = {phase.name: round(phase.seconds, 6) for phase in plan.trace.phases()}
    outcome = {"outcome": "warm", "snapshot": name, "seconds": seconds, "notes": notes}
    try:
        plan.trace.write(os.path.join(plan.directory, "trace.json"))
        write_atomically(os.path.join(plan.directory, "outcome.json"), json.dumps(outcome).encode(), 0o644)
    except OSError as error:
        notes = [*notes, f"cannot write {plan.directory}: {error}"]
    for line in notes:
        log.write(plan.invocation, "warning", f"rewarm: {line}")
    if plan.invocation.log:
        log.write(plan.invocation, "info", f"rewarm: {plan.invocation.container_id} restored from {name}")


def requirements(bundle_spec: spec.Spec, settings: Settings, binary: str) -> Requires:
    """What this container on this node offers to a snapshot. Raises Unfit where no CRIU can restore anything."""
    criu = node.criu_binary(settings)
    version = node.version_of(criu, settings) if criu else ""
    if node.version_tuple(version) < node.criu_needed():
        needed = ".".join(map(str, node.criu_needed()))
        raise Unfit(
            "find CRIU",
            criu or "criu",
            f"this kernel needs {needed} or newer, found {version or 'none'}",
            "run `rewarm doctor`",
        )
    return compat.describe(bundle_spec, node.version_of(binary, settings), version, settings)


def choose(store: DirectoryStore, wanted: Request, here: Requires) -> tuple[SnapshotRef, Manifest]:
    """The newest snapshot of the name that fits; else the newest one's reason is raised."""
    first: RewarmError | None = None
    for ref, manifest in store.candidates(wanted.namespace, wanted.snapshot):
        try:
            if isinstance(manifest, RewarmError):
                raise manifest
            compat.check(manifest.requires, here)
            return ref, manifest
        except RewarmError as error:
            first = first or error
    if first is not None:
        raise first
    raise SnapshotNotFound(
        "find snapshot",
        f"{wanted.namespace}/{wanted.snapshot}",
        "there is none in the store",
        "capture one with `rewarm capture` or rewarm.dev/capture: on-ready",
    )


def _clear(directory: str) -> None:
    """Empty the container directory for the cold start: nothing of the failed restore is needed any more."""
    record.remove(directory)
    record.make_directory(directory)
