"""Whom a container's program runs as, and what that one may do with files, by the node's numbers."""

from __future__ import annotations

import os
import stat
from typing import Any, NamedTuple

from rewarm.oci.spec import Spec, has_users


class User(NamedTuple):
    """Whom the program runs as."""

    uid: int
    gid: int
    groups: frozenset[int]
    privileged: bool

    def may_make(self, directory: os.stat_result) -> bool:
        """Whether it may make something in a directory, by mode."""
        if self.privileged:
            return True
        if directory.st_uid == self.uid:
            wanted = stat.S_IWUSR | stat.S_IXUSR
        elif directory.st_gid in self.groups:
            wanted = stat.S_IWGRP | stat.S_IXGRP
        else:
            wanted = stat.S_IWOTH | stat.S_IXOTH
        return directory.st_mode & wanted == wanted


def of(spec: Spec) -> User:
    """What a user namespace gives its root counts for nothing here. Another user than root has only ambient
    capabilities, whatever stands in the spec: containerd writes root's for all users."""
    uid, gid = owner(spec)
    process = spec.get("process") or {}
    user = process.get("user") or {}
    mappings = _mappings(spec, "gidMappings")
    groups = frozenset([gid, *(_outside(int(one), mappings) for one in user.get("additionalGids") or [])])
    held = (process.get("capabilities") or {}).get("ambient" if int(user.get("uid") or 0) else "effective") or []
    return User(uid, gid, groups, "CAP_DAC_OVERRIDE" in held and not has_users(spec))


def owner(spec: Spec) -> tuple[int, int]:
    """The program's user and group."""
    user = (spec.get("process") or {}).get("user") or {}
    return (
        _outside(int(user.get("uid") or 0), _mappings(spec, "uidMappings")),
        _outside(int(user.get("gid") or 0), _mappings(spec, "gidMappings")),
    )


def inside(spec: Spec, uid: int, gid: int) -> tuple[int, int] | None:
    """What a user and group of the node are in the container; None if there they are nobody that has a number, or the
    spec does not tell (a user namespace that it joins)."""
    if not has_users(spec):
        return uid, gid
    user, group = _inside(uid, _mappings(spec, "uidMappings")), _inside(gid, _mappings(spec, "gidMappings"))
    return None if user is None or group is None else (user, group)


def _mappings(spec: Spec, kind: str) -> list[dict[str, Any]]:
    return (spec.get("linux") or {}).get(kind) or []


def _outside(number: int, mappings: list[dict[str, Any]]) -> int:
    for one in mappings:
        if 0 <= number - one["containerID"] < one["size"]:
            return int(one["hostID"] + number - one["containerID"])
    return number


def _inside(number: int, mappings: list[dict[str, Any]]) -> int | None:
    for one in mappings:
        if 0 <= number - one["hostID"] < one["size"]:
            return int(one["containerID"] + number - one["hostID"])
    return None
