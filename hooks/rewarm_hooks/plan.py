"""What applying a layer would do to a root filesystem, worked out and checked before anything is touched.

The rules, each with a LayerError that names the entry: a parent directory is made by an earlier entry or is a real
directory of the root filesystem (never a link, never a mount); a name is used once, be it for a file or for its
deletion; a hard link names an earlier regular file of the same layer, so it can reach nothing else; there are no
device nodes.
"""

from __future__ import annotations

import os
import stat

from . import member as kinds
from . import names
from .errors import LayerError, shown
from .member import Member
from .names import Parts, joined
from .walk import Walker

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

ENTRY, WHITEOUT, OPAQUE = "entry", "whiteout", "opaque"


class Step:
    """One change: what: ENTRY (make `member`), WHITEOUT (delete `parts`) or OPAQUE (empty the directory `parts`).

    found: the status of what stands there now, None for nothing.  fresh: its directory will be new or emptied, so
    whatever stands there now (if anything) is gone by then.
    """

    __slots__ = ("found", "fresh", "member", "parts", "what")

    def __init__(self, what: str, parts: Parts, member: Member, found: os.stat_result | None, fresh: bool) -> None:
        self.what = what
        self.parts = parts
        self.member = member
        self.found = found
        self.fresh = fresh

    @property
    def over_directory(self) -> bool:
        """Whether a directory stands there now that the step meets (it is not gone by then)."""
        return not self.fresh and self.found is not None and stat.S_ISDIR(self.found.st_mode)


class _Planner:
    def __init__(self, walker: Walker, opaque: set[Parts], devices: bool) -> None:
        self._walker = walker
        self._opaque = opaque
        self._devices = devices
        self._used: dict[Parts, Step] = {}
        self._existing: set[Parts] = {()}  # directories of the root filesystem that stay and keep their content
        self._entered: set[Parts] = (
            set()
        )  # directories that something was put into: no later entry may change what they are
        self._new: set[Parts] = set()  # directories that are empty by the time anything is put into them

    def entry(self, member: Member) -> Step:
        parts = member.parts
        step = self._step(ENTRY, parts, member)
        if member.kind == kinds.DIRECTORY:
            if step.over_directory and parts not in self._opaque:
                self._existing.add(parts)
            else:
                self._existing.discard(parts)
                self._new.add(parts)
        elif member.kind == kinds.LINK:
            self._check_link(member)
        elif member.kind in (kinds.CHAR, kinds.BLOCK_DEVICE) and not self._devices:
            raise LayerError(member.name, "a device node, which a layer may not make")
        return step

    def whiteout(self, member: Member, target: bytes) -> Step:
        self._check_marker(member)
        return self._step(WHITEOUT, (*member.parts[:-1], target), member)

    def opaque(self, member: Member) -> Step:
        self._check_marker(member)
        parts = member.parts[:-1]
        owner = self._used.get(parts)
        if owner is None or owner.member.kind != kinds.DIRECTORY:
            raise LayerError(member.name, "an opaque marker in a directory that no earlier entry makes")
        self._claim(member.parts, step := Step(OPAQUE, parts, member, owner.found, owner.fresh))
        return step

    def _step(self, what: str, parts: Parts, member: Member) -> Step:
        if parts in self._entered:
            raise LayerError(member.name, "an entry for a directory, or a second one, after entries for what is in it")
        fresh = bool(parts) and self._directory(parts[:-1], member)
        found = None if fresh else self._walker.find(parts, member.name)
        step = Step(what, parts, member, found, fresh)
        self._claim(parts, step)
        return step

    def _claim(self, parts: Parts, step: Step) -> None:
        if parts in self._used:
            raise LayerError(step.member.name, "a second entry for one name")
        self._used[parts] = step

    def _directory(self, parts: Parts, member: Member) -> bool:
        """Check the directory that `member` goes into; True if it will be new or emptied."""
        self._entered.add(parts)
        if parts in self._new:
            return True
        if parts in self._existing:
            return False
        for depth in range(1, len(parts) + 1):
            upto = parts[:depth]
            if upto in self._new or upto in self._existing:
                continue
            owner = self._used.get(upto)
            if owner is not None:
                gone = "deletes" if owner.what == WHITEOUT else "makes a file of"
                raise LayerError(member.name, f"an entry in {shown(joined(upto))}, which the layer {gone}")
            if upto[:-1] in self._new:
                raise LayerError(
                    member.name, f"an entry in {shown(joined(upto))}, which the layer does not make before it"
                )
            self._walker.directory(upto, member.name)
            self._existing.add(upto)
            self._entered.add(upto)
        return False

    def _check_link(self, member: Member) -> None:
        target = names.parse(member.link)
        owner = self._used.get(target)
        if (
            owner is None
            or owner.what != ENTRY
            or owner.member.kind not in (kinds.FILE, kinds.LINK)
            or target == member.parts
        ):
            raise LayerError(
                member.name, f"a hard link to {shown(member.link)}, which is no earlier regular file of the layer"
            )

    def _check_marker(self, member: Member) -> None:
        if member.kind != kinds.FILE or member.size:
            raise LayerError(member.name, "a whiteout or opaque marker that is not an empty file")


def make(members: Iterable[Member], walker: Walker, *, devices: bool) -> list[Step]:
    """The steps of a layer against the tree of `walker`, in the order of the archive. Nothing is changed. Raises
    LayerError.

    devices: allow device nodes (for an undo layer, which rewarm itself wrote).
    """
    found = list(members)
    deletions = [names.deleted_name(member.name, member.parts) for member in found]
    opaque = {member.parts[:-1] for member, target in zip(found, deletions, strict=True) if target == b""}
    planner = _Planner(walker, opaque, devices)
    steps: list[Step] = []
    for member, target in zip(found, deletions, strict=True):
        if target is None:
            steps.append(planner.entry(member))
        elif target:
            steps.append(planner.whiteout(member, target))
        else:
            steps.append(planner.opaque(member))
    return steps
