"""`create` with a snapshot: choose the newest that fits, restore it within the deadline."""

from __future__ import annotations

import os
from collections.abc import Callable

from rewarm import aside, compat, deadline, image, node, policy
from rewarm.errors import RestoreError, RewarmError, SnapshotNotFound, Unfit
from rewarm.gpu import container
from rewarm.oci import log, spec
from rewarm.oci.argv import Invocation
from rewarm.oci.spec import LIBRARY_DESTINATION
from rewarm.request import Request
from rewarm.restore import Plan, restore
from rewarm.settings import Settings
from rewarm.store.directory import DirectoryStore, SnapshotRef
from rewarm.store.manifest import Manifest, Requires
from rewarm.trace import Trace


def attempt(
    invocation: Invocation,
    bundle_spec: spec.Spec,
    wanted: Request,
    settings: Settings,
    binary: str,
    directory: str,
    life: int,
) -> None:
    """Restore the container; `life` as in Plan. Raises what stands against it, with everything undone."""
    trace = Trace()
    deadline.arm(settings.deadline)
    try:
        try:
            with trace.phase("find"):
                store = DirectoryStore(settings.store)
                here = aside.run(lambda: requirements(bundle_spec, settings, binary))
                root = os.path.realpath(spec.rootfs(invocation.bundle, bundle_spec))
                ref, manifest = aside.run(
                    lambda: choose(
                        store,
                        wanted,
                        here,
                        settings,
                        lambda: image.identity(bundle_spec, settings.state_dir, os.getpid(), root),
                    )
                )
            plan = Plan(invocation, bundle_spec, life, settings, binary, directory, store, ref, manifest, trace)
            if wanted.engine != "none":
                _restore_engine(plan, wanted)
            else:
                with trace.phase("restore"):
                    restore(plan)
        finally:
            # A timer outlives execve(2): it would kill the runc that this process becomes.
            deadline.disarm()
    except deadline.Passed:
        raise RestoreError(
            "restore container",
            invocation.container_id,
            f"the deadline of {settings.deadline:g} s passed during {_stage(trace)}",
            "see `deadline` in the settings",
        ) from None


def _restore_engine(plan: Plan, wanted: Request) -> None:
    from rewarm import waker  # only who has an engine waits for its import

    with waker.reserved(plan.directory) as its_log:
        with plan.trace.phase("restore"):
            restore(plan)
        if text := waker.start(plan.directory, wanted, plan.spec, its_log):
            log.write(plan.invocation, "warning", f"rewarm: {text}")


def _stage(trace: Trace) -> str:
    """The innermost phase that the deadline has ended."""
    ended = [phase for phase in trace.phases() if phase.error == deadline.Passed.__name__]
    return max(ended, key=lambda phase: phase.depth).name if ended else "preparation"


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
    gpus = container.of_spec(bundle_spec, binary, settings.libcuda)
    return compat.describe(bundle_spec, node.version_of(binary, settings), version, settings, gpus)


def choose(
    store: DirectoryStore, wanted: Request, here: Requires, settings: Settings, image_id: Callable[[], str]
) -> tuple[SnapshotRef, Manifest]:
    """The newest snapshot of the name that fits, in the first namespace that has one; else the first one's reason is
    raised. `image_id` as in compat.check_image."""
    first: RewarmError | None = None
    namespaces = (wanted.namespace, *policy.of(settings.namespaces, wanted.namespace).share)
    for ref, manifest in (one for space in namespaces for one in store.candidates(space, wanted.snapshot)):
        try:
            if isinstance(manifest, RewarmError):
                raise manifest
            compat.check(manifest.requires, here)
            if wanted.device_memory == "off" and any(
                m.destination == LIBRARY_DESTINATION for m in manifest.requires.mounts
            ):
                cause = "snapshot was taken with the device memory library, and rewarm.dev/device-memory is off"
                raise Unfit("fit snapshot", "to this container", cause)
            engine = manifest.requires.engine
            if engine not in ("none", wanted.engine):
                cause = f"its engine was paused by rewarm.dev/engine: {engine}, which is {wanted.engine} here"
                raise Unfit("fit snapshot", "to this container", cause, "give both the same annotation")
            compat.check_image(manifest.requires, image_id)
            return ref, manifest
        except RewarmError as error:
            first = first or error
    if first is not None:
        raise first
    raise SnapshotNotFound(
        "find snapshot",
        " or ".join(f"{space}/{wanted.snapshot}" for space in namespaces),
        "there is none in the store",
        "capture one with `rewarm capture` or rewarm.dev/capture: on-ready",
    )
