"""The story of a restore, top to bottom.

Nothing of the container runs before the end: CRIU leaves the tree stopped, and it stays so until every
byte of its memory has been verified. Whatever fails on the way is undone by the record (recover.py).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rewarm import aside, carved, causes, deadline, devshm, hook, ipc, layers, losses, node, preload, processes, recover
from rewarm.additions import restored as with_additions
from rewarm.criu import images, options, vet
from rewarm.criu.connections import kept as connections_kept
from rewarm.errors import RestoreError, SnapshotDamaged
from rewarm.guard import Guard
from rewarm.limits import limit
from rewarm.memory.places import PLACES
from rewarm.notify import notify
from rewarm.oci import cgroups, mounts, record, runc, spec
from rewarm.oci import log as oci_log
from rewarm.oci.argv import Invocation
from rewarm.oci.record import Record, Undo
from rewarm.oci.spec import Spec
from rewarm.replica import rename, tell
from rewarm.resume import write_down
from rewarm.settings import Settings
from rewarm.store.chunks import CHUNKS
from rewarm.store.directory import DirectoryStore, SnapshotRef
from rewarm.store.manifest import Manifest
from rewarm.store.materialise import materialise
from rewarm.trace import Trace
from rewarm.volumes import lay_out, make_blank

if TYPE_CHECKING:
    from rewarm.devices import Devices

SNAPSHOT = "snapshot"
"""What the snapshot's files lie in, below the container directory: none of their names is one of rewarm's own there."""
CHECKPOINT = "checkpoint"
ROOTFS_DIFF = "rootfs-diff.tar"
LIBRARY, PIECES = "device/library.so", "device/pieces"
_FILES = (ROOTFS_DIFF, devshm.FILE, CHUNKS, PLACES, LIBRARY, PIECES)
# What runc's own restore flags cannot say for this call; a cold start can.
_UNSUPPORTED_FLAGS = ("preserve-fds", "pidfd-socket")
_HOOK_TIMEOUT, _STOP_TIMEOUT = 60, 10.0


class Plan(NamedTuple):
    """Everything a restore works with. `directory` is the container directory, with a record in phase RESTORING;
    `life` is a pipe that hangs up when nobody waits for the restore any more (apart.py)."""

    invocation: Invocation
    spec: Spec
    life: int
    settings: Settings
    binary: str
    directory: str
    store: DirectoryStore
    ref: SnapshotRef
    manifest: Manifest
    trace: Trace


def restore(plan: Plan) -> None:
    """Make the container out of the snapshot.

    Raises what went wrong, a RewarmError or OSError as a rule, after everything was undone; NotUndone
    if that could not be done. A signal handler may raise in here too: it is undone like every failure.
    """
    kept = _record(plan)
    low_level = runc.Runc(plan.binary, plan.invocation.root, plan.invocation.systemd_cgroup)
    guard = Guard(plan.life)
    stop, over = threading.Event(), threading.Event()
    memory: carved.CarvedMemory | None = None
    try:
        _check_call(plan)
        _guard(plan, low_level, guard)
        devices = _devices(plan)
        with plan.trace.phase("restore.tables"):
            memory = aside.run(lambda: _begin_memory(plan, stop, devices))
        with plan.trace.phase("restore.materialise"):
            aside.run(lambda: _materialise(plan, over))
        with plan.trace.phase("restore.vet"):
            _vet(plan, memory)
        with plan.trace.phase("restore.prepare"):
            kept, changed = _prepare(plan, kept, devices)
        with plan.trace.phase("restore.runc"):
            _change(plan, kept, changed, over)
            guard.go()
            if memory is not None:
                memory.hurry()
                memory.check(Path(_file(plan, CHECKPOINT)))
            _wait(plan, guard)
            if memory is not None:
                memory.raise_failure()
        container = runc.load(plan.invocation.root, plan.invocation.container_id)
        with plan.trace.phase("restore.stop"):
            _wait_stopped(container)
            # Before the fill: memory is charged to the cgroup in which its process is then.
            _take_cgroup(plan, container)
            ipc.check_attached(Path(_file(plan, CHECKPOINT)), plan.spec, container.pid)
        with plan.trace.phase("restore.losses"):
            # Before the fill as well: pages go to the NUMA node that the policy names then.
            notes = losses.put_right(plan.manifest.processes, container.pid)
            notes += limit(plan.spec, container.pid)
        if devices is not None:
            with plan.trace.phase("restore.devices"):
                plan.trace.note("device_nodes", "; ".join(devices.put_right(container.pid, kept.rootfs))[:4000])
        with plan.trace.phase("restore.fill"):
            if memory is not None:
                memory.release(container.pid)
                memory.join()
                memory.report(plan.trace)
            _wait_stopped(container)
        if devices is not None and plan.manifest.cuda.processes:
            with plan.trace.phase("restore.cuda"):
                # The driver works in the processes: from here on the container runs.
                load = None if memory is None else memory.device()
                stopped = losses.stopped_pids(plan.manifest.processes)
                aside.run(lambda: devices.resume(container.pid, stopped, load, plan.trace))
                _check_init(container)
        with plan.trace.phase("restore.notify"):
            notes += notify(record.control(plan.directory), container, plan.manifest.signals, plan.spec)
        deadline.disarm()
        with plan.trace.phase("restore.commit"), _unsignalled():
            _commit(plan, kept, container)
            _report(plan, notes, devices)
            guard.commit()
    except BaseException:
        with _left_alone():
            stop.set()
            over.set()
            aside.settle()
            undone = guard.recover()
            if memory is not None:
                memory.abandon()
            if not undone:
                # What is on disk: `_prepare` may have been interrupted between writing it and returning it.
                recover.undo(plan.directory, record.load(plan.directory) or kept, low_level)
                recover.forget(plan.directory)
        raise


@contextmanager
def _unsignalled() -> Iterator[None]:
    """From here on SIGTERM comes too late: `create` answers what it has done. One that was before raises here."""
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    except BaseException:
        signal.signal(signal.SIGTERM, before)
        raise


@contextmanager
def _left_alone() -> Iterator[None]:
    """Neither the deadline nor SIGTERM comes in between: the one is over, the other waits until the end."""
    late: list[int] = []
    before: Any = signal.SIG_DFL
    while True:
        try:
            deadline.disarm()
            before = signal.signal(signal.SIGTERM, lambda number, frame: late.append(number))
            break
        except (deadline.Passed, KeyboardInterrupt):
            continue  # it came just before
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
    if late:
        raise KeyboardInterrupt


def _record(plan: Plan) -> Record:
    """The record that `create` wrote, with what is to be known before anything is done."""
    directories = cgroups.expected(plan.spec, plan.invocation.container_id, plan.invocation.systemd_cgroup)
    kept = record.load(plan.directory)
    assert kept is not None  # `create` made it
    kept = kept._replace(
        snapshot=f"{plan.ref.namespace}/{plan.ref.name}/{plan.ref.id}",
        cgroups=tuple(path for path in directories if not os.path.lexists(path)),
    )
    record.save(plan.directory, kept)
    return kept


def _check_call(plan: Plan) -> None:
    for flag in _UNSUPPORTED_FLAGS:
        if plan.invocation.flags.get(flag, "0") not in ("0", ""):
            raise RestoreError("restore container", plan.invocation.container_id, f"runc restore has no --{flag}")


def _devices(plan: Plan) -> Devices | None:
    """The container's GPUs, if it has any, with room for the snapshot's device memory."""
    if not plan.manifest.requires.gpus:
        return None
    with plan.trace.phase("restore.room"):
        from rewarm.devices import Devices  # only containers with GPUs load anything of the driver's

        devices = Devices(plan.spec, plan.manifest, plan.settings, plan.binary, plan.directory)
        aside.run(devices.check_room)
    return devices


def _begin_memory(plan: Plan, stop: threading.Event, devices: Devices | None) -> carved.CarvedMemory | None:
    """Read what is carved, and begin to fetch what does not hold up this thread: the rest waits for CRIU's start, and
    only the writing for its end."""
    gpus = [] if devices is None else devices.targets()
    memory = carved.load(plan.store, plan.ref, plan.manifest, plan.settings, plan.trace, stop, gpus)
    if memory is not None:
        memory.start()
    return memory


def _materialise(plan: Plan, over: threading.Event) -> None:
    for entry in plan.manifest.files:
        parent, _, _ = entry.name.rpartition("/")
        if entry.name not in _FILES and parent != CHECKPOINT:
            cause = f"it has a file {entry.name[:80]!r}, which no capture makes"
            raise SnapshotDamaged("read snapshot", str(plan.ref), cause, "remove it with `rewarm rm`")
    directory = Path(plan.directory, SNAPSHOT)
    directory.mkdir(mode=0o700)
    materialise(plan.store, plan.manifest, directory, without=(CHUNKS, PLACES, PIECES), stop=over)
    if _has(plan, LIBRARY):
        preload.bring_back(_file(plan, LIBRARY), plan.directory)


def _vet(plan: Plan, memory: carved.CarvedMemory | None) -> None:
    checkpoint = Path(_file(plan, CHECKPOINT))
    try:
        vet.vet(checkpoint, plan.spec, mounts.destinations(plan.invocation.bundle, plan.spec))
        rename(checkpoint, plan.spec, plan.manifest.addresses)
    except images.ImageError as error:
        raise SnapshotDamaged("read images of snapshot", plan.ref.name, str(error), "capture it again") from error
    if memory is not None:
        memory.allow_huge_pages(checkpoint, spec.memory_limit(plan.spec))


def _prepare(plan: Plan, kept: Record, devices: Devices | None) -> tuple[Record, Spec]:
    """Write down what is about to change, and all that runc and CRIU read but `config.json`, which is returned."""
    directory = plan.directory
    os.mkdir(os.path.join(directory, "work"), 0o700)
    place = cgroups.unified(plan.spec, plan.invocation.container_id, plan.invocation.systemd_cgroup)
    checkpoint = Path(_file(plan, CHECKPOINT))
    options.write(os.path.join(directory, "criu.conf"), options.restore(place, connections_kept(checkpoint)))
    backup = os.path.join(directory, "config.json.orig")
    with open(os.path.join(plan.invocation.bundle, "config.json"), "rb") as file:
        spec.write_atomically(backup, file.read(), os.fstat(file.fileno()).st_mode & 0o7777)
    rootfs = os.path.realpath(spec.rootfs(plan.invocation.bundle, plan.spec))
    aside.run(lambda: layers.check_own(rootfs, _file(plan, ROOTFS_DIFF) if _has(plan, ROOTFS_DIFF) else None))
    changes = [Undo(rootfs, os.path.join(directory, "rootfs.undo"), os.path.ismount(rootfs))]
    if _has(plan, devshm.FILE):
        changes.append(devshm.change(plan.spec, plan.ref.name, directory))
    changes += aside.run(lambda: lay_out(plan.manifest.blank, checkpoint, directory, rootfs, plan.spec))
    tell(record.bound_control(directory, plan.spec), plan.invocation.container_id, _name(plan), plan.spec)
    changed = prepared = _prepared(plan)
    hooks = []
    if _has(plan, ROOTFS_DIFF):
        layer = _file(plan, ROOTFS_DIFF)
        hooks.append(["rootfs-diff", "apply", "--layer", layer, "--root", rootfs, "--undo", changes[0].layer])
    if devices is not None:
        hooks.append(devices.hook())
    if hooks:
        changed = spec.with_hook(prepared, hook.words(*hooks), _HOOK_TIMEOUT)
    kept = kept._replace(
        config_backup=backup,
        config_written=tuple(spec.digest_of(spec.encode(one)) for one in (changed, prepared)),
        undo=tuple(changes),
        rootfs=rootfs,
        mounts=tuple(mounts.below(rootfs)),
        ipc=ipc.planned(Path(_file(plan, CHECKPOINT)), plan.spec),
        places=tuple(mounts.new_places(rootfs, [destination for destination, _ in spec.mounts(prepared)])),
    )
    record.save(directory, kept)
    return kept, changed


def _change(plan: Plan, kept: Record, changed: Spec, over: threading.Event) -> None:
    """Change what is not rewarm's own. The record knows how it was, and the guard is there to put it back."""
    if _has(plan, devshm.FILE):
        devshm.apply(_file(plan, devshm.FILE), _file(plan, CHECKPOINT), kept.undo[1], plan.spec)
    aside.run(lambda: make_blank(kept.undo, Path(_file(plan, CHECKPOINT)), over))
    spec.save(plan.invocation.bundle, changed)
    ipc.clear(kept.ipc, plan.spec)


