"""The story of a restore, top to bottom.

Nothing of the container runs before the end: CRIU leaves the tree stopped, and it stays so until every
byte of its memory has been verified. Whatever fails on the way is undone by the record (recover.py).
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

from rewarm import layers, losses, node, processes, recover
from rewarm.criu import images, log, options, vet
from rewarm.errors import RestoreError, RewarmError, SnapshotDamaged
from rewarm.guard import Guard
from rewarm.oci import record, runc, spec
from rewarm.oci.argv import Invocation
from rewarm.oci.record import Record, Undo
from rewarm.oci.spec import CONTROL_DESTINATION, Spec
from rewarm.request import Request
from rewarm.settings import Settings
from rewarm.store.directory import DirectoryStore, SnapshotRef
from rewarm.store.manifest import Manifest
from rewarm.store.materialise import PendingVerification, materialise
from rewarm.trace import Trace

CHECKPOINT = "checkpoint"
ROOTFS_DIFF = "rootfs-diff.tar"
DEV_SHM = "devshm-checkpoint.tar"
SHM = "/dev/shm"
# What runc's own restore flags cannot say for this call; a cold start can.
_UNSUPPORTED_FLAGS = ("preserve-fds", "pidfd-socket")
_HOOK_TIMEOUT = 60
_VERIFIERS = 4


@dataclass(frozen=True)
class Plan:
    """Everything a restore works with. `directory` is the container directory; `deadline` is time.monotonic seconds."""

    invocation: Invocation
    spec: Spec
    request: Request
    settings: Settings
    binary: str
    directory: str
    store: DirectoryStore
    ref: SnapshotRef
    manifest: Manifest
    trace: Trace
    deadline: float


def restore(plan: Plan) -> list[str]:
    """Make the container out of the snapshot; returns notes on what this node could not give it.

    Raises RewarmError (or OSError, for a store or state directory that fails) after everything was undone.
    """
    kept = _record(plan)
    low_level = runc.Runc(plan.binary, plan.invocation.root, plan.invocation.systemd_cgroup)
    guard: Guard | None = None
    stop = threading.Event()
    verifier: _Verifier | None = None
    try:
        _check_call(plan)
        with plan.trace.phase("restore.materialise"):
            pending = materialise(plan.store, plan.manifest, Path(plan.directory))
        verifier = _Verifier(pending, stop, plan.trace)
        with plan.trace.phase("restore.vet"):
            _vet(plan)
        with plan.trace.phase("restore.prepare"):
            kept = _prepare(plan, kept)
        with plan.trace.phase("restore.runc"):
            guard = _start(plan, low_level)
            _wait(plan, guard)
        with plan.trace.phase("restore.verify.wait"):
            verifier.join(plan.deadline)
        container = runc.load(plan.invocation.root, plan.invocation.container_id)
        with plan.trace.phase("restore.losses"):
            notes = losses.put_right(plan.manifest.processes, container.pid)
        with plan.trace.phase("restore.commit"):
            _commit(plan, kept, container)
            guard.commit()
    except BaseException:
        stop.set()
        if guard is not None:
            guard.abort()
        if verifier is not None:
            verifier.abandon()
        recover.undo(kept, low_level)
        raise
    return [*notes, *_tidy(plan.directory)]


def _record(plan: Plan) -> Record:
    kept = Record(
        id=plan.invocation.container_id,
        root=plan.invocation.root,
        bundle=plan.invocation.bundle,
        phase=record.RESTORING,
        systemd_cgroup=plan.invocation.systemd_cgroup,
        pid_file=plan.invocation.pid_file,
        namespace=plan.request.namespace,
        snapshot=f"{plan.ref.namespace}/{plan.ref.name}/{plan.ref.id}",
    )
    kept.own()
    record.save(plan.directory, kept)
    return kept


def _check_call(plan: Plan) -> None:
    for flag in _UNSUPPORTED_FLAGS:
        if plan.invocation.flags.get(flag, "0") not in ("0", ""):
            raise RestoreError("restore container", plan.invocation.container_id, f"runc restore has no --{flag}")


def _vet(plan: Plan) -> None:
    destinations = {destination for destination, _ in spec.mounts(plan.spec)} | {CONTROL_DESTINATION}
    try:
        vet.vet(Path(plan.directory, CHECKPOINT), plan.spec, destinations)
    except images.ImageError as error:
        raise SnapshotDamaged("read images of snapshot", plan.ref.name, str(error), "capture it again") from error


def _prepare(plan: Plan, kept: Record) -> Record:
    """Write what runc and CRIU read, in an order in which the record always knows what to undo."""
    directory = plan.directory
    os.mkdir(os.path.join(directory, "work"), 0o700)
    options.write(os.path.join(directory, "criu.conf"), options.RESTORE)
    backup = os.path.join(directory, "config.json.orig")
    with open(os.path.join(plan.invocation.bundle, "config.json"), "rb") as file:
        spec.write_atomically(backup, file.read())
    rootfs = os.path.realpath(spec.rootfs(plan.invocation.bundle, plan.spec))
    shm = spec.bind_source(plan.spec, SHM)
    changes = [Undo(rootfs, os.path.join(directory, "rootfs.undo"))]
    if _has(plan, DEV_SHM):
        if not shm:
            raise RestoreError(
                "restore /dev/shm", plan.ref.name, "the snapshot carries one, this container has no such mount"
            )
        changes.append(Undo(os.path.realpath(shm), os.path.join(directory, "devshm.undo")))
    kept = replace(kept, config_backup=backup, undo=changes)
    record.save(directory, kept)
    if _has(plan, DEV_SHM):
        layers.apply(os.path.join(directory, DEV_SHM), changes[1].root, changes[1].layer)
    changed = _prepared(plan)
    if _has(plan, ROOTFS_DIFF):
        changed = spec.with_hook(changed, _hook(plan, changes[0]), _HOOK_TIMEOUT)
    spec.save(plan.invocation.bundle, changed)
    return kept


def _prepared(plan: Plan) -> Spec:
    """The live spec with rewarm's own additions; the control mount only where the snapshot's tree has it."""
    has_control = any(mount.destination == CONTROL_DESTINATION for mount in plan.manifest.requires.mounts)
    return spec.prepared(plan.spec, record.control(plan.directory) if has_control else None)


def _has(plan: Plan, name: str) -> bool:
    return plan.manifest.file(name) is not None


def _hook(plan: Plan, change: Undo) -> list[str]:
    layer = os.path.join(plan.directory, ROOTFS_DIFF)
    command = [sys.executable, "-I", "-m", "rewarm_hooks.rootfs_diff", "apply"]
    return [*command, "--layer", layer, "--root", change.root, "--undo", change.layer]


def _start(plan: Plan, low_level: runc.Runc) -> Guard:
    directory, invocation = plan.directory, plan.invocation
    words = ["restore", "--detach", "--no-subreaper", "--file-locks", "--ext-unix-sk"]
    words += ["--bundle", invocation.bundle, "--image-path", os.path.join(directory, CHECKPOINT)]
    words += ["--work-path", os.path.join(directory, "work")]
    if invocation.pid_file:
        words += ["--pid-file", invocation.pid_file]
    if invocation.flags.get("console-socket"):
        words += ["--console-socket", invocation.flags["console-socket"]]
    if invocation.flags.get("no-pivot") == "true":
        words.append("--no-pivot")
    env = options.environment(os.path.join(directory, "criu.conf"), node.criu_binary(plan.settings))
    recovery = [sys.executable, "-I", "-m", "rewarm.recover", directory]
    command = low_level.words(*words, invocation.container_id, log=os.path.join(directory, "runc.json"))
    return Guard(command, recovery, env)


def _wait(plan: Plan, guard: Guard) -> None:
    ended = guard.wait(plan.deadline)
    if ended == "exit 0":
        return
    work = os.path.join(plan.directory, "work", "restore.log")
    cause = _hook_cause(plan) or log.cause(work) or _runc_cause(plan) or ended
    raise RestoreError(
        "restore container", plan.invocation.container_id, cause, f"CRIU's log is kept as {_keep(plan, work)}"
    )


def _runc_cause(plan: Plan) -> str:
    try:
        with open(os.path.join(plan.directory, "runc.json"), encoding="utf-8", errors="replace") as file:
            lines = [json.loads(line) for line in file if line.startswith("{")]
    except (OSError, ValueError):
        return ""
    return next(
        (" ".join(str(line.get("msg", "")).split()) for line in reversed(lines) if line.get("level") == "error"), ""
    )


def _hook_cause(plan: Plan) -> str:
    """runc reports what a failed hook wrote to standard error; CRIU's log only says that a script failed."""
    cause = _runc_cause(plan)
    return cause[cause.index("rootfs-diff:") :] if "rootfs-diff:" in cause else ""


