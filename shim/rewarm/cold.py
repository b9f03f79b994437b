"""`create` without a fitting snapshot: a container that starts from nothing and can be captured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict

from rewarm.oci import record, spec
from rewarm.oci.argv import Invocation
from rewarm.oci.record import Record
from rewarm.oci.spec import write_atomically
from rewarm.request import Request


def prepare(invocation: Invocation, bundle_spec: spec.Spec, wanted: Request, directory: str, reason: str) -> None:
    """Write the record and the prepared config.json; start the watcher where the container is to be captured."""
    kept = Record(
        id=invocation.container_id,
        root=invocation.root,
        bundle=invocation.bundle,
        phase=record.COLD,
        systemd_cgroup=invocation.systemd_cgroup,
        namespace=wanted.namespace,
        reason=reason,
        request={key: str(value) for key, value in asdict(wanted).items()},
    )
    record.save(directory, kept)
    outcome = {"outcome": "cold", "reason": reason}
    write_atomically(os.path.join(directory, "outcome.json"), json.dumps(outcome).encode(), 0o644)
    spec.save(invocation.bundle, spec.prepared(bundle_spec, record.control(directory)))
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