def _prepared(plan: Plan) -> Spec:
    """The live spec with rewarm's own additions; mounts of its own only where the snapshot's tree has them."""
    there = {mount.destination for mount in plan.manifest.requires.mounts}
    return with_additions(plan.spec, there, plan.directory)


def _name(plan: Plan) -> str:
    return f"{plan.ref.namespace}/{plan.ref.name}/{plan.ref.id[:12]}"


def _has(plan: Plan, name: str) -> bool:
    return plan.manifest.file(name) is not None


def _file(plan: Plan, name: str) -> str:
    return os.path.join(plan.directory, SNAPSHOT, name)


def _guard(plan: Plan, low_level: runc.Runc, guard: Guard) -> None:
    """Start the guard: before the store is opened, since who inherits files of a share may hang when it closes them."""
    directory, invocation = plan.directory, plan.invocation
    words = ["restore", "--detach", "--no-subreaper", "--file-locks", "--ext-unix-sk", "--tcp-established"]
    words += ["--bundle", invocation.bundle, "--image-path", _file(plan, CHECKPOINT)]
    words += ["--work-path", os.path.join(directory, "work")]
    if invocation.pid_file:
        words += ["--pid-file", invocation.pid_file]
    if invocation.flags.get("console-socket"):
        words += ["--console-socket", invocation.flags["console-socket"]]
    if invocation.is_set("no-pivot"):
        words.append("--no-pivot")
    env = options.environment(os.path.join(directory, "criu.conf"), node.criu_binary(plan.settings))
    recovery = [sys.executable, "-I", "-m", "rewarm.recover", directory]
    command = low_level.words(*words, invocation.container_id, log=os.path.join(directory, "runc.json"))
    guard.start(command, recovery, env)


