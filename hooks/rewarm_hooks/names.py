"""Names in a layer: which are allowed, and what the names that begin with `.wh.` mean.

A name is relative to the root of the container. It may hold any byte but NUL, and may not be absolute, empty or hold a
component that is empty, `.` or `..`; one leading `./` and, for a directory, one trailing `/` are dropped.
"""

from __future__ import annotations

from .errors import LayerError, shown

Parts = tuple[bytes, ...]

WHITEOUT = b".wh."
OPAQUE = b".wh..wh..opq"
_RESERVED = b".wh..wh."
_NAME_MAX = 255
_PATH_MAX = 4095  # without the final NUL; the bound also bounds the depth that hostile input can ask for


def parse(raw: bytes, *, directory: bool = False) -> Parts:
    """The components of a member's name; () is the root itself, which only a directory may name.

    Raises LayerError for a name that is not allowed. `.wh.` names are returned as they are: see `deleted_name`.
    """
    if not raw:
        raise LayerError(raw, "an empty name")
    if b"\0" in raw:
        raise LayerError(raw, "a NUL byte in the name")
    if len(raw) > _PATH_MAX:
        raise LayerError(raw, f"a name of {len(raw)} bytes; at most {_PATH_MAX} are allowed")
    if raw.startswith(b"/"):
        raise LayerError(raw, "an absolute name")
    name = raw.removeprefix(b"./")
    if directory:
        name = name.removesuffix(b"/")
        if name in (b"", b"."):
            return ()
    parts = tuple(name.split(b"/"))
    for index, part in enumerate(parts):
        last = index == len(parts) - 1
        if part in (b"", b".", b".."):
            raise LayerError(raw, f"a component {shown(part) if part else 'that is empty'} in the name")
        whiteout = part.startswith(WHITEOUT)
        if whiteout and (directory or not last):
            raise LayerError(raw, f"a directory named {shown(part)}: names that begin with .wh. mean deletions")
        if len(part) > _NAME_MAX + (len(WHITEOUT) if whiteout else 0):
            raise LayerError(raw, f"a component of {len(part)} bytes in the name; at most {_NAME_MAX} are allowed")
    return parts


def deleted_name(raw: bytes, parts: Parts) -> bytes | None:
    """The name that the last component deletes from its directory, b"" for the opaque marker, None for other names."""
    if not parts or not parts[-1].startswith(WHITEOUT):
        return None
    if parts[-1] == OPAQUE:
        return b""
    target = parts[-1].removeprefix(WHITEOUT)
    if parts[-1].startswith(_RESERVED) or target in (b"", b".", b".."):
        raise LayerError(raw, f"a whiteout of {shown(target)}")
    return target


def check_plain(name: bytes, path: bytes) -> None:
    """Refuse a file that really has a name beginning with `.wh.`: a layer could not tell it from a deletion."""
    if name.startswith(WHITEOUT):
        raise LayerError(path, "a name that begins with .wh. means a deletion in a layer; rename the file")
    if len(path) > _PATH_MAX:
        raise LayerError(path, f"a path of {len(path)} bytes; at most {_PATH_MAX} are allowed")


def joined(parts: Parts) -> bytes:
    """The name of `parts` for a message or a member; the root is `./`."""
    return b"/".join(parts) or b"./"
