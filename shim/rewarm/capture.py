"""The story of a capture, top to bottom.

The source is never killed before its snapshot is published: CRIU leaves it running (runc's
`--leave-running`), frozen by its cgroup for as long as memory and files are copied, so that both are of
one moment. `stop` kills it afterwards.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import rewarm
from rewarm import compat, losses, netlock, node, overlay, private, processes
from rewarm.criu import images, log, options, remaps
from rewarm.criu.carve import carve
from rewarm.errors import CaptureError, OciError
from rewarm.frozen import Frozen
from rewarm.memory import places
from rewarm.oci import runc, spec
from rewarm.oci.runc import Container, Runc
from rewarm.restore import CHECKPOINT, DEV_SHM, ROOTFS_DIFF, SHM
from rewarm.scratch import Scratch
from rewarm.settings import Settings
from rewarm.store.directory import DirectoryStore, SnapshotRef
from rewarm.store.manifest import HugeMapping, Manifest, Memory, timestamp
from rewarm.store.names import check_name, check_namespace
from rewarm.store.writer import SnapshotWriter
from rewarm.trace import Trace
from rewarm_hooks.layer import LayerError, write_layer

_KILL_TIMEOUT = 10.0
# compel's word in the log for the step at which a process begins to run CRIU's code.
_INFECTED = b"Putting parasite blob"


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
    _check_source(container, low_level)
    _check_criu(criu, settings)
    bundle_spec = spec.load(container.bundle)
    upper = overlay.upper_directory(container.pid, bool((bundle_spec.get("root") or {}).get("readonly")))
    _check_streams(container)
    store = DirectoryStore(settings.store)
    trace = Trace()
    notes: list[str] = []
    with ExitStack() as stack:
        threads = node.threads(settings)
        writer = stack.enter_context(store.writer(namespace, name, compression=settings.compression, threads=threads))
        scratch = stack.enter_context(Scratch(settings.work_dir))
        frozen = stack.enter_context(Frozen(low_level, container, scratch.path))
        step("dumping memory")
        with trace.phase("capture.criu"):
            _dump(container, low_level, criu, scratch, settings, frozen)
            memory = sum(path.stat().st_size for path in (scratch.snapshot / CHECKPOINT).glob("pages-*.img"))
        step("recording files")
        with trace.phase("capture.files"):
            pids = processes.tree(container.pid)
            recorded = losses.record(pids, frozen.stopped)
            _write_layers(container, scratch.snapshot, bundle_spec, upper, pids)
        if not stop:
            frozen.resume()
        notes += _remove_network_lock(container)
        step("storing memory")
        with trace.phase("capture.carve"):
            carved = _carve(container, scratch.snapshot / CHECKPOINT, writer, threads)
        step("writing the snapshot")
        with trace.phase("capture.store"):
            for path in sorted(p for p in scratch.snapshot.rglob("*") if p.is_file()):
                writer.add_file(path.relative_to(scratch.snapshot).as_posix(), path)
        manifest = Manifest(
            name=name,
            namespace=namespace,
            created=timestamp(),
            rewarm=rewarm.__version__,
            source={"container": container.id, "runtime_root": container.root, "node": os.uname().nodename},
            requires=compat.describe(
                bundle_spec, node.version_of(low_level.binary, settings), node.version_of(criu, settings), settings
            ),
            processes=recorded,
            memory_bytes=memory,
            memory=carved,
        )
        with trace.phase("capture.publish"):
            ref, published = writer.publish(manifest)
        if stop:
            step("stopping the container")
            _stop(container, low_level, frozen)
    total = time.monotonic() - began
    return Captured(ref, published, frozen.seconds, total, published.stored_bytes, writer.new_bytes, tuple(notes))


def _check_source(container: Container, low_level: Runc) -> None:
    status = low_level.status(container.id)
    if status == "created":
        raise CaptureError("capture container", container.id, "it is created but not started", "start it first")
    if status not in ("running", "paused"):
        raise CaptureError(
            "capture container",
            container.id,
            f"it is {status or 'gone'}, so it has no memory to capture",
            "capture it while it runs",
        )
    if status == "paused":
        raise CaptureError("capture container", container.id, "it is paused", "resume it first")
    for namespace in (spec.load(container.bundle).get("linux") or {}).get("namespaces") or []:
        if namespace.get("type") == "pid" and namespace.get("path"):
            raise CaptureError(
                "capture container",
                container.id,
                "it shares a pid namespace, in which its process ids may be taken at the restore",
                "give it a pid namespace of its own",
            )
    if container.labels.get("org.criu.config"):
        raise CaptureError(
            "capture container",
            container.id,
            "its annotation org.criu.config would override rewarm's options",
            "remove the annotation",
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


def _check_streams(container: Container) -> None:
    """Standard streams on a file or named FIFO of the node: CRIU knows no mount of the container for it."""
    for number, stream in enumerate(("stdin", "stdout", "stderr")):
        try:
            target = os.readlink(f"/proc/{container.pid}/fd/{number}")
            status = os.stat(f"/proc/{container.pid}/fd/{number}")
        except FileNotFoundError:
            continue  # the program closed it
        if not target.startswith("/") or target == "/dev/null":
            continue
        try:
            inside = os.stat(f"/proc/{container.pid}/root{target}", follow_symlinks=False)
        except OSError:
            inside = None
        if inside is None or (inside.st_dev, inside.st_ino) != (status.st_dev, status.st_ino):
            raise CaptureError(
                "capture container",
                container.id,
                f"its {stream} is {target}, a file outside of the container that CRIU cannot see",
                "start it with pipes, as containerd, Docker and Podman do",
            )


def _dump(
    container: Container, low_level: Runc, criu: str, scratch: Scratch, settings: Settings, frozen: Frozen
) -> None:
    directory = scratch.snapshot / CHECKPOINT
    directory.mkdir(mode=0o700)
    option_file = str(scratch.work / "criu.conf")
    options.write(option_file, options.DUMP)
    words = ["checkpoint", "--leave-running", "--file-locks", "--ext-unix-sk"]
    words += ["--image-path", str(directory), "--work-path", str(scratch.work), container.id]
    environment = options.environment(option_file, criu)
    inherited = (frozen.lifeline, scratch.lock)
    dump_log = scratch.work / "dump.log"
    done = _run_checkpoint(low_level.words(*words), environment, settings.capture_timeout, inherited, dump_log)
    if done.returncode != 0:
        kept = _keep_log(dump_log, settings)
        cause = log.cause(str(dump_log)) or runc.message(done)
        raise CaptureError("dump container", container.id, cause, f"CRIU's log is kept as {kept}")


def _run_checkpoint(
    words: list[str], env: dict[str, str], timeout: float, inherited: tuple[int, ...], dump_log: Path
) -> subprocess.CompletedProcess[str]:
    """Run `runc checkpoint`. It outlives a killed rewarm: a CRIU that dies in the middle leaves broken processes.

    `inherited` files stay open for as long as it or its CRIU lives.
    """
    try:
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=env,
            pass_fds=inherited,
            start_new_session=True,
        )
    except OSError as error:
        raise OciError("run runc checkpoint", words[-1], str(error)) from error
    end = time.monotonic() + timeout
    try:
        said, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired as error:
        _end(process, dump_log, timeout)
        limit = f"it did not end within {timeout:g} s"
        raise CaptureError("dump container", words[-1], limit, "see `capture_timeout` in the settings") from error
    except BaseException:
        # Told to end: the processes must be whole again before they may run.
        try:
            process.communicate(timeout=max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            _end(process, dump_log, timeout)
        raise
    return subprocess.CompletedProcess(words, process.returncode, said, "")


def _end(process: subprocess.Popen[str], dump_log: Path, patience: float) -> None:
    """End a dump that takes too long: at once while CRIU has not yet put its code into a process.

    After that its death may break the process that it is in, so it has as long again to come to its end.
    """
    if dump_log.exists() and _INFECTED in dump_log.read_bytes():
        try:
            process.communicate(timeout=patience)
            return
        except subprocess.TimeoutExpired:
            pass  # two limits long it has not moved: the processes are lost either way
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


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


def _remove_network_lock(container: Container) -> list[str]:
    """What another dump, killed or final, left in the network namespace; rewarm's own makes no rules."""
    try:
        found = netlock.remove(container.pid)
    except CaptureError as error:
        return [str(error)]
    return ["removed the network lock that an earlier dump left in the container's network"] if found else []


