"""The GPUs of a restore: the room on them, which of them stand for which of the snapshot's, their device nodes, and
the device memory itself."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from rewarm import processes
from rewarm.errors import RestoreError
from rewarm.gpu import actions, container, library, nodes, room, view
from rewarm.gpu.container import EXCLUSIVE
from rewarm.gpu.contexts import Context
from rewarm.oci.spec import Spec, write_atomically
from rewarm.settings import Settings
from rewarm.store.manifest import Manifest
from rewarm.trace import Trace
from rewarm_hooks.gpu_pairs import as_objects, pair
from rewarm_native.cuda import Driver

if TYPE_CHECKING:
    from rewarm.gpu.load import Load

_RECORD = "devices.json"
_LIBRARY = 30.0
"""Seconds in which the device memory library maps what it is given."""


class Devices:
    """The GPUs of one container. Needs a snapshot with GPUs that fits the live `spec` (compat.check)."""

    def __init__(self, spec: Spec, manifest: Manifest, settings: Settings, low_level: str, directory: str) -> None:
        """`directory` is the container directory, `low_level` the runtime below rewarm."""
        self._spec = spec
        self._manifest = manifest
        self._settings = settings
        self._low_level = low_level
        self._directory = directory
        self._driver: Driver | None = None
        self.map: list[dict[str, Any]] = []
        """{"source": uuid, "target": uuid, "source_minor": n, "target_minor": n} of every GPU; [] if all are the same.
        """

    def check_room(self) -> None:
        """The memory that the snapshot's processes had of each GPU is free on the one that stands for it: the driver
        does not undo a restore that runs out of it. The driver that will be needed is loaded as well. Raises
        RestoreError, GpuError.
        """
        self._check_room({})

    def _check_room(self, there: Mapping[int, int]) -> None:
        """`there`: bytes of device memory that the processes need and that are on the GPUs already, by index."""
        cuda = self._manifest.cuda
        if not cuda.processes:
            return
        self._driver = self._driver or library.load(self._settings.libcuda)
        sources = [device.gpu for device in self._manifest.requires.gpus]
        live = {device.gpu: device for device in self._live().devices}
        nvml = container.nvml(self._settings.libcuda)
        for index, ((_, target), used) in enumerate(zip(pair(sources, list(live)), cuda.used_bytes, strict=True)):
            needed = max(0, used - there.get(index, 0))
            others = nvml.processes(target.uuid) if live[target].compute_mode == EXCLUSIVE else []
            if needed and others:
                raise RestoreError(
                    "restore GPU memory on",
                    f"{target.uuid} (/dev/nvidia{target.minor})",
                    f"it is in compute mode {EXCLUSIVE}, and process {others[0][0]} uses it",
                    "see who uses it with `nvidia-smi`",
                )
            if text := room.short(nvml, target.uuid, needed):
                raise RestoreError(
                    "restore GPU memory on",
                    f"{target.uuid} (/dev/nvidia{target.minor})",
                    text,
                    "see who uses it with `nvidia-smi`",
                )

    def targets(self) -> list[str]:
        """The UUID of the GPU that stands for each of the snapshot's, in their order."""
        sources = [device.gpu for device in self._manifest.requires.gpus]
        return [target.uuid for _, target in pair(sources, [device.gpu for device in self._live().devices])]

    def hook(self) -> list[str]:
        """The words of the hook (rewarm_hooks.series) that works out the map when the container is made; writes what it
        reads."""
        inventory = container.nvml(self._settings.libcuda).inventory
        sources = as_objects(device.gpu for device in self._manifest.requires.gpus)
        mig = inventory.mig_minors
        here = [{**gpu, "mig": gpu["minor"] in mig} for gpu in as_objects(inventory.gpus)]
        words = ["device-remap"]
        for name, value in (("sources", sources), ("node", here)):
            path = os.path.join(self._directory, f"{name}.json")
            write_atomically(path, json.dumps(value).encode())
            words += [f"--{name}", path]
        return [*words, "--record", os.path.join(self._directory, _RECORD), "--low-level", self._low_level]

    def put_right(self, init: int, rootfs: str) -> list[str]:
        """Make the device nodes of the stopped container those of its spec. Returns what was changed, a line each.

        That is usual: the driver makes nodes in a container as it needs them. `rootfs` is that of its bundle: whoever
        sees another root or other mounts would have other nodes. Raises RestoreError.
        """
        self.map = self._read_map()
        _check_view(init, rootfs)
        return nodes.put_right(init, self._spec)

    def resume(self, init: int, stopped: Collection[int], load: Load | None, trace: Trace) -> None:
        """Let the processes of the tree below `init` (host pid) run, but those `stopped` (numbers in the container),
        and give those that use CUDA their device memory back; `load` is what of it does not go the driver's way.

        Their programs run from here on: the driver does its work in a thread of theirs. Where there is a `load`, they
        stand still until all of their memory is there. Raises RestoreError, GpuError.
        """
        tree = processes.tree(init)
        numbers = {processes.namespace_pid(pid): pid for pid in tree}
        found = []
        for number in self._manifest.cuda.processes:
            pid = numbers.get(number)
            start = None if pid is None else processes.start_time(pid)
            if pid is None or start is None:
                raise RestoreError("restore GPU memory of", f"process {number}", "it is not among the restored ones")
            found.append(Context(pid, start, processes.command(pid)))
        self._check_room({} if load is None else load.sizes())
        going = [pid for pid in reversed(tree) if processes.namespace_pid(pid) not in stopped]
        pairs = [(_bytes(entry["source"]), _bytes(entry["target"])) for entry in self.map]
        if load is not None and self._driver is not None:
            self._bring_back(self._driver, load, found, numbers, pairs, trace)
        for pid in going:
            processes.send(pid, signal.SIGCONT)
        if load is None and self._driver is not None:
            actions.restore(self._driver, found, pairs)

    def _bring_back(
        self,
        driver: Driver,
        load: Load,
        found: list[Context],
        numbers: dict[int, int],
        pairs: actions.Pairs,
        trace: Trace,
    ) -> None:
        """The driver's part, then what was loaded meanwhile, in processes of which nothing else runs."""
        from rewarm.gpu import awake, descriptors, taking

        if self.map and [entry["target"] for entry in self.map] != self.targets():
            raise RestoreError("read device map", _RECORD, "it is not the one by which device memory was loaded")
        with awake.Awake(driver, [context.pid for context in found]):
            with trace.phase("device.restore"):
                actions.restore(driver, found, pairs)
            with trace.phase("device.wait"):
                places = load.join()
            try:
                with trace.phase("device.map"):
                    for number, its in places.items():
                        taking.fill(driver, numbers[number], its, _LIBRARY, whole=True)
            finally:
                descriptors.close(places)

    def _live(self) -> container.ContainerGpus:
        return container.of_spec(self._spec, self._low_level, self._settings.libcuda)

    def _read_map(self) -> list[dict[str, Any]]:
        """What the hook wrote: for every GPU of the snapshot one of this container's, or nothing."""
        path = os.path.join(self._directory, _RECORD)
        try:
            with open(path, "rb") as file:
                found: list[dict[str, Any]] = json.load(file)["devices"]
        except (OSError, ValueError, KeyError) as error:
            raise RestoreError("read device map", path, str(error), "the device-remap hook did not run") from None
        sources = [device.uuid for device in self._manifest.requires.gpus]
        targets = sorted(device.gpu.uuid for device in self._live().devices)
        if found and (
            [entry["source"] for entry in found] != sources or sorted(entry["target"] for entry in found) != targets
        ):
            raise RestoreError("read device map", path, f"it is not one of {sources} to {targets}")
        return found


def _check_view(init: int, rootfs: str) -> None:
    try:
        found = view.other(init, rootfs)
    except OSError as error:
        raise RestoreError("look at root of", f"process {init}", error.strerror or str(error)) from error
    if found:
        cause = "it has a root or mounts of its own, in which rewarm puts no devices right"
        raise RestoreError("put devices right of", found, cause, "capture the container without such a process")


def _bytes(uuid: str) -> bytes:
    try:
        return container.uuid_bytes(uuid)
    except ValueError:
        raise RestoreError("read device map", repr(uuid), "it is no UUID of a GPU") from None
