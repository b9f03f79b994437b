"""rewarm inspect: one snapshot's manifest, or what became of a container, readable."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from rewarm.errors import GpuError, Unfit
from rewarm.plain import plain
from rewarm.settings import Settings
from rewarm.store.chunks import CHUNK, CHUNKS, RECORD
from rewarm.store.directory import DirectoryStore, SnapshotRef
from rewarm.store.manifest import GpuDevice, Manifest, Process, Requires

from . import container as of_container
from . import options, output, pick


@click.command("inspect")
@click.argument("snapshot", metavar="NAME|ID", required=False)
@click.option("--container", metavar="ID", help="What became of a container instead, and which GPUs it has.")
@click.option("--check", is_flag=True, help="Say whether it fits this node; exit status 1 if it does not.")
@options.namespace
@options.as_json
@options.store
@options.config
@click.pass_context
def command(
    ctx: click.Context,
    snapshot: str | None,
    container: str | None,
    check: bool,
    namespace: str | None,
    as_json: bool,
    store: str | None,
    config: Path | None,
) -> None:
    """Show what a snapshot holds and what it needs.

    SNAPSHOT is a name (its newest readable snapshot), 6 or more digits of an id, or NAMESPACE/NAME@ID.
    """
    settings = options.load(config, store)
    if (snapshot is None) == (container is None) or (check and container is not None):
        raise click.UsageError("give a snapshot, or --container ID without --check")
    if snapshot is None:
        outcome = of_container.find(str(container), settings)
        output.document(outcome) if as_json else of_container.show(outcome)
        return
    where = DirectoryStore(settings.store)
    ref = pick.newest(where, snapshot, namespace)
    manifest = where.load(ref)
    reason = misfit(manifest.requires, settings) if check else ""
    if as_json:
        fits = {"fits": not reason, "misfit": reason or None} if check else {}
        output.document({"id": ref.id, "chunks": _chunks(manifest), **plain(manifest), **fits})
    else:
        _show(ref, manifest)
        if check:
            click.echo(f"\nFits this node: {'no: ' + output.printable(reason) if reason else 'yes'}")
    if reason:
        ctx.exit(1)


def misfit(needed: Requires, settings: Settings) -> str:
    """Why the snapshot cannot be restored on this node, whatever the container; "" when it can.

    Raises OciError when this node has no low-level runtime.
    """
    from rewarm import compat, warm
    from rewarm.gpu.container import of_node
    from rewarm.oci import runc

    try:
        here = warm.requirements({}, settings, runc.find(settings))
        # Of the container's own part the snapshot itself is the best example of one that fits.
        node = {key: getattr(here, key) for key in ("arch", "cpu_features", "kernel", "criu", "runc", "cgroup_version")}
        if needed.gpus:
            gpus = of_node([device.gpu for device in needed.gpus], settings.libcuda)
            node |= {"gpus": compat.gpu_devices(gpus), "driver": gpus.driver}
        compat.check(needed, needed._replace(**node))
    except (GpuError, Unfit) as error:
        return f"{error.cause}; {error.next_step}" if error.next_step else error.cause
    return ""


def _show(ref: SnapshotRef, manifest: Manifest) -> None:
    source = manifest.source
    packs = len({entry.pack for entry in manifest.files}) + len(manifest.packs)
    click.echo(f"{ref.namespace}/{ref.name}")
    output.fields(
        [
            ("id", ref.id),
            ("created", f"{manifest.created} ({output.age(manifest.created)}) by rewarm {manifest.rewarm}"),
            ("source", ", ".join(f"{key} {value}" for key, value in sorted(source.items()))),
            ("size", f"{output.size(manifest.stored_bytes)} in {len(manifest.files)} files, {packs} packs"),
        ],
        "  ",
    )
    click.echo("\nMemory")
    output.fields(_memory(manifest), "  ")
    click.echo("\nNeeds")
    output.fields(_needs(manifest.requires), "  ")
    click.echo("\nProcesses")
    output.columns(("  PID", "THREADS", "CPUS", "MEMORY POLICIES", "STATE"), map(_process, manifest.processes))
    click.echo("\nFiles")
    output.columns(
        ("  NAME", "SIZE", "DIGEST"),
        ((f"  {entry.name}", output.size(entry.size), entry.digest[:12]) for entry in manifest.files),
    )


def _chunks(manifest: Manifest) -> int:
    entry = manifest.file(CHUNKS)
    return entry.size // RECORD.size if entry else 0


def _memory(manifest: Manifest) -> list[tuple[str, str]]:
    memory = manifest.memory
    count = _chunks(manifest) - (manifest.cuda.served_bytes - manifest.cuda.served_zeros) // CHUNK
    stored, raw = sum(pack.size for pack in manifest.packs), sum(pack.raw_size for pack in manifest.packs)
    larger = sum(mapping.end - mapping.start for mapping in memory.huge)
    return [
        ("dumped", output.size(manifest.memory_bytes)),
        ("filled", f"{output.size(memory.filled)} in {count} chunk{'s' * (count != 1)}"),
        ("zeros", f"{output.size(memory.zeros)}, not stored"),
        ("left to CRIU", output.size(memory.left)),
        ("packs", f"{len(manifest.packs)} of chunks: {output.size(stored)} for {output.size(raw)}"),
        *([("device memory", _device_memory(manifest))] if manifest.requires.gpus else []),
        (
            "huge pages",
            f"{len(memory.huge)} mapping{'s' * (len(memory.huge) != 1)} of {output.size(larger)}"
            if memory.huge
            else "none",
        ),
    ]


def _needs(needs: Requires) -> list[tuple[str, str]]:
    return [
        ("architecture", needs.arch),
        ("CPU features", " ".join(needs.cpu_features) or "none"),
        ("kernel", f"{needs.kernel} or newer"),
        ("CRIU", f"{needs.criu} or newer"),
        ("runc", f"{needs.runc} (any)"),
        ("cgroup", f"v{needs.cgroup_version}"),
        ("image", needs.image or "any (the engine gave none)"),
        ("arguments", shlex.join(needs.args)),
        ("environment", " ".join(needs.env_keys) or "none"),
        ("mounts", ", ".join(f"{mount.destination} ({mount.type})" for mount in needs.mounts) or "none"),
        ("user", "{}:{}".format(*needs.user)),
        ("capabilities", " ".join(needs.capabilities) or "none"),
        ("seccomp", f"profile {needs.seccomp[:12]}" if needs.seccomp else "none"),
        ("LSM label", needs.lsm or "none"),
        ("namespaces", " ".join(needs.namespaces) or "none"),
        ("GPUs", "; ".join(_gpu(device) for device in needs.gpus) or "none"),
        *([("engine", f"{needs.engine}, paused (rewarm.dev/engine)")] if needs.engine != "none" else []),
        *([("NVIDIA driver", f"{needs.driver} (the same)")] if needs.gpus else []),
    ]


def _gpu(device: GpuDevice) -> str:
    mode = "" if device.compute_mode == "default" else f", compute mode {device.compute_mode}"
    return f"{device.model} of {output.size(device.memory_bytes)}{mode} ({device.uuid}, /dev/nvidia{device.minor})"


def _device_memory(manifest: Manifest) -> str:
    """How much of each GPU, and of how many processes."""
    cuda = manifest.cuda
    if not cuda.processes:
        return "none"
    used = ", ".join(output.size(size) for size in cuda.used_bytes)
    text = f"{used} of {len(cuda.processes)} process{'es' * (len(cuda.processes) != 1)}"
    if cuda.served_bytes:
        zeros = f"{output.size(cuda.served_zeros)} of it zeros, not stored"
        text += f"; {output.size(cuda.served_bytes)} of it not by way of the driver, {zeros}"
    return text


def _process(process: Process) -> tuple[str, ...]:
    affinities = {output.numbers(thread.affinity) for thread in process.threads}
    numa = {thread.policy for thread in process.threads} | {policy.mode for policy in process.memory_policies}
    return (
        f"  {process.pid}",
        str(len(process.threads)),
        " | ".join(sorted(affinities - {""})) or "all",
        ", ".join(sorted(numa - {""})) or "-",
        "stopped" if process.stopped else "running",
    )
