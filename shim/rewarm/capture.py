"""The story of a capture, top to bottom.

The source is never killed before its snapshot is published: CRIU leaves it running (runc's
`--leave-running`), frozen by its cgroup for as long as memory and files are copied, so that both are of
one moment. `stop` kills it afterwards.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import rewarm
from rewarm import (
    addresses,
    aside,
    compat,
    devshm,
    image,
    ipc,
    layers,
    losses,
    memberships,
    netlock,
    node,
    overlay,
    processes,
    registered,
    source,
    volumes,
)
from rewarm.alone import alone
from rewarm.criu import connections, images, remaps
from rewarm.criu.carve import carve
from rewarm.devshm import SHM
from rewarm.dump import dump
from rewarm.errors import CaptureError, GpuError
from rewarm.frozen import Frozen
from rewarm.gpu import hold
from rewarm.gpu.container import ContainerGpus
from rewarm.gpu.hold import Hold, Users
from rewarm.lifeline import Held, Lifeline
from rewarm.memory import places
from rewarm.oci import record, runc, spec
from rewarm.oci.runc import Container, Runc
from rewarm.quiet import Quiet
from rewarm.restore import CHECKPOINT, ROOTFS_DIFF
from rewarm.saved import SavedMemory, add_library
from rewarm.scratch import Scratch
from rewarm.settings import Settings
from rewarm.store.directory import DirectoryStore, SnapshotRef
from rewarm.store.manifest import MAX_ADDRESSES, Cuda, HugeMapping, Manifest, Memory, timestamp
from rewarm.store.names import check_name, check_namespace
from rewarm.store.writer import SnapshotWriter
from rewarm.trace import Trace
from rewarm_hooks.layer import LayerError

WAITING = "waiting for the helper of the capture before"
GPU_MEMORY, DUMP = "moving GPU memory", "dumping memory"
"""Steps that a signal must not end in the middle."""
_KILL_TIMEOUT = 10.0


@dataclass(frozen=True)
class Captured:
    """What a capture made: `paused` is how long the source was held still, in seconds.

    `stored` are the bytes of its packs, `added` those that the store did not have before.
    """

    ref: SnapshotRef
    manifest: Manifest
    paused: float
    total: float
    stored: int
    added: int
    notes: tuple[str, ...]


def capture(
    container: Container,
    namespace: str,
    name: str,
    settings: Settings,
    *,
    stop: bool = False,
    systemd_cgroup: bool = False,
    step: Callable[[str], None] = lambda text: None,
) -> Captured:
    """Make one snapshot of a running container and publish it.

    `step` is told what is being done, for a progress display. Raises CaptureError, StoreError or OciError;
    the source runs on then, and the store is as it was.
    """
    began = time.monotonic()
    check_name(name)
    check_namespace(namespace)
    low_level = Runc(runc.find(settings), container.root, systemd_cgroup)
    criu = node.criu_binary(settings)
    source.check_status(container, low_level, held=True)
    _check_criu(criu, settings)
    source.check_mounts(container)
    source.check_pid_namespaces(container)
    source.check_orphans(container)
    bundle_spec = spec.load(container.bundle)
    ipc.check(container, bundle_spec)
    read_only = bool((bundle_spec.get("root") or {}).get("readonly"))
    upper = overlay.upper_directory(container.pid, container.rootfs, read_only)
    source.check_streams(container)
    image_id = image.identity(bundle_spec, settings.state_dir, container.pid, "/")
    source.check_users(container, bundle_spec)
    store = DirectoryStore(settings.store)
    trace = Trace()
    notes: list[str] = []
    with ExitStack() as stack:
        lock = stack.enter_context(alone(container, settings.state_dir, lambda: step(WAITING)))
        source.check_status(container, low_level)
        gpus, users = _look_at_gpus(container, bundle_spec, low_level.binary, settings)
        threads = node.threads(settings)
        writer = stack.enter_context(store.writer(namespace, name, compression=settings.compression, threads=threads))
        scratch = stack.enter_context(Scratch(settings.work_dir))
        lifeline = stack.enter_context(Lifeline(_held(container, low_level, scratch, settings, users), lock))
        frozen = Frozen(low_level, container, lifeline)
        saved = stack.enter_context(SavedMemory(gpus, users, writer, settings, threads))
        quiet = stack.enter_context(Quiet(container, bundle_spec, settings, lifeline))
        if users is not None:
            step(GPU_MEMORY)
            lifeline.holding()
        with trace.phase("capture.cuda"):
            guard = _gpu_guard(lifeline, frozen)
            held = Hold(gpus, users, settings.gpu_lock_timeout, settings.capture_timeout, guard)
            device_memory = stack.enter_context(held)
            stack.callback(saved.close)  # before memory is given back: a copy may have the room for it
            saved.start(device_memory)
        step(DUMP)
        stack.enter_context(frozen)
        source.check_orphans(container)
        with trace.phase("capture.criu"):
            device_memory.check(processes.in_cgroups(container.cgroup_paths))
            dump(container, low_level, criu, scratch, settings, lifeline)
            lifeline.dumped(settings.capture_timeout)
            memory = sum(path.stat().st_size for path in (scratch.snapshot / CHECKPOINT).glob("pages-*.img"))
        step("recording files")
        with trace.phase("capture.files"):
            pids = processes.tree(container.pid)
            here = _addresses(container.pid)  # while nothing can end, or change them
            recorded = losses.record(pids, frozenset(frozen.stopped))
            directory = record.find_directory(settings.state_dir, container.root, container.id)
            signals, said = registered.signals(record.control(directory), pids)
            notes += said
            ipc.carry(container, scratch.snapshot / CHECKPOINT, bundle_spec)
            _write_layers(container, scratch.snapshot, bundle_spec, upper, pids)
            notes += _keep_connections(container, scratch.snapshot / CHECKPOINT, pids)
            root = spec.rootfs(container.bundle, bundle_spec)
            blank, said = volumes.look(scratch.snapshot / CHECKPOINT, root, bundle_spec)
            notes += said
            notes += memberships.notes(container.pid, scratch.snapshot / CHECKPOINT)
        with trace.phase("capture.device"):
            numbers = tuple(map(processes.namespace_pid, device_memory.pids))
            saved.settle()
            if stop:
                frozen.check()
        if not stop:
            frozen.resume()
            device_memory.resume()
            saved.release()
            quiet.resume()
        notes += _remove_network_lock(container)
        step("storing memory")
        with trace.phase("capture.saved"):
            cuda = Cuda(numbers, device_memory.used, *saved.finish())
            notes += saved.notes
        with trace.phase("capture.carve"):
            carved = _carve(container, scratch.snapshot / CHECKPOINT, writer, threads)
        step("writing the snapshot")
        with trace.phase("capture.store"):
            for path in sorted(p for p in scratch.snapshot.rglob("*") if p.is_file()):
                writer.add_file(path.relative_to(scratch.snapshot).as_posix(), path)
            add_library(bundle_spec, writer)
        manifest = Manifest(
            name=name,
            namespace=namespace,
            created=timestamp(),
            rewarm=rewarm.__version__,
            source={"container": container.id, "runtime_root": container.root, "node": os.uname().nodename},
            requires=compat.describe(
                bundle_spec,
                node.version_of(low_level.binary, settings),
                node.version_of(criu, settings),
                settings,
                gpus,
            )._replace(engine=quiet.engine, image_id=image_id),
            processes=recorded,
            memory_bytes=memory,
            memory=carved,
            cuda=cuda,
            signals=signals,
            addresses=here,
            blank=blank,
        )
        with trace.phase("capture.publish"):
            ref, published = writer.publish(manifest)
        if stop:
            step("stopping the container")
            _stop(container, low_level, frozen)
            device_memory.forget()
    total = time.monotonic() - began
    paused = max(frozen.seconds, device_memory.seconds)
    notes += quiet.notes
    return Captured(ref, published, paused, total, published.stored_bytes, writer.new_bytes, tuple(notes))


def _gpu_guard(lifeline: Lifeline, frozen: Frozen) -> hold.Guard:
    return hold.Guard(
        locked=lifeline.locked,
        taking=lifeline.taking,
        piece=lifeline.piece,
        taken=lifeline.taken,
        released=lifeline.released,
        frozen=lambda: frozen.frozen,
    )


def _look_at_gpus(
    container: Container, bundle_spec: spec.Spec, binary: str, settings: Settings
) -> tuple[ContainerGpus, Users | None]:
    """The container's GPUs, and its processes that use them; refuses what the driver cannot checkpoint."""
    tree = processes.tree(container.pid)
    pids = {*tree, *processes.in_cgroups(container.cgroup_paths)}

    def look() -> tuple[ContainerGpus, Users | None]:
        gpus, users = hold.look(bundle_spec, tree, pids, binary, settings.libcuda)
        if gpus.devices:
            source.check_view(container)
        if users is not None:
            source.check_memory(container, users)
        return gpus, users

    try:
        return aside.run(look, settings.capture_timeout)
    except TimeoutError as error:
        text = "look for Xid lines in `dmesg`"
        raise GpuError("ask the NVIDIA driver about", container.id, str(error), text) from None


