"""The OCI entry: create, start and delete of containers that rewarm has to do with; everything else is exec'ed.

The launcher (native/launcher.c) calls this as `python -m rewarm.runtime` with the words it got itself.
Whatever happens here, a container that can start cold does.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from rewarm import recover, start
from rewarm import request as requests
from rewarm import settings as configuration
from rewarm.errors import RequestError, RewarmError, SettingsError
from rewarm.oci import argv, log, record, runc, spec
from rewarm.oci.argv import Invocation
from rewarm.request import Request
from rewarm.settings import Settings


def main(words: list[str]) -> int:
    invocation = argv.parse(words)
    settings, problem = _settings()
    binary = runc.find(settings)
    if problem is not None and invocation.command == "create":
        log.write(invocation, "warning", f"rewarm: {problem}")
    if invocation.command == "create":
        return create(invocation, settings, binary, problem)
    if invocation.command == "start":
        return start.start(invocation, settings, binary)
    if invocation.command == "delete":
        return delete(invocation, settings, binary)
    runc.replace_process(binary, words)
    return 127


def create(invocation: Invocation, settings: Settings, binary: str, problem: SettingsError | None) -> int:
    """Restore where the container asks for it and a snapshot fits, else become `runc create`."""
    record.check_id(invocation.container_id)
    directory = record.directory(settings.state_dir, invocation.root, invocation.container_id)
    for line in recover.sweep(settings.state_dir, binary):
        log.write(invocation, "warning", f"rewarm: a left-over restore could not be undone: {line}")
    bundle_spec = spec.load(invocation.bundle)
    wanted = requests.parse(bundle_spec, settings)
    # With the id taken, runc has the words for it.
    if wanted is None or runc.exists(invocation.root, invocation.container_id):
        runc.replace_process(binary, invocation.words)
        return 127
    if os.path.lexists(directory):
        recover.forget(directory)  # of a container that runc no longer knows
    record.make_directory(directory)
    reason = (
        str(problem) if problem is not None else _warm(invocation, bundle_spec, wanted, settings, binary, directory)
    )
    if not reason:
        return 0
    if wanted.on_miss == "fail":
        recover.forget(directory)
        log.write(invocation, "error", f"rewarm: {reason} (rewarm.dev/on-miss is fail)")
        return 1
    return _cold(invocation, bundle_spec, wanted, binary, directory, reason)


def _warm(
    invocation: Invocation, bundle_spec: spec.Spec, wanted: Request, settings: Settings, binary: str, directory: str
) -> str:
    """Restore the container; "" when it is warm, else the reason why it is not."""
    from rewarm import warm  # a node whose settings are broken never gets here

    try:
        return warm.attempt(invocation, bundle_spec, wanted, settings, binary, directory)
    except (RewarmError, OSError, ValueError) as error:
        return str(error)


def _cold(
    invocation: Invocation, bundle_spec: spec.Spec, wanted: Request, binary: str, directory: str, reason: str
) -> int:
    """Start the program from nothing, in a container that can be captured."""
    from rewarm import cold

    log.write(invocation, "warning", f"rewarm: cold start of {invocation.container_id}: {reason}")
    cold.prepare(invocation, bundle_spec, wanted, directory, reason)
    runc.replace_process(binary, invocation.words)
    return 127


def delete(invocation: Invocation, settings: Settings, binary: str) -> int:
    """runc's delete with its own words and status; then what rewarm keeps about the container goes too."""
    directory = record.directory(settings.state_dir, invocation.root, invocation.container_id)
    kept = record.load(directory)
    if kept is not None and kept.phase == record.RESTORING and not kept.owner_lives():
        recover.recover(directory, binary)
    status = subprocess.run([binary, *invocation.words], check=False).returncode
    if not runc.exists(invocation.root, invocation.container_id) and os.path.isdir(directory):
        recover.forget(directory)
    return status


def _settings() -> tuple[Settings, SettingsError | None]:
    try:
        return configuration.load(), None
    except SettingsError as error:
        return Settings(), error


def _entry() -> int:
    # A signal that ends rewarm in the middle leaves the undoing to the guard; SIGTERM gives the time to do it here.
    signal.signal(signal.SIGTERM, _terminated)
    words = sys.argv[1:]
    try:
        return main(words)
    except RequestError as error:
        log.write(argv.parse(words), "error", f"rewarm: {error}")
        return 1
    except (RewarmError, OSError) as error:
        return _last_resort(words, error)


def _last_resort(words: list[str], error: Exception) -> int:
    """Something outside the restore failed: say so, and let runc have the call unless that would be wrong."""
    invocation = argv.parse(words)
    if invocation.command == "start":
        log.write(invocation, "error", f"rewarm: {error}")
        return 1
    log.write(invocation, "warning", f"rewarm: {error}")
    runc.replace_process(runc.find(Settings()), words)
    return 127


def _terminated(number: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(_entry())
