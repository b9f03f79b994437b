"""Find a container by its id under every runc root of the node."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator

from rewarm.errors import OciError
from rewarm.oci import runc


def find(container_id: str, roots: Iterable[str]) -> runc.Container:
    """The one container whose id is, or begins with, `container_id` (as engines print them short).

    `roots` are globs of runc roots. Raises OciError when there is none, or several.
    """
    if not container_id or "/" in container_id or container_id in (".", ".."):
        raise OciError("find container", repr(container_id[:80]), "it is not a container id", "see `ctr containers ls`")
    searched = _searched(roots)
    exact = [(root, container_id) for root in searched if _known(root, container_id)]
    found = exact or [(root, name) for root in searched for name in _beginning(root, container_id)]
    if not found:
        where = ", ".join(searched) or "no runc root exists"
        raise OciError(
            "find container",
            container_id,
            f"no such container ({where})",
            "give its runc root with --root, or add it to `runtime_roots`",
        )
    if len(found) > 1:
        listed = ", ".join(f"{name} under {root}" for root, name in found[:8])
        raise OciError("find container", container_id, f"there are {len(found)}: {listed}", "say which with --root")
    return runc.load(*found[0])


def every(roots: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Root and id of every container under `roots`, globs of runc roots."""
    for root in _searched(roots):
        yield from ((root, name) for name in _beginning(root, ""))


def _searched(roots: Iterable[str]) -> list[str]:
    return sorted({os.path.realpath(path) for pattern in roots for path in glob.glob(pattern)})


def _known(root: str, name: str) -> bool:
    return os.path.isfile(os.path.join(root, name, "state.json"))


def _beginning(root: str, prefix: str) -> list[str]:
    return sorted(name for name in os.listdir(root) if name.startswith(prefix) and _known(root, name))
