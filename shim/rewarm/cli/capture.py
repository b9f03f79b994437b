"""rewarm capture: a snapshot of a running container."""

from __future__ import annotations

import glob
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rewarm.errors import CaptureError
from rewarm.oci import discover, pod
from rewarm.oci.runc import Container
from rewarm.store.names import check_name, check_namespace

from . import options, output
from .progress import Progress

if TYPE_CHECKING:
    from rewarm.capture import Captured
    from rewarm.store.gpus import Cuda

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@click.command("capture")
@click.argument("container")
@click.option(
    "--name", required=True, help="The snapshot's name; a name can have several, the newest that fits is used."
)
@click.option("--namespace", "-n", metavar="NS", help="Namespace of the snapshot.  [default: the pod's, else default]")
@click.option("--leave-running/--stop", default=True, show_default=True, help="What happens to the container.")
@click.option(
    "--root", type=click.Path(file_okay=False), help="The container's runc root, where the settings' do not find it."
)
@options.as_json
@options.store
@options.config
def command(
    container: str,
    name: str,
    namespace: str | None,
    leave_running: bool,
    root: str | None,
    as_json: bool,
    store: str | None,
    config: Path | None,
) -> None:
    """Make a snapshot of a running container.

    CONTAINER is a container id of runc, containerd, Docker or Podman, or the beginning of one. It is held still while
    its memory and files are read, and runs on afterwards unless --stop is given; also when the capture fails.
    """
    check_name(name)
    settings = options.load(config, store)
    if os.geteuid() != 0:
        raise CaptureError("capture container", container[:80], "only root can read its memory", "run it with sudo")
    found = discover.find(container, settings.runtime_roots if root is None else [glob.escape(root)])
    space = check_namespace(pod_namespace(found) if namespace is None else namespace)
    from rewarm.capture import capture  # after the line above, which can say at once that there is no such container

    with Progress("starting") as progress, interruptible() as proceed:

        def step(text: str) -> None:
            proceed(text)
            progress.step(text)

        made = capture(
            found,
            space,
            name,
            settings,
            stop=not leave_running,
            systemd_cgroup=by_systemd(found),
            step=step,
        )
    for note in made.notes:
        output.complain(note)
    _show(made, found, as_json, not leave_running)


def pod_namespace(container: Container) -> str:
    """The Kubernetes namespace of the container's pod, as the restore of another of its containers will name it: its
    annotations are runc's labels. Raises CaptureError."""
    try:
        return pod.namespace({"annotations": container.labels})
    except ValueError as error:
        key, cause = error.args
        next_step = "name the namespace: --namespace"
        raise CaptureError("find the namespace of container", container.id, f"{key}: {cause}", next_step) from None


def by_systemd(container: Container) -> bool:
    """Whether systemd made the container's cgroup: runc's systemd driver makes scopes, its own one plain names."""
    return any(path.rstrip("/").endswith(".scope") for path in container.cgroup_paths)


class _Proceed:
    """Remembers a signal that comes in one of the `whole` steps, and ends the capture at the next step."""

    def __init__(self, whole: tuple[str, ...]) -> None:
        self._whole = whole
        self._step = ""
        self._signal = 0

    def __call__(self, text: str) -> None:
        self._step = text
        if self._signal:
            raise KeyboardInterrupt

    def handle(self, number: int, frame: object) -> None:
        if self._step in self._whole:
            # A CRIU that is killed in the middle leaves broken processes, and the driver ends what it has begun.
            self._signal = number
            os.write(2, f"rewarm: will stop when it is done with {self._step}\n".encode())
        else:
            raise KeyboardInterrupt


@contextmanager
def interruptible() -> Iterator[_Proceed]:
    """Inside, SIGINT, SIGTERM and SIGHUP end the capture in order: the container runs on and nothing is left behind.

    What it gives has to be called at each step of the capture; it raises KeyboardInterrupt.
    """
    from rewarm.capture import DUMP, GPU_MEMORY

    proceed = _Proceed((GPU_MEMORY, DUMP))
    before = {number: signal.signal(number, proceed.handle) for number in _SIGNALS}
    try:
        yield proceed
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _device_memory(cuda: Cuda) -> str:
    return f"{output.size(cuda.served_bytes)} not by way of the driver, {output.size(cuda.served_zeros)} of it zeros"


def _show(made: Captured, source: Container, as_json: bool, stopped: bool) -> None:
    memory = made.manifest.memory
    if as_json:
        output.document(
            {
                "namespace": made.ref.namespace,
                "name": made.ref.name,
                "id": made.ref.id,
                "created": made.manifest.created,
                "container": source.id,
                "runtime_root": source.root,
                "stopped": stopped,
                "memory_bytes": made.manifest.memory_bytes,
                "filled_bytes": memory.filled,
                "zero_bytes": memory.zeros,
                "device_bytes": made.manifest.cuda.served_bytes,
                "device_zero_bytes": made.manifest.cuda.served_zeros,
                "stored_bytes": made.stored,
                "added_bytes": made.added,
                "paused_seconds": round(made.paused, 3),
                "total_seconds": round(made.total, 3),
                "notes": list(made.notes),
            }
        )
        return
    click.echo(f"captured {made.ref}")
    output.fields(
        [
            ("id", made.ref.id),
            ("memory", f"{output.size(made.manifest.memory_bytes)}, {output.size(memory.zeros)} of it zeros"),
            *([("device memory", _device_memory(made.manifest.cuda))] if made.manifest.cuda.served_bytes else []),
            ("stored", f"{output.size(made.stored)}, {output.size(made.added)} of it new in the store"),
            ("container", f"{'stopped' if stopped else 'running'}, paused for {output.seconds(made.paused)}"),
            ("took", output.seconds(made.total)),
        ],
        "  ",
    )
