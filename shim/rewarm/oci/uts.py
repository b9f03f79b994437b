"""What a container is called: a new replica is not the one that was captured."""

from __future__ import annotations

import os

from rewarm import processes
from rewarm.oci.spec import Spec


def names(spec: Spec) -> tuple[str, str] | None:
    """Host name and NIS domain name of a container with this spec, None if it shares the node's UTS namespace.

    A namespace that is joined (a pod's) has them already, one without a name of its own is a copy of the node's. Raises
    OSError.
    """
    for namespace in (spec.get("linux") or {}).get("namespaces") or []:
        if namespace.get("type") != "uts" or processes.is_own_namespace(namespace):
            continue
        if namespace.get("path"):
            from rewarm_native import process

            return process.names_in_utsns(str(namespace["path"]))
        settings = (spec.get("linux") or {}).get("sysctl") or {}
        host = settings.get("kernel.hostname") or spec.get("hostname") or os.uname().nodename
        # Docker says it by sysctl.
        return str(host), str(settings.get("kernel.domainname") or spec.get("domainname") or _node_domain())
    return None


def _node_domain() -> str:
    with open("/proc/sys/kernel/domainname", encoding="utf-8", errors="surrogateescape") as file:
        return file.read().rstrip("\n")