def _held(container: Container, low_level: Runc, scratch: Scratch, settings: Settings, users: Users | None) -> Held:
    cuda = () if users is None else tuple((one.pid, one.start_time, one.command) for one in users.contexts)
    return Held(
        low_level.binary,
        container.root,
        container.id,
        container.pid,
        container.start_time,
        os.getpid(),
        str(scratch.path),
        settings.libcuda,
        cuda,
        settings.gpu_lock_timeout,
    )


def _check_criu(criu: str, settings: Settings) -> None:
    version = node.version_of(criu, settings) if criu else ""
    if node.version_tuple(version) < node.criu_needed():
        needed = ".".join(map(str, node.criu_needed()))
        raise CaptureError(
            "find CRIU",
            criu or "criu",
            f"this kernel needs {needed} or newer, found {version or 'none'}",
            "run `rewarm doctor`",
        )


def _carve(container: Container, images_directory: Path, writer: SnapshotWriter, threads: int) -> Memory:
    """Take the memory out of CRIU's images and into the store; the source runs again already."""
    try:
        found = carve(images_directory, writer.add_chunk, threads, writer.expect)
    except images.ImageError as error:
        raise CaptureError("read images of container", container.id, str(error), "capture it again") from error
    if found.places:
        writer.add_bytes(places.PLACES, places.encode(found.places))
    huge = tuple(HugeMapping(pid, vma.start, vma.end, extra) for pid, vma, extra in found.huge)
    return Memory(filled=found.filled, zeros=found.zeros, left=found.left, huge=huge)


