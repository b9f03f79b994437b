"""The OCI entry: create, start and delete of containers that rewarm has to do with; everything else is exec'ed.

The launcher (native/launcher.c) calls `entry` with the words it got itself.
Whatever happens here, a container that can start cold does. Each command imports what it needs, since
importing is most of what its time goes to.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING, NoReturn

from rewarm import processes
from rewarm import settings as configuration
from rewarm.deadline import UNDOING
from rewarm.errors import NotUndone, OciError, RequestError, RestoreError, RewarmError, SettingsError
from rewarm.oci import argv, log, mounts, record, runc, spec
from rewarm.oci.argv import Invocation
from rewarm.oci.record import Record
from rewarm.settings import Settings

if TYPE_CHECKING:
    from rewarm.apart import Child
    from rewarm.request import Request

_SWITCH = 0.0005
"""Seconds after which a thread gives Python's lock up to one that waits for it: tens of threads fetch memory, and what
the container waits for is one of them. Python's own are ten times that."""
_TERMINATED = 128 + signal.SIGTERM


def main(words: list[str]) -> int:
    invocation = argv.parse(words)
    settings, problem = _settings()
    binary = runc.find(settings)
    if problem is not None and invocation.command == "create":
        log.write(invocation, "warning", f"rewarm: {problem}")
    if invocation.command == "create":
        return create(invocation, settings, binary, problem)
    if invocation.command == "start":
        from rewarm import start

        return start.start(invocation, settings, binary)
    if invocation.command == "delete":
        return delete(invocation, settings, binary)
    runc.replace_process(binary, words)
    return 127


def create(invocation: Invocation, settings: Settings, binary: str, problem: SettingsError | None) -> int:
    """Restore where the container asks for it and a snapshot fits, else become `runc create`."""
    from rewarm import recover
    from rewarm import request as requests

    record.check_id(invocation.container_id)
    directory = record.directory(settings.state_dir, invocation.root, invocation.container_id)
    if os.path.lexists(directory):
        recover.settle(directory, binary)
    bundle_spec = spec.load(invocation.bundle)
    reason = str(problem or "")
    if problem is None:
        wanted = requests.parse(bundle_spec, settings)
    else:
        wanted, passed_over = _unsettled(bundle_spec, settings)
        reason += passed_over
    # With the id taken, runc has the words for it.
    if runc.exists(invocation.root, invocation.container_id):
        runc.replace_process(binary, invocation.words)
        return 127
    if os.path.lexists(directory):
        kept = _load(directory)
        if kept is not None and kept.owner_lives():
            return _taken(invocation)
        recover.forget(directory)  # of a container that runc no longer knows
    for line in requests.without_effect(bundle_spec, settings):
        log.write(invocation, "warning", f"rewarm: {line}")
    if wanted is None:
        runc.replace_process(binary, invocation.words)
        return 127
    kept = _record(invocation, wanted)
    try:
        record.make_directory(directory, kept)
    except FileExistsError:
        return _taken(invocation)
    except OSError as error:
        reason = reason or f"make container directory {directory}: {error.strerror}; see `state_dir` in the settings"
    reason = reason or _warm(invocation, bundle_spec, wanted, settings, binary, directory)
    if not reason:
        return 0
    if wanted.on_miss == "fail":
        for line in _forget(directory):
            log.write(invocation, "warning", f"rewarm: {line}")
        log.write(invocation, "error", f"rewarm: {reason} (rewarm.dev/on-miss is fail)")
        return 1
    return _cold(invocation, bundle_spec, wanted, binary, directory, kept, reason)


