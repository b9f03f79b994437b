"""Which IPC namespace a container has, and with which sysctls."""

from __future__ import annotations

from rewarm import processes
from rewarm.oci.spec import Spec


def namespace(spec: Spec) -> str | None:
    """Path of the one that a container with this spec joins, as one of a pod does; "" for one of its own, None for the
    node's."""
    for one in (spec.get("linux") or {}).get("namespaces") or []:
        if one.get("type") == "ipc" and not processes.is_own_namespace(one):
            return str(one.get("path") or "")
    return None


def sysctls(spec: Spec) -> dict[str, str]:
    """By their files below /proc/sys: runc takes either way to write a name."""
    found = (spec.get("linux") or {}).get("sysctl") or {}
    return {str(name).replace(".", "/"): str(value) for name, value in found.items()}
