"""A new replica is not the one that was captured: it has a name and addresses of its own, and is told what else is new.

Its memory is the source's, the environment in it included. Who wants to know what the new container has reads
`restored.json` in the control directory, which is there before anything runs, and in no container that started cold.
"""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rewarm import addresses, ipc, ports, processes
from rewarm.criu import connections, sockets, uts
from rewarm.oci import pod, spec, users
from rewarm.oci import uts as oci_uts
from rewarm.oci.spec import Spec

NAME = "restored.json"


def rename(checkpoint: Path, bundle_spec: Spec, before: Sequence[str]) -> None:
    """Have CRIU give the container the host name and the IPC sysctls of its spec, or leave those of the pod that it
    joins, and bind its sockets to the addresses that it has; `before` are those of the source. Raises Unfit where it
    cannot have that, images.ImageError and OSError."""
    if (names := oci_uts.names(bundle_spec)) is not None:
        uts.rename(checkpoint, *names)
    ipc.settle(checkpoint, bundle_spec)
    target = _network(bundle_spec)
    here = _addresses(bundle_spec) or []
    # Where there is no namespace yet nothing tells: the engine may still give it the source's addresses.
    if target is not None:
        sockets.readdress(checkpoint, before, here)
    if connections.kept(checkpoint):
        connections.settle(checkpoint, here, () if target is None else ports.ports(target))


def tell(control: str, container: str, snapshot: str, bundle_spec: Spec) -> None:
    """Write the file for a container with this id and spec; `control` is its control directory on the node.

    Its program's user may read it, and nobody else in the container: the environment is in it. Raises OSError.
    """
    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    names = oci_uts.names(bundle_spec)
    document = {
        "reason": f"restored from {snapshot} at {at}",
        "snapshot": snapshot,
        "restored": at,
        "container": container,
        "pod": pod.pod(bundle_spec),
        "hostname": os.uname().nodename if names is None else names[0],
        "addresses": _addresses(bundle_spec),
        "environment": _environment(bundle_spec),
    }
    path = os.path.join(control, NAME)
    spec.write_atomically(path, json.dumps(document).encode(), 0o400)
    os.chown(path, *users.owner(bundle_spec))


def _addresses(bundle_spec: Spec) -> list[str] | None:
    """Of a network namespace that is there already, as a pod's is, or of the node's if that is the container's."""
    target = _network(bundle_spec)
    if target is None:
        return []
    with suppress(OSError):
        return addresses.addresses(target)
    return None


def _network(bundle_spec: Spec) -> str | int | None:
    """Path or process of the network namespace that is there already; None if the container gets one of its own."""
    namespaces = (bundle_spec.get("linux") or {}).get("namespaces") or []
    paths = [str(one.get("path") or "") for one in namespaces if one.get("type") == "network"]
    return (paths[0] or None) if paths else os.getpid()


def _environment(bundle_spec: Spec) -> dict[str, str]:
    found: list[Any] = (bundle_spec.get("process") or {}).get("env") or []
    return dict(str(one).split("=", 1) for one in found if "=" in str(one))


def hand_over(directory: int, pids: Sequence[int], bundle_spec: Spec) -> None:
    """Let the program read the file, whose processes `pids` are, where it starts as root and gives that up (gosu,
    su-exec): if all that did so have the same user, and root can read it then, too. `directory` is the open control
    directory, in which the container may have put anything by now. Raises OSError.
    """
    user = (bundle_spec.get("process") or {}).get("user") or {}
    if int(user.get("uid") or 0) != 0:
        return
    root = users.owner(bundle_spec)
    found = {one for one in map(processes.user, pids) if one is not None}
    others = {one for one in found if one[0] != root[0]}
    if len({uid for uid, _ in others}) != 1 or (others != found and not _reads_all(bundle_spec)):
        return
    try:
        fd = os.open(NAME, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    except FileNotFoundError:
        return
    try:
        status = os.fstat(fd)
        if stat.S_ISREG(status.st_mode) and status.st_nlink == 1 and status.st_uid == root[0]:
            os.chown(f"/proc/self/fd/{fd}", *min(others))
            # From here on the sticky directory keeps root of the container without CAP_FOWNER from moving it.
            if not _is_still(directory, status):
                os.chown(f"/proc/self/fd/{fd}", status.st_uid, status.st_gid)
    finally:
        os.close(fd)


def _is_still(directory: int, status: os.stat_result) -> bool:
    try:
        return os.path.samestat(status, os.stat(NAME, dir_fd=directory, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _reads_all(bundle_spec: Spec) -> bool:
    capabilities = (bundle_spec.get("process") or {}).get("capabilities") or {}
    return bool({"CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH"} & set(capabilities.get("effective") or []))
