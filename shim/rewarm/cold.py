"""`create` without a fitting snapshot: a container that starts from nothing and can be captured."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys

from rewarm import additions, pids
from rewarm.oci import record, spec
from rewarm.oci.argv import Invocation
from rewarm.oci.record import Record
from rewarm.oci.spec import write_atomically
from rewarm.request import Request


def prepare(
    invocation: Invocation,
    bundle_spec: spec.Spec,
    wanted: Request,
    directory: str,
    kept: Record,
    reason: str,
) -> None:
    """Write the record and the prepared config.json; start the watcher of a container that is to be captured.

    `kept` is the record as `create` began it; undoing a restore has taken the directory away. Raises OSError,
    FileExistsError if another call has begun this container meanwhile.
    """
    request = {key: str(value) for key, value in wanted._asdict().items()}
    kept = kept._replace(phase=record.COLD, reason=reason, request=request)
    if os.path.isdir(directory):
        record.save(directory, kept)
    else:
        record.make_directory(directory, kept)
    outcome = {"outcome": "cold", "reason": reason}
    write_atomically(os.path.join(directory, "outcome.json"), json.dumps(outcome).encode(), 0o644)
    record.bound_control(directory, bundle_spec)
    spec.save(invocation.bundle, additions.cold(bundle_spec, wanted, directory))
    with contextlib.suppress(OSError):  # then they are where they happen to be
        pids.begin(bundle_spec, wanted.snapshot)
    if wanted.capture == "on-ready":
        _watch(directory)


def _watch(directory: str) -> None:
    """Start the watcher apart from this process: its streams are not the container's, and it outlives `create`."""
    with open(os.path.join(directory, "watcher.log"), "wb") as log:
        subprocess.Popen(
            [sys.executable, "-I", "-m", "rewarm.watcher", directory],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            cwd="/",
        )
