"""Whether a container can be captured: what is looked at before anything is paused, and refused by name."""

from __future__ import annotations

import fcntl
import os
from typing import TYPE_CHECKING

from rewarm import processes
from rewarm.errors import CaptureError, GpuError
from rewarm.oci import cgroups, spec
from rewarm.oci.runc import Container, Runc

if TYPE_CHECKING:
    from rewarm.gpu.hold import Users

_INIT = 1
_NS_GET_PARENT = 0xB702  # ioctl_ns(2)


def check_status(container: Container, low_level: Runc, *, held: bool = False) -> None:
    """It runs, and a copy of it could run elsewhere. `held`: another capture may have paused it. Raises CaptureError,
    OciError."""
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
    if status == "paused" and not held:
        raise CaptureError("capture container", container.id, "it is paused", "resume it first")
    namespaces = (spec.load(container.bundle).get("linux") or {}).get("namespaces") or []
    if not any(one.get("type") == "pid" and not processes.is_own_namespace(one) for one in namespaces):
        raise CaptureError(
            "capture container",
            container.id,
            "it is in the node's pid namespace (hostPID), in which its process ids are others' at a restore",
            "give it a pid namespace of its own, or its pod's (shareProcessNamespace)",
        )
    if container.labels.get("org.criu.config"):
        raise CaptureError(
            "capture container",
            container.id,
            "its annotation org.criu.config would override rewarm's options",
            "remove the annotation",
        )


def check_mounts(container: Container) -> None:
    """What is read of a container by path, its control directory and the changes of its root, is where its engine has
    mounted it, which may have a mount namespace of its own. The parent of a container's init is in that: a shim, conmon
    or runc, or the node's init.

    Raises CaptureError.
    """
    found = processes.stat(container.pid)
    if found is None:
        raise _ended(container)
    parent = found.parent
    try:
        if os.path.samestat(os.stat(f"/proc/{parent}/ns/mnt"), os.stat("/proc/self/ns/mnt")):
            return
    except OSError as error:
        raise _ended(container, "the parent of ") from error
    raise CaptureError(
        "capture container",
        container.id,
        f"its engine (process {parent}, {processes.command(parent)}) has a mount namespace of its own",
        f"capture it from there: nsenter --target {parent} --mount rewarm capture",
    )


def _ended(container: Container, whose: str = "") -> CaptureError:
    cause = f"{whose}its init, process {container.pid}, has ended"
    return CaptureError("capture container", container.id, cause, "capture it while it runs")


def check_pid_namespaces(container: Container) -> None:
    """CRIU dumps none below the container's own (criu/namespaces.c), and says so when device memory has been moved.

    Raises CaptureError.
    """
    try:
        own = os.readlink(f"/proc/{container.pid}/ns/pid")
    except OSError as error:
        raise _ended(container) from error
    for pid in processes.tree(container.pid):
        try:
            found = os.readlink(f"/proc/{pid}/ns/pid")
        except OSError:
            continue  # it has ended
        if found != own:
            raise CaptureError(
                "capture container",
                container.id,
                f"process {pid} ({processes.command(pid)}) is in a pid namespace of its own, which CRIU cannot dump",
                "run it without `unshare --pid` or a sandbox that makes one",
            )


def check_users(container: Container, bundle_spec: spec.Spec) -> None:
    """Its init is in the user namespace in which runc has started it. In one of its own it may mount, also an overlay
    as its root, whose upper directory is then any path of the node's that it likes. From there no way leads back: what
    was read of its mounts before this is its container's.

    Raises CaptureError.
    """
    try:
        if _depth(container.pid) == (1 if spec.has_users(bundle_spec) else 0):
            return
    except OSError as error:
        raise _ended(container) from error
    raise CaptureError(
        "capture container",
        container.id,
        f"its init ({processes.command(container.pid)}) is in a user namespace that it has made itself, in which any "
        "mount can be its root",
        "run it without `unshare --user` or a sandbox that makes one",
    )


def _depth(pid: int) -> int:
    """How many user namespaces a process is below this one's; 2 for more, and for what is not below it.

    Raises OSError.
    """
    own = os.stat("/proc/self/ns/user")
    its = os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if os.path.samestat(os.fstat(its), own):
            return 0
        try:
            parent = fcntl.ioctl(its, _NS_GET_PARENT)
        except PermissionError:
            return 2
        try:
            return 1 if os.path.samestat(os.fstat(parent), own) else 2
        finally:
            os.close(parent)
    finally:
        os.close(its)


def check_orphans(container: Container) -> None:
    """In a pid namespace that is shared its init, another container, adopts processes whose parent has ended: CRIU,
    which goes from parent to child, would leave them out. (Not meant is what was executed in a container: its parent is
    outside, or was executed, too.)

    Raises CaptureError.
    """
    own = os.readlink(f"/proc/{container.pid}/ns/pid")
    if processes.namespace_pid(container.pid) == _INIT:
        return  # its own namespace: who is adopted is below it, though maybe not yet when that is looked at
    for pid in sorted(processes.in_cgroups(container.cgroup_paths) - set(processes.tree(container.pid))):
        found = processes.stat(pid)
        try:
            if found is None or found.state in "ZX" or os.readlink(f"/proc/{found.parent}/ns/pid") != own:
                continue
            if processes.namespace_pid(found.parent) != _INIT:
                continue
        except OSError:
            continue  # it, or its parent, has ended
        raise CaptureError(
            "capture container",
            container.id,
            f"process {processes.namespace_pid(pid)} ({processes.command(pid)}) has outlived its parent, so that it is "
            "the child of another container of the pod",
            "give the container a pid namespace of its own, or have its init reap what it starts",
        )


def check_streams(container: Container) -> None:
    """Standard streams on a file or named FIFO of the node: CRIU knows no mount of the container for it.

    Raises CaptureError.
    """
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


def check_view(container: Container) -> None:
    """A GPU container whose processes see other roots or mounts is not restored (devices.py). Raises CaptureError."""
    from rewarm.gpu import view

    try:
        found = view.other(container.pid)
    except OSError as error:
        raise CaptureError("look at roots of container", container.id, error.strerror or str(error)) from error
    if found:
        cause = f"{found} has a root or mounts of its own, in which a restore could not put its GPU devices right"
        raise CaptureError("capture container", container.id, cause, "run it without chroot or mounts of its own")


def check_memory(container: Container, users: Users) -> None:
    """The device memory becomes memory of the container's own, and its cgroup's OOM killer knows no mercy.

    Nothing is refused where NVML does not say how much it is. Raises GpuError.
    """
    from rewarm.memory.fill import available  # only where a process uses a GPU

    uuids = [device.gpu.uuid for device in users.gpus.devices]
    sizes = users.nvml.used_bytes(uuids, [context.pid for context in users.contexts]) or {}
    needed = sum(sum(found.values()) for found in sizes.values())
    rooms = [(available(), "this node"), *cgroups.memory_rooms(container.cgroup_paths)]
    room, where = min(rooms)
    if needed > room:
        cause = (
            f"{needed} bytes ({needed >> 20} MiB) of it become memory of its own, {where} has {room} ({room >> 20} MiB)"
        )
        raise GpuError("capture GPU memory of", container.id, cause, "raise its memory limit, or free memory")
