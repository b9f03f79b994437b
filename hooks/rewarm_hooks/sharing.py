"""A layer among files of others: what a container's own processes could not have made there is not made for them.

Containers of one pod share a /dev/shm, and what is mounted there may be any directory of the node. The layer is of
another container, with perhaps other rights, and it is applied by root.
"""

from __future__ import annotations

import fcntl
import os
import stat

from . import member as kinds
from . import names, regular
from .errors import LayerError, failed
from .names import joined
from .plan import ENTRY

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterator

    from .names import Parts
    from .plan import Step
    from .walk import Walker

_PRIVILEGED = (b"security.", b"trusted.")


class Sharing:
    """needed: the names that the container's processes have open; those have to be as the layer has them, so that what
    stands there is replaced, and what cannot be made is an error. Of the others what exists stays, and what the
    container could not have made is passed over.

    may_own: whether a file may be of this user and group (None: of whichever group); may_make: whether something may be
    made in a directory of this status. foreign: nothing there is the container's own, to whom any name may belong: only
    what is needed is made, at the top, plain files, and that one exists is an error.
    """

    def __init__(
        self,
        needed: Container[Parts],
        may_own: Callable[[int, int | None], bool],
        may_make: Callable[[os.stat_result], bool],
        *,
        foreign: bool = False,
    ) -> None:
        self._needed = needed
        self._may_own = may_own
        self._may_make = may_make
        self._foreign = foreign
        self._given: dict[Parts, int] = {}

    def of(self, steps: list[Step], walker: Walker) -> list[Step]:
        """Those of the layer's steps that are to be taken. Raises LayerError."""
        needed = _with_links(steps, self._needed)
        if not self._foreign:
            return list(self._possible(steps, needed, walker))
        found = [step for step in steps if step.parts in needed]
        for step in found:
            self._check_foreign(step)
        return [step for step in found if _is_to_be_made(step, needed, walker)]

    def _possible(self, steps: list[Step], needed: set[Parts], walker: Walker) -> Iterator[Step]:
        passed: set[Parts] = set()
        for step in steps:
            if not _is_to_be_made(step, needed, walker):
                if not step.over_directory:
                    passed.add(step.parts)
            elif cause := self._against(step, passed, walker):
                if step.parts in needed:
                    raise LayerError(joined(step.parts), cause)
                passed.add(step.parts)
            else:
                yield step

    def _against(self, step: Step, passed: set[Parts], walker: Walker) -> str:
        """Why the container's own processes could not do this; "" if they could."""
        member = step.member
        if step.parts[:-1] in passed:
            return "its directory is not there"
        if member.kind == kinds.LINK:
            return "the file that it is a link to is not made" if names.parse(member.link) in passed else ""
        parent = None if step.fresh else os.fstat(walker.directory(step.parts[:-1]))
        gid = self._group_of(step, parent)
        if not self._may_own(member.uid, gid):
            return f"it belongs to {member.uid}:{member.gid}, which the container's user could not make it"
        if any(name.startswith(_PRIVILEGED) for name in member.xattrs):
            return "it has an xattr that the container could not give it"
        if parent is not None and not self._may_make_in(parent):
            return "the container's user may make nothing in its directory"
        if step.found is not None and not self._may_own(step.found.st_uid, None):
            return "another's file is there"
        return ""

    def _group_of(self, step: Step, parent: os.stat_result | None) -> int | None:
        """None if its directory gives it that group, and not the process (S_ISGID)."""
        member, at = step.member, step.parts[:-1]
        given = self._given.get(at) if parent is None else parent.st_gid if parent.st_mode & stat.S_ISGID else None
        if member.gid != given:
            return member.gid
        if member.kind == kinds.DIRECTORY and member.mode & stat.S_ISGID:
            self._given[step.parts] = member.gid
        return None

    def _may_make_in(self, directory: os.stat_result) -> bool:
        """Some process of the container: it may be the directory's owner, if that is not the user it starts as."""
        wanted = stat.S_IWUSR | stat.S_IXUSR
        owns = directory.st_mode & wanted == wanted and self._may_own(directory.st_uid, None)
        return owns or self._may_make(directory)

    def _check_foreign(self, step: Step) -> None:
        """Whether the container's own processes could have made this one. Raises LayerError."""
        member = step.member
        if step.what != ENTRY or member.kind not in (kinds.FILE, kinds.LINK) or len(step.parts) != 1:
            raise LayerError(joined(step.parts), "no file at the top of a directory that is not the container's own")
        if step.found is not None:
            raise LayerError(joined(step.parts), "it is there already, in a directory that is not the container's own")
        if member.kind == kinds.FILE and (
            not self._may_own(member.uid, member.gid) or member.mode & ~0o777 or member.xattrs
        ):
            raise LayerError(joined(step.parts), "it has an owner, mode or xattr that the container could not give it")


def _with_links(steps: list[Step], needed: Container[Parts]) -> set[Parts]:
    """What is needed, by all its names: a hard link to another's file would be another file than the program had."""
    first = {step.parts: names.parse(step.member.link) for step in steps if step.member.kind == kinds.LINK}
    wanted = {first.get(step.parts, step.parts) for step in steps if step.parts in needed}
    return {step.parts for step in steps if first.get(step.parts, step.parts) in wanted}


def _is_to_be_made(step: Step, needed: Container[Parts], walker: Walker) -> bool:
    """Whether a step among others' files is to be taken. Raises LayerError."""
    if step.what != ENTRY:
        raise LayerError(joined(step.parts), "it is to be deleted, and may be in use by others")
    if step.found is None:
        return True
    if step.parts not in needed:
        return False  # a directory as well: its mode is not the snapshot's to say
    try:
        left = stat.S_ISREG(step.found.st_mode) and not _is_open(step.parts, walker, step.found)
    except OSError as error:
        raise failed(joined(step.parts), "looking whether it is in use", error) from error
    if not left:
        raise LayerError(joined(step.parts), "it is there already, and in use by others")
    return True


def _is_open(parts: Parts, walker: Walker, found: os.stat_result) -> bool:
    """Whether another process has the file `found` open or mapped: such a one gets no lease (fcntl(2), F_SETLEASE).

    Kernels without IMA do not count who only reads.
    """
    fd = regular.open_regular(parts[-1], os.O_RDWR, walker.directory(parts[:-1]), known=found)
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False
