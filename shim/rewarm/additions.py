"""A container's spec with rewarm's own additions: where each comes from on this node, and who gets which."""

from __future__ import annotations

import os
from collections.abc import Collection

from rewarm import installation, preload
from rewarm.errors import RestoreError
from rewarm.oci import record, spec
from rewarm.oci.spec import CONTROL_DESTINATION, HOOKS_DESTINATION, LIBRARY_DESTINATION, Spec
from rewarm.request import Request


def cold(bundle_spec: Spec, wanted: Request, directory: str) -> Spec:
    """Of a container that starts from nothing and can be captured; `directory` is its container directory. Raises
    OSError."""
    library = preload.provide(bundle_spec, wanted, directory)
    return spec.prepared(bundle_spec, record.control(directory), library, _hooks(bundle_spec))


def restored(bundle_spec: Spec, there: Collection[str], directory: str) -> Spec:
    """Of one that is restored: those whose mounts are `there`, in the snapshot's tree. Raises RestoreError."""
    control = record.control(directory) if CONTROL_DESTINATION in there else None
    library = preload.file(directory) if LIBRARY_DESTINATION in there else None
    hooks = _hooks(bundle_spec) if HOOKS_DESTINATION in there else None
    if HOOKS_DESTINATION in there and hooks is None:
        cause = f"{installation.hooks()} is not there"
        raise RestoreError("mount", HOOKS_DESTINATION, cause, "install rewarm again")
    return spec.prepared(bundle_spec, control, library, hooks)


def _hooks(bundle_spec: Spec) -> str | None:
    """None where it is not installed, and in a user namespace, in which the options of its file system could not be
    changed."""
    directory = installation.hooks()
    return directory if os.path.isdir(directory) and not spec.has_users(bundle_spec) else None
