"""The IPC namespace of a container: what of it is the container's, where others are in it as well.

CRIU takes a container's whole namespace into its images and makes all of it anew. But the containers of a pod share the
pod's, and of a semaphore or a message queue the kernel says only who has used it last.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rewarm import processes, sysv
from rewarm.criu import images
from rewarm.criu import ipc as criu_ipc
from rewarm.errors import CaptureError, RestoreError, Unfit
from rewarm.oci import cgroups, pod
from rewarm.oci import ipc as oci_ipc
from rewarm.oci.runc import Container
from rewarm.oci.spec import Spec
from rewarm.sysv import Namespace, Object


def check(container: Container, bundle_spec: Spec) -> None:
    """What can be told before anything is paused. Raises CaptureError."""
    if oci_ipc.namespace(bundle_spec) is None:
        return
    try:
        with sysv.namespace(f"/proc/{container.pid}/ns/ipc") as own:
            # Shared memory may be attached by the container, or by who has a right to it.
            found = [one for one in own.objects() if not one.attached]
            _refuse(container, bundle_spec, own, found)
    except OSError as error:
        raise _failed(container, error) from error


def carry(container: Container, checkpoint: Path, bundle_spec: Spec) -> None:
    """Take out of the images of a frozen container what belongs to others: shared memory that they have attached, and
    it has not. Raises CaptureError for what may be of either."""
    try:
        found = criu_ipc.entries(checkpoint)
        own = criu_ipc.attached(checkpoint) if found else set()
        others = [one for one in found if one.kind != sysv.SHM or one.id not in own]
        if not others:
            return
        with sysv.namespace(f"/proc/{container.pid}/ns/ipc") as there:
            present = {(one.kind, one.id): one for one in there.objects()}
            used = {number: one.attached for (kind, number), one in present.items() if kind == sysv.SHM}
            # What is gone by now was not this one's, which stands still.
            theirs = {one.id for one in others if one.kind == sysv.SHM and used.get(one.id, 1)}
            unknown = [one for one in others if one.kind != sysv.SHM or one.id not in theirs]
            listed = [present.get((one.kind, one.id), Object(one.kind, one.key, one.id)) for one in unknown]
            _refuse(container, bundle_spec, there, listed)
            if _strangers(there, bundle_spec, _own(container)):
                criu_ipc.drop(checkpoint, theirs)
    except (OSError, images.ImageError) as error:
        raise _failed(container, error) from error


def _refuse(container: Container, bundle_spec: Spec, there: Namespace, found: list[Object]) -> None:
    """What others may use as well, unless this one's processes have been the last to."""
    own = _own(container)
    strangers = _strangers(there, bundle_spec, own) if found else []
    if not strangers:
        return
    for one in found:
        users = there.users(one)
        if not users or not users <= own:
            raise CaptureError(
                "capture container",
                container.id,
                f"it shares its IPC namespace with process {strangers[0]} ({processes.command(strangers[0])}) of "
                f"another container, and who uses {one} cannot be told",
                "have the other containers of the pod use POSIX semaphores and shared memory, or none",
            )


def _failed(container: Container, error: Exception) -> CaptureError:
    text = (error.strerror if isinstance(error, OSError) else "") or str(error)
    return CaptureError("look at the IPC namespace of", container.id, text, "capture it again")


def _own(container: Container) -> set[int]:
    return {*processes.tree(container.pid), *processes.in_cgroups(container.cgroup_paths)}


def _strangers(there: Namespace, bundle_spec: Spec, own: Iterable[int]) -> list[int]:
    """Processes in a namespace that are neither `own` nor the pod's sandbox, which uses nothing in it."""
    sandbox, known = pod.sandbox(bundle_spec), set(own)
    return [pid for pid in there.processes() if pid not in known and not _is_in(pid, sandbox)]


def _is_in(pid: int, sandbox: str) -> bool:
    with suppress(FileNotFoundError, ProcessLookupError):
        return sandbox in cgroups.containers(pid)
    return True  # it has ended