def _wait(plan: Plan, guard: Guard) -> None:
    try:
        ended = guard.wait()
    except BaseException:
        causes.keep(plan.directory, plan.settings.state_dir)
        raise
    if ended != "exit 0":
        cause = causes.cause(plan.directory, ended)
        next_step = causes.keep(plan.directory, plan.settings.state_dir)
        raise RestoreError("restore container", plan.invocation.container_id, cause, next_step)


def _wait_stopped(container: runc.Container) -> None:
    """CRIU has sent SIGSTOP before it let go of the processes: none runs its program, but some are still on the way."""
    end = time.monotonic() + _STOP_TIMEOUT
    while found := processes.running(container.pid):
        if time.monotonic() > end:
            raise RestoreError("restore container", container.id, f"{found}, not stopped", "look at CRIU's log")
        time.sleep(0.001)
    _check_init(container)


def _check_init(container: runc.Container) -> None:
    if processes.start_time(container.pid) != container.start_time:
        raise RestoreError("restore container", container.id, "its init has ended", "look at CRIU's log")


def _take_cgroup(plan: Plan, container: runc.Container) -> None:
    # The kernel lists no zombie in a cgroup's processes.
    alive = [pid for pid in processes.tree(container.pid) if processes.start_time(pid) is not None]
    cgroups.take(cgroups.expected(plan.spec, container.id, plan.invocation.systemd_cgroup), alive)