def _keep_log(path: Path, settings: Settings) -> str:
    kept = os.path.join(settings.state_dir, "last-failed-dump.log")
    if path.exists():
        private.make(settings.state_dir)
        shutil.copyfile(path, kept)
    return kept


def _write_layers(
    container: Container, snapshot: Path, bundle_spec: spec.Spec, upper: Path | None, pids: list[int]
) -> None:
    """The changes of the rootfs and the content of a bind-mounted /dev/shm, with the links that CRIU expects there."""
    links = remaps.find(snapshot / CHECKPOINT, pids)
    shm = spec.bind_source(bundle_spec, SHM)
    in_shm = [link for link in links if link.name.startswith(SHM[1:] + "/")]
    covered = [destination.lstrip("/") + "/" for destination, _ in spec.mounts(bundle_spec)]
    in_rootfs = [link for link in links if not any(link.name.startswith(c) for c in covered)]
    _check_volumes(
        container, [link.name for link in links if link not in in_rootfs and link not in in_shm], bundle_spec
    )
    try:
        if upper is not None:
            in_rootfs = remaps.by_name_in_upper(in_rootfs, upper, pids[0])
            _write_layer(snapshot / ROOTFS_DIFF, upper, [(link.name, link.source) for link in in_rootfs])
        if shm:
            _write_layer(snapshot / DEV_SHM, Path(shm), [(link.name[len(SHM) :], link.source) for link in in_shm])
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


def _write_layer(path: Path, tree: Path, extra: list[tuple[str, str]]) -> None:
    """A tree in which nothing changed gives no layer, and so no hook at the restore."""
    with path.open("wb") as out:
        stats = write_layer(tree, out, extra=extra)
    if not stats.entries:
        path.unlink()


def _stop(container: Container, low_level: Runc, frozen: Frozen) -> None:
    """Kill the frozen source: the signal first, so that it runs no instruction after the moment of the snapshot."""
    low_level.run("kill", "--all", container.id, "KILL", timeout=30)
    frozen.resume()
    end = time.monotonic() + _KILL_TIMEOUT
    while low_level.status(container.id) not in ("stopped", "") and time.monotonic() < end:
        time.sleep(0.02)
    if low_level.status(container.id) not in ("stopped", ""):
        raise CaptureError("stop container", container.id, f"it did not end within {_KILL_TIMEOUT:.0f} s of SIGKILL")
