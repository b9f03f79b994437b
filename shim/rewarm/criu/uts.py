"""The UTS namespace of a container that is restored: CRIU gives it the names that are in the images, also one that is
there already and is joined (criu/uts_ns.c)."""

from __future__ import annotations

from pathlib import Path

from rewarm.criu import images
from rewarm.criu.encode import magic_of, nested, write_records

_NODENAME, _DOMAINNAME = 1, 2  # images/utsns.proto
_UTS_NS = 8  # images/core.proto: task_kobj_ids_entry


def rename(checkpoint: Path, host: str, domain: str) -> None:
    """Give the container's own UTS namespace these names. One that the program has made for itself keeps its own.

    Raises images.ImageError and OSError.
    """
    first = next(images.records(checkpoint / "pstree.img"), {})
    ids = next(images.records(checkpoint / f"ids-{images.number(first, 1)}.img"), {})
    path = checkpoint / f"utsns-{images.number(ids, _UTS_NS)}.img"
    if path.exists():
        names = nested(_NODENAME, _encoded(host)) + nested(_DOMAINNAME, _encoded(domain))
        write_records(path, magic_of(path), [names])


def _encoded(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")