def _commit(plan: Plan, kept: Record, container: runc.Container) -> None:
    """From here on the container is what `create` was asked for: created, not started, its init stopped.

    The record keeps what there is to undo: a rewarm that is killed before the guard has been told leaves that to it.
    """
    # runc takes a container with this file for `created`: state, delete and exec then do what they do for any other.
    os.mkfifo(container.exec_fifo, 0o622)
    spec.save(plan.invocation.bundle, _prepared(plan))
    done = kept._replace(
        phase=record.RESTORED,
        init_pid=container.pid,
        init_start=container.start_time,
        stopped=tuple(sorted(losses.stopped_pids(plan.manifest.processes))),
    )
    if not (plan.spec.get("hooks") or {}).get("poststart"):
        write_down(plan.directory, done)
    record.save(plan.directory, done)


def _report(plan: Plan, notes: list[str], devices: Devices | None) -> None:
    """Say how it went, while there still is somebody who undoes it if rewarm is killed in between."""
    name = _name(plan)
    plan.trace.note("container", plan.invocation.container_id)
    plan.trace.note("snapshot", name)
    plan.trace.write(os.path.join(plan.directory, "trace.json"))
    outcome: dict[str, Any] = {"outcome": "warm", "snapshot": name, "seconds": plan.trace.seconds(), "notes": notes}
    if devices is not None:
        outcome["devices"] = devices.map
    spec.write_atomically(os.path.join(plan.directory, "outcome.json"), json.dumps(outcome).encode(), 0o644)
    for line in notes:
        oci_log.write(plan.invocation, "warning", f"rewarm: {line}")
    if plan.invocation.log:
        oci_log.write(plan.invocation, "info", f"rewarm: {plan.invocation.container_id} restored from {name}")
