"""Extended attributes: which belong to a file's content, and reading and setting them exactly.

Kept: user.*, trusted.*, security.* and POSIX ACLs. Left alone: overlayfs's own marks, and labels that an LSM or the
integrity subsystem gives (SELinux, SMACK, IMA, EVM): those come from the live container, never from a snapshot.
"""

from __future__ import annotations

import errno
import os

from .errors import LayerError, failed, shown

OVERLAY = (b"trusted.overlay.", b"user.overlay.")
_LABELS = (b"security.selinux", b"security.SMACK64", b"security.ima", b"security.evm", b"security.apparmor")
_ACLS = (b"system.posix_acl_access", b"system.posix_acl_default")
_KEPT = (b"user.", b"trusted.", b"security.")
_VALUE_MAX = 65536  # XATTR_SIZE_MAX
_NAME_MAX = 255  # XATTR_NAME_MAX


def kept(name: bytes) -> bool:
    """Whether attribute `name` is part of what a layer carries."""
    if name in _ACLS:
        return True
    return name.startswith(_KEPT) and not name.startswith(OVERLAY) and not name.startswith(_LABELS)


def check(entry: bytes, name: bytes, value: bytes) -> None:
    """Refuse an attribute of an archive that a layer of ours would not carry, or that no Linux file can have."""
    if not kept(name) or b"\0" in name or len(name) > _NAME_MAX or name in _KEPT:
        raise LayerError(entry, f"an extended attribute {shown(name)}, which a layer may not set")
    if len(value) > _VALUE_MAX:
        raise LayerError(
            entry, f"an extended attribute {shown(name)} of {len(value)} bytes; at most {_VALUE_MAX} are allowed"
        )


def place(directory_fd: int, name: bytes) -> bytes:
    """A path for the xattr calls, which know no directory descriptor; the last component is not followed by the
    callers.
    """
    return b"/proc/self/fd/%d/%s" % (directory_fd, name)


def read(where: int | bytes) -> dict[bytes, bytes]:
    """Every extended attribute of a descriptor, or of a path that is not followed; {} where there is no support for
    them.
    """
    follow = isinstance(where, int)
    try:
        names = os.listxattr(where, follow_symlinks=follow)
    except OSError as error:
        if error.errno == errno.ENOTSUP:
            return {}
        raise
    found: dict[bytes, bytes] = {}
    for name in sorted(os.fsencode(name) for name in names):
        found[name] = os.getxattr(where, name, follow_symlinks=follow)
    return found


def carried(found: dict[bytes, bytes]) -> dict[bytes, bytes]:
    """Those of the attributes that a layer carries."""
    return {name: value for name, value in found.items() if kept(name)}


def write(entry: bytes, where: int | bytes, wanted: dict[bytes, bytes]) -> None:
    """Give a file exactly the attributes `wanted`, among those that a layer carries: what is too much is removed.

    Comes after the change of owner and after the last write, both of which drop security.capability. Raises LayerError.
    """
    follow = isinstance(where, int)
    try:
        present = read(where)
        for name in present:
            if kept(name) and name not in wanted:
                os.removexattr(where, name, follow_symlinks=follow)
    except OSError as error:
        raise failed(entry, "reading its extended attributes", error) from error
    for name, value in wanted.items():
        if present.get(name) == value:
            continue
        try:
            os.setxattr(where, name, value, follow_symlinks=follow)
        except OSError as error:
            raise failed(entry, f"setting its extended attribute {shown(name)}", error) from error
