"""What a container is called: a new replica is not the one that was captured."""

from __future__ import annotations

import os

from rewarm.oci.spec import Spec

_NONE = "(none)"
"""The kernel's own word for no NIS domain."""


def names(spec: Spec) -> tuple[str, str] | None:
    """Host name and NIS domain name of a container with this spec, None if it shares the node's UTS namespace.

    A namespace that is joined (a pod's) has them already, one without a name of its own is a copy of the node's. Raises
    OSError.
    """
    for namespace in (spec.get("linux") or {}).get("namespaces") or []:
        if namespace.get("type") != "uts":
            continue
        if namespace.get("path"):
            from rewarm_native import process

            return process.names_in_utsns(str(namespace["path"]))
        return str(spec.get("hostname") or os.uname().nodename), str(spec.get("domainname") or _NONE)
    return None