def _unsettled(bundle_spec: spec.Spec, settings: Settings) -> tuple[Request | None, str]:
    """What a container asks for where the node's settings are not known, and what was passed over of it.

    They may say that its annotations do not count, or pin others: so a mistake in one makes no container fail. It
    starts cold, unless it says itself that it would rather fail (`on-miss`), and is not captured.
    """
    from rewarm import annotation
    from rewarm import request as requests

    passed_over = ""
    try:
        wanted = requests.parse(bundle_spec, settings)
    except RequestError as error:
        # As if it had opted in and said nothing more, but of which container that is, and what it would rather.
        passed_over = f"; passed over: {error}"
        found = spec.spec_annotations(bundle_spec)
        kept = {key: value for key, value in found.items() if not key.startswith(annotation.PREFIX)}
        least = {"snapshot": "auto", "device-memory": "off"}
        for key in ("container", "on-miss"):
            value = found.get(annotation.PREFIX + key, "")
            if annotation.problem(key, value) is None:
                least[key] = value
        kept |= {annotation.PREFIX + key: value for key, value in least.items()}
        wanted = requests.parse({**bundle_spec, "annotations": kept}, settings)
    return wanted and wanted._replace(capture="never"), passed_over


def _taken(invocation: Invocation) -> int:
    """Two creates of one id at once: runc does not know the first one yet, so these are its words from here."""
    log.write(
        invocation, "error", f"container with given ID already exists: {invocation.container_id} is being created"
    )
    return 1


def _record(invocation: Invocation, wanted: Request) -> Record:
    kept = Record(
        id=invocation.container_id,
        root=invocation.root,
        bundle=invocation.bundle,
        phase=record.RESTORING,
        systemd_cgroup=invocation.systemd_cgroup,
        pid_file=os.path.abspath(invocation.pid_file) if invocation.pid_file else "",
        namespace=wanted.namespace,
    )
    return kept.owned()


def _warm(
    invocation: Invocation, bundle_spec: spec.Spec, wanted: Request, settings: Settings, binary: str, directory: str
) -> str:
    """Restore the container; "" when it is warm, else the reason why it is not. Raises NotUndone."""
    from rewarm import apart, recover

    def work(child: Child) -> str:
        return _attempt(invocation, bundle_spec, wanted, settings, binary, directory, child)

    try:
        return apart.run(work, settings.deadline + UNDOING, lambda: recover.take_back(directory, binary))
    except apart.Died as error:
        return str(RestoreError("restore container", invocation.container_id, error.cause, error.next_step))


def _attempt(
    invocation: Invocation,
    bundle_spec: spec.Spec,
    wanted: Request,
    settings: Settings,
    binary: str,
    directory: str,
    child: Child,
) -> str:
    """The same in the process that may hang."""
    from rewarm import sweep

    sys.setswitchinterval(_SWITCH)
    try:
        for line in sweep.left_overs(settings.state_dir, binary, in_passing=True):
            log.write(invocation, "warning", f"rewarm: a left-over restore could not be undone: {line}")
        child.begin()
        from rewarm.gpu import container

        container.begin(bundle_spec, binary, settings.libcuda)
        from rewarm import warm  # a node whose settings are broken never gets here

        warm.attempt(invocation, bundle_spec, wanted, settings, binary, directory, child.life)
    except NotUndone:
        raise
    except (RewarmError, OSError) as error:
        return str(error)
    except Exception as error:
        # A mistake in rewarm, or a snapshot that found one: no reason to leave the container without a cold start.
        return f"restore container {invocation.container_id}: internal error {error!r}; report it"
    return ""


def _cold(
    invocation: Invocation,
    bundle_spec: spec.Spec,
    wanted: Request,
    binary: str,
    directory: str,
    kept: Record,
    reason: str,
) -> int:
    """Start the program from nothing, in a container that can be captured."""
    from rewarm import cold

    log.write(invocation, "warning", f"rewarm: cold start of {invocation.container_id}: {reason}")
    try:
        cold.prepare(invocation, bundle_spec, wanted, directory, kept, reason)
    except FileExistsError:
        return _taken(invocation)
    except OSError as error:
        log.write(invocation, "warning", f"rewarm: {invocation.container_id} cannot be captured: {error}")
        for line in _forget(directory):
            # Whoever finds a record of a restore there would undo it: this container.
            log.write(invocation, "error", f"rewarm: {line}")
            return 1
    runc.replace_process(binary, invocation.words)
    return 127