def _keep(plan: Plan, work: str) -> str:
    """The container directory is emptied for the cold start; the last failed restore's log stays beside it."""
    kept = os.path.join(plan.settings.state_dir, "last-failed-restore.log")
    if os.path.exists(work):
        os.replace(work, kept)
    return kept


def _commit(plan: Plan, kept: Record, container: runc.Container) -> None:
    """From here on the container is what `create` was asked for: created, not started, its init stopped."""
    state = processes.stat(container.pid)
    if state is None or state.state != "T":
        raise RestoreError(
            "restore container",
            container.id,
            f"its init is in state {state.state if state else 'gone'}, not stopped",
            "look at CRIU's log",
        )
    # runc takes a container with this file for `created`: state, delete and exec then do what they do for any other.
    os.mkfifo(container.exec_fifo, 0o622)
    spec.save(plan.invocation.bundle, _prepared(plan))
    stopped = sorted(losses.stopped_pids(plan.manifest.processes))
    done = replace(
        kept,
        phase=record.RESTORED,
        init_pid=container.pid,
        init_start=container.start_time,
        stopped=stopped,
        undo=[],
        config_backup="",
    )
    record.save(plan.directory, done)


def _tidy(directory: str) -> list[str]:
    """Remove what the restored tree has read: it would only take memory in /run. Too late to fail for it."""
    try:
        for name in os.listdir(directory):
            path = os.path.join(directory, name)
            if name in (CHECKPOINT, "work"):
                shutil.rmtree(path)
            elif name not in ("record.json", "control"):
                os.unlink(path)
    except OSError as error:
        return [f"{directory} was not tidied up: {error}"]
    return []


class _Verifier:
    """Verifies the large files in threads while CRIU reads them; `join` raises the first failure."""

    def __init__(self, pending: list[PendingVerification], stop: threading.Event, trace: Trace) -> None:
        self._all = pending
        self._pending = list(pending)
        self._stop = stop
        self._trace = trace
        self._lock = threading.Lock()
        self._failure: RewarmError | OSError | None = None
        count = min(len(self._pending), _VERIFIERS, os.cpu_count() or 1)
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def join(self, deadline: float) -> None:
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                raise RestoreError("verify snapshot", "the deadline", "it has passed", "see `deadline` in the settings")
        if self._failure is not None:
            raise self._failure
        if not all(one.verified for one in self._all):
            raise RestoreError("verify snapshot", "memory", "a verification ended early")

    def abandon(self) -> None:
        for thread in self._threads:
            thread.join(5.0)

    def _run(self) -> None:
        while not self._stop.is_set():
            with self._lock:
                if not self._pending:
                    return
                one = self._pending.pop()
            try:
                with self._trace.phase("restore.verify"):
                    one.verify(self._stop)
            except (RewarmError, OSError) as error:
                self._failure = error
                self._stop.set()