def settle(checkpoint: Path, bundle_spec: Spec) -> None:
    """Have CRIU leave the sysctls of the namespace as they are, or as the spec wants those of a new one. Raises Unfit
    where what is there stands in the way of the snapshot's, and may be another container's; images.ImageError; OSError.
    """
    path = oci_ipc.namespace(bundle_spec)
    if path is None:
        return
    wanted = _objects(checkpoint)
    with sysv.namespace(path) as there:
        values = there.sysctls()
        if not path:
            _configure(values, oci_ipc.sysctls(bundle_spec))
        criu_ipc.write_variables(checkpoint, values)
        if any(one.kind == sysv.SHM for one in wanted) and values.get("shm_rmid_forced", [0])[0]:
            cause = "with kernel.shm_rmid_forced shared memory goes before the restored program has it"
            raise Unfit("restore snapshot", "System V shared memory", cause)
        if path:
            _make_way(bundle_spec, there, wanted)


def _configure(values: dict[str, list[int]], sysctls: dict[str, str]) -> None:
    for name, file in sysv.SYSCTLS.items():
        if name in values and file in sysctls:
            try:
                values[name] = [int(word) for word in sysctls[file].split()]
            except ValueError:
                raise Unfit("restore snapshot", f"sysctl {file}", f"{sysctls[file][:80]!r} is no number") from None
            if any(not 0 <= number < 1 << 64 for number in values[name]):
                raise Unfit("restore snapshot", f"sysctl {file}", f"{sysctls[file][:80]!r} is out of range")


def _make_way(bundle_spec: Spec, there: Namespace, wanted: list[Object]) -> None:
    in_the_way = sysv.in_the_way(there.objects(), wanted)
    strangers = _strangers(there, bundle_spec, ()) if in_the_way else []
    if strangers:
        cause = (
            f"it is in the IPC namespace already, in which process {strangers[0]} "
            f"({processes.command(strangers[0])}) of another container is"
        )
        raise Unfit("restore snapshot", str(in_the_way[0]), cause)
    held = next((one for one in in_the_way if one.attached), None)
    if held is not None:
        raise Unfit("restore snapshot", str(held), "it is in the IPC namespace already, and a process has it attached")


def planned(checkpoint: Path, bundle_spec: Spec) -> dict[str, Any]:
    """What a record has to know to take back what a restore makes in a namespace that is there. Raises OSError,
    images.ImageError."""
    path = oci_ipc.namespace(bundle_spec)
    return sysv.planned(path, _objects(checkpoint)) if path else {}


def clear(plan: Mapping[str, Any], bundle_spec: Spec) -> None:
    """Remove what an earlier run of the container has left. Raises Unfit if another container has come meanwhile, whose
    it may be; RestoreError and OSError."""
    if plan:
        with sysv.namespace(str(plan["path"])) as there:
            _make_way(bundle_spec, there, [Object(*one) for one in plan["objects"]])
    left = sysv.clear(plan)
    if left is not None:
        raise RestoreError("make room for", str(left), "a process has attached what is there", "restart the container")


def check_attached(checkpoint: Path, bundle_spec: Spec, init: int) -> None:
    """That the stopped processes below `init`, a host pid, have attached no shared memory but the snapshot's.

    Of a mapping that is of no kind which CRIU opens its restorer attaches what has the number in the image, as root.
    Raises RestoreError, images.ImageError and OSError.
    """
    path = oci_ipc.namespace(bundle_spec)
    if path == "":
        return
    # CRIU makes none in the node's.
    own = set() if path is None else {one.id for one in _objects(checkpoint) if one.kind == sysv.SHM}
    with sysv.namespace(path or "/proc/self/ns/ipc") as there:
        # One that is attached is there.
        if {one.id for one in there.objects() if one.kind == sysv.SHM} <= own:
            return
    for pid in processes.tree(init):
        for number in sorted(_attached(pid) - own):
            cause = "it is not the snapshot's, and a process has it attached"
            raise RestoreError("restore container", f"shared memory {number}", cause, "remove the snapshot")


def _attached(pid: int) -> set[int]:
    """Ids of the shared memory that a process has in its address space."""
    with suppress(FileNotFoundError, ProcessLookupError), open(f"/proc/{pid}/maps", "rb") as file:
        fields = [line.split(None, 5) for line in file if b" /SYSV" in line]
        return {int(words[4]) for words in fields}
    return set()  # it has ended


def _objects(checkpoint: Path) -> list[Object]:
    return [Object(one.kind, one.key, one.id) for one in criu_ipc.entries(checkpoint)]