def delete(invocation: Invocation, settings: Settings, binary: str) -> int:
    """runc's delete with its own words and status; then what rewarm keeps about the container goes too."""
    import subprocess

    from rewarm import recover

    directory = record.directory(settings.state_dir, invocation.root, invocation.container_id)
    kept = _load(directory)
    if kept is not None and kept.phase == record.RESTORING and kept.owner_lives():
        if not invocation.is_set("force", "f"):
            log.write(invocation, "error", f"cannot delete container {kept.id} that is not stopped: being restored")
            return 1
        processes.kill_all({kept.owner_pid})  # its guard does the rest
    if kept is not None and kept.phase in (record.RESTORING, record.RESTORED):
        recover.settle(directory, binary)
        mounts.unmount_below(os.path.join(invocation.root, invocation.container_id))
    status = subprocess.run([binary, *invocation.words], check=False).returncode
    if not runc.exists(invocation.root, invocation.container_id):
        recover.forget(directory)
    return status


def _forget(directory: str) -> list[str]:
    """Remove a container directory; what stands against it, if anything does."""
    from rewarm import recover

    try:
        recover.forget(directory)
    except (RewarmError, OSError) as error:
        return [f"remove {directory}: {error}"]
    return []


def _load(directory: str) -> Record | None:
    """The record, or None where there is none or none that can be understood: runc decides then."""
    try:
        return record.load(directory)
    except OciError:
        return None


def _settings() -> tuple[Settings, SettingsError | None]:
    try:
        return configuration.load(), None
    except SettingsError as error:
        return configuration.without_mistakes(), error


def entry() -> NoReturn:
    """The process that the launcher has become, from its words to its exit status."""
    status = _status()
    sys.stdout.flush()
    sys.stderr.flush()
    # At once: what a restore had to say is said, and taking the interpreter down costs milliseconds.
    os._exit(status)


def _status() -> int:
    # A signal that ends rewarm in the middle leaves the undoing to the guard; SIGTERM gives the time to wait for it.
    signal.signal(signal.SIGTERM, _terminated)
    words = sys.argv[1:]
    try:
        return main(words)
    except KeyboardInterrupt:
        log.write(argv.parse(words), "error", "rewarm: ended by a signal, what was begun is undone")
        return _TERMINATED
    except (RequestError, NotUndone) as error:
        log.write(argv.parse(words), "error", f"rewarm: {error}")
        return 1
    except (RewarmError, OSError) as error:
        return _last_resort(words, error)


def _last_resort(words: list[str], error: Exception) -> int:
    """Something outside the restore failed: say so, and let runc have the call unless that would be wrong."""
    try:
        invocation = argv.parse(words)
        binary = runc.find(_settings()[0])
    except RewarmError as second:
        # No command line that runc would take, or no runc.
        sys.stderr.write(f"rewarm: {second}\n")
        return 1
    if invocation.command == "start":
        log.write(invocation, "error", f"rewarm: {error}")
        return 1
    log.write(invocation, "warning", f"rewarm: {error}")
    if invocation.command == "create" and not _nothing_begun(invocation, binary):
        return 1
    runc.replace_process(binary, words)
    return 127


def _nothing_begun(invocation: Invocation, binary: str) -> bool:
    """Whether no record of this process's own says that its container is half restored: others would undo, and so kill,
    what runc makes of it now."""
    from rewarm import recover

    directory = record.directory(_settings()[0].state_dir, invocation.root, invocation.container_id)
    kept = _load(directory)
    if kept is None or kept.owner_pid != os.getpid() or kept.phase not in (record.RESTORING, record.RESTORED):
        return True
    try:
        recover.take_back(directory, binary)
    except NotUndone as error:
        log.write(invocation, "error", f"rewarm: {error}")
        return False
    return True


def _terminated(number: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    entry()  # a launcher from before an upgrade calls `python -m rewarm.runtime`
