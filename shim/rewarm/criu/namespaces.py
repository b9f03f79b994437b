"""Which namespaces the images put a container's processes into: never into the node's, where the live spec has another.

CRIU makes a namespace for the init where the init's id is another than that of the process that made the dump, which is
in `inventory.img` (criu/pstree.c: prepare_pstree_kobj_ids); else the init is in that of whoever restores.
A pid namespace that the container shares comes from runc, as a descriptor (criu/cr-restore.c: fork_with_pid), unless
the init in the images has the number 1: then CRIU makes one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rewarm import processes
from rewarm.criu import images
from rewarm.errors import Unfit

INVENTORY_MAGIC = 4
"""Bytes: the one image without a second number."""
_ROOT_IDS, _NS_PER_ID = 3, 4  # images/inventory.proto
_IDS = {"pid": 5, "network": 6, "ipc": 7, "uts": 8, "mount": 9, "user": 10}
"""images/core.proto: task_kobj_ids_entry. (A cgroup namespace CRIU makes by what is in its image of cgroups.)"""
_INIT = 1
_MAPS = {1: "uidMappings", 2: "gidMappings"}  # images/userns.proto


def check(directory: Path, spec: dict[str, Any]) -> None:
    """Compare the images in `directory` with the live spec. Raises Unfit for what is not of the spec's making, and
    images.ImageError."""
    for name in ("inventory.img", "pstree.img"):
        if not (directory / name).exists():
            raise images.ImageError(f"{name}: it is not there")
    inventory = next(images.records(directory / "inventory.img", magic=INVENTORY_MAGIC), {})
    roots = list(images.messages(inventory, _ROOT_IDS))
    # Of several protobuf makes one. And without ns_per_id CRIU looks for images by the number of a process, and reads
    # others than are looked at here.
    if len(roots) != 1 or images.u32(inventory, _NS_PER_ID) != 1:
        raise Unfit("restore snapshot", "inventory.img", "it does not tell its namespaces by their own numbers")
    (outside,) = roots
    namespaces = (spec.get("linux") or {}).get("namespaces") or []
    wanted = {str(one.get("type")) for one in namespaces if not processes.is_own_namespace(one)}
    first = images.u32(next(images.records(directory / "pstree.img"), {}), 1)
    shared = [one for one in namespaces if one.get("type") == "pid" and one.get("path")]
    if shared and first == _INIT:
        raise Unfit("restore snapshot", "pstree.img", "it has a pid namespace of its own, this container shares one")
    for path in sorted(directory.glob("ids-*.img")):
        own = path.name == f"ids-{first}.img"
        for ids in images.records(path):
            for kind, field in _IDS.items():
                _check(path.name, kind, images.u32(ids, field), images.u32(outside, field), wanted, own=own)
    if not (directory / f"ids-{first}.img").exists():
        raise Unfit("restore snapshot", f"ids-{first}.img", "it is not there, so its namespaces are not known")
    for path in sorted(directory.glob("userns-*.img")):
        _check_maps(path, spec.get("linux") or {})


def _check_maps(path: Path, linux: dict[str, Any]) -> None:
    """CRIU writes what is in the image: a user of the container's could be root of the node by it."""
    record = next(images.records(path), {})
    for field, name in _MAPS.items():
        extents = images.messages(record, field)
        found = sorted(tuple(images.u32(extent, number) for number in (1, 2, 3)) for extent in extents)
        live = [(one.get("containerID"), one.get("hostID"), one.get("size")) for one in linux.get(name) or []]
        if found != sorted(live):
            raise Unfit("restore snapshot", path.name, f"its images have other {name} than this container")


def _check(name: str, kind: str, number: int, outside: int, wanted: set[str], *, own: bool) -> None:
    if kind in wanted and (number == outside or (not number and own)):
        raise Unfit(
            "restore snapshot", name, f"its images want the node's {kind} namespace, this container has another"
        )
    if own and kind not in wanted and number not in (0, outside):
        raise Unfit("restore snapshot", name, f"its images want a {kind} namespace, this container has the node's")