def _addresses(pid: int) -> tuple[str, ...]:
    try:
        return tuple(addresses.addresses(pid)[:MAX_ADDRESSES])
    except OSError:
        return ()  # a restore that needs to know them says so


def _keep_connections(container: Container, checkpoint: Path, pids: list[int]) -> list[str]:
    try:
        return connections.keep(checkpoint, pids)
    except (images.ImageError, OSError) as error:
        raise CaptureError("record connections of", container.id, str(error), "capture it again") from error


def _remove_network_lock(container: Container) -> list[str]:
    """What another dump, killed or final, left in the network namespace; rewarm's own makes no rules."""
    try:
        found = netlock.remove(container.pid)
    except CaptureError as error:
        return [str(error)]
    return ["removed the network lock that an earlier dump left in the container's network"] if found else []


def _write_layers(
    container: Container, snapshot: Path, bundle_spec: spec.Spec, upper: Path | None, pids: list[int]
) -> None:
    """The changes of the rootfs and the content of a bind-mounted /dev/shm, with the links that CRIU expects there."""
    links = remaps.find(snapshot / CHECKPOINT, pids)
    shm = devshm.own(bundle_spec)
    in_shm = [link for link in links if link.name.startswith(SHM[1:] + "/")]
    covered = [destination.lstrip("/") + "/" for destination, _ in spec.mounts(bundle_spec)]
    in_rootfs = [link for link in links if not any(link.name.startswith(c) for c in covered)]
    _check_volumes(
        container, [link.name for link in links if link not in in_rootfs and link not in in_shm], bundle_spec
    )
    try:
        if upper is not None:
            in_rootfs = remaps.by_name_in_upper(in_rootfs, upper, pids[0])
            layers.write(snapshot / ROOTFS_DIFF, upper, {link.name: link.source for link in in_rootfs})
        if shm:
            devshm.write(snapshot / devshm.FILE, snapshot / CHECKPOINT, shm, in_shm, pids)
    except LayerError as error:
        raise CaptureError("write changed files of", container.id, str(error)) from error


def _check_volumes(container: Container, names: list[str], bundle_spec: spec.Spec) -> None:
    """A deleted file with other names, on a volume: its link cannot be carried, and every restore would fail."""
    for name in names:
        inside = [(d, kind) for d, kind in spec.mounts(bundle_spec) if f"/{name}".startswith(d.rstrip("/") + "/")]
        if inside and max(inside)[1] == "bind":
            raise CaptureError(
                "capture container",
                container.id,
                f"it has a deleted file open on its volume {max(inside)[0]}, which is not a part of the snapshot",
                "close the file before the capture",
            )


def _stop(container: Container, low_level: Runc, frozen: Frozen) -> None:
    """Kill the frozen source: the signal first, so that it runs no instruction after the moment of the snapshot."""
    frozen.keep()
    low_level.run("kill", "--all", container.id, "KILL", timeout=30)
    frozen.resume(killed=True)
    end = time.monotonic() + _KILL_TIMEOUT
    while low_level.status(container.id) not in ("stopped", "") and time.monotonic() < end:
        time.sleep(0.02)
    if low_level.status(container.id) not in ("stopped", ""):
        raise CaptureError("stop container", container.id, f"it did not end within {_KILL_TIMEOUT:.0f} s of SIGKILL")
