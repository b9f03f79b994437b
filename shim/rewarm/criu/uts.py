"""The UTS namespace of a container that is restored: CRIU gives it the names that are in the images, also one that is
there already and is joined (criu/uts_ns.c)."""

from __future__ import annotations

from pathlib import Path

from rewarm.criu import images
from rewarm.criu.encode import magic_of, nested, write_records

_NODENAME, _DOMAINNAME = 1, 2  # images/utsns.proto


def rename(checkpoint: Path, host: str, domain: str) -> None:
    """Give the container's UTS namespace these names, in whichever image CRIU looks for them: it dumps no second one
    (criu/namespaces.c: "Can't dump nested uts namespace").

    Raises images.ImageError, also if there is none, and OSError.
    """
    names = nested(_NODENAME, _encoded(host)) + nested(_DOMAINNAME, _encoded(domain))
    found = sorted(checkpoint.glob("utsns-*.img"))
    if not found:
        raise images.ImageError("utsns-*.img: there is none, so the container's host name is not known")
    for path in found:
        write_records(path, magic_of(path), [names])


def _encoded(name: str) -> bytes:
    """What is no text comes as surrogates: bytes of uname(2), or half a character in a spec, which Go replaces, too."""
    try:
        return name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return name.encode("utf-8", "replace")
