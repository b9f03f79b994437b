"""Waits until one container is ready, captures it, ends. `create` starts one for each container that asks for it.

    python -m rewarm.watcher CONTAINER_DIRECTORY

Its standard error is `watcher.log` in the container directory. It goes away with its container.
"""

from __future__ import annotations

import json
import os
import select
import sys
import time

from rewarm import image, processes, settings
from rewarm.capture import capture
from rewarm.errors import RewarmError
from rewarm.oci import record, runc, spec
from rewarm.oci.record import Record
from rewarm.oci.runc import Container, Runc
from rewarm.oci.spec import write_atomically
from rewarm.readiness import probe
from rewarm.request import Request
from rewarm.settings import Settings
from rewarm.store.directory import DirectoryStore
from rewarm.warm import choose, requirements

_POLL = 0.1
_CREATE_TIMEOUT = 120.0


def watch(directory: str, configured: Settings) -> tuple[bool, str]:
    """Capture the container of `directory` once it is ready; whether that was done, and one line on what came of it."""
    kept = record.load(directory)
    if kept is None:
        return False, "its container directory has no record"
    wanted = Request(**kept.request)
    container = _wait_for_start(directory, kept)
    if container is None:
        return False, "the container was not started"
    low_level = Runc(runc.find(configured), kept.root, kept.systemd_cgroup)
    if _has_fitting(wanted, container, configured, low_level.binary):
        return False, "a fitting snapshot exists"
    if reason := _wait_until_ready(directory, wanted, container, low_level, configured.ready_timeout):
        return False, reason
    if _has_fitting(wanted, container, configured, low_level.binary):
        return False, "a fitting snapshot exists"
    made = capture(container, wanted.namespace, wanted.snapshot, configured, systemd_cgroup=kept.systemd_cgroup)
    said = f"captured {made.ref.namespace}/{made.ref.name}/{made.ref.id[:12]}, paused for {made.paused:.2f} s"
    return True, "; ".join([said, *made.notes])


def _wait_for_start(directory: str, kept: Record) -> Container | None:
    """runc's state of the container once its own program runs; None when it never does."""
    end = time.monotonic() + _CREATE_TIMEOUT
    while time.monotonic() < end and os.path.isdir(directory):
        if runc.exists(kept.root, kept.id) and os.path.exists(os.path.join(kept.root, kept.id, "state.json")):
            container = runc.load(kept.root, kept.id)
            if not os.path.lexists(container.exec_fifo):
                return container
            end = max(end, time.monotonic() + 1)  # created: an engine may take its time to start it
        time.sleep(_POLL)
    return None


def _wait_until_ready(directory: str, wanted: Request, container: Container, low_level: Runc, timeout: float) -> str:
    """Why it is not, and "" once it is."""
    why_not = probe(wanted.ready, record.control(directory), container, low_level)
    ended = "the container has ended before it was ready"
    try:
        pidfd = os.pidfd_open(container.pid)
    except ProcessLookupError:
        return ended
    reason = "nobody has asked it"
    try:
        if processes.start_time(container.pid) != container.start_time:
            return ended
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            reason = why_not()
            if not reason:
                return ""
            gone, _, _ = select.select([pidfd], [], [], _POLL)
            if gone:
                return ended
    finally:
        os.close(pidfd)
    return f"the container was not ready within {timeout:g} s: {reason}"


def _has_fitting(wanted: Request, container: Container, configured: Settings, binary: str) -> bool:
    try:
        bundle_spec = spec.load(container.bundle)
        choose(
            DirectoryStore(configured.store),
            wanted,
            requirements(bundle_spec, configured, binary),
            configured,
            lambda: image.identity(bundle_spec, configured.state_dir, container.pid, "/"),
        )
    except RewarmError:
        return False
    return True


def main(words: list[str]) -> int:
    directory = words[0]
    status = 0
    try:
        captured, said = watch(directory, settings.load())
    except (RewarmError, OSError, ValueError) as error:
        captured, said, status = False, f"not captured: {error}", 1
    # A process's name is the container's choice, and the log is read at a terminal.
    print("".join(letter if letter.isprintable() else "?" for letter in said), file=sys.stderr, flush=True)
    if os.path.isdir(directory):
        outcome = os.path.join(directory, "capture.json")
        write_atomically(outcome, json.dumps({"captured": captured, "text": said}).encode(), 0o644)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
