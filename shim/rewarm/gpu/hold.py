"""The device memory of a container held for as long as CRIU needs that: in its processes' own memory, or, where the
device memory library serves it, on the GPU behind descriptors (taking.py).

    take what can be taken -> lock all -> checkpoint all -> … CRIU … -> restore all, put back, unlock

Everything that can be refused is refused by `look`, before anything is paused.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from rewarm import aside
from rewarm.errors import GpuError, RewarmError

from . import container
from .container import ContainerGpus

# What calls the driver is imported where a process uses it, and nowhere else.
if TYPE_CHECKING:
    from rewarm_native.cuda import Driver

    from .contexts import Context
    from .nvml import Nvml
    from .pieces import Span
    from .room import Needed
    from .served import Listed


T = TypeVar("T")

_LIBRARY = 30.0
"""Seconds in which the device memory library does what it is asked: thousands of pieces take less than one."""
_TRIES = 5.0
"""Seconds for which a moment is looked for in which no thread is in a CUDA call."""
_RETRY = 5.0
_PATIENCE = 60.0
"""Seconds in which a call that was interrupted comes to its end: 40 GB take 20."""


class Users(NamedTuple):
    """The processes of a container that use CUDA, the GPUs that it has, and what answers questions about both.

    `served`: bytes of device memory that the library serves, by host pid, of those that have any.
    """

    driver: Driver
    nvml: Nvml
    gpus: ContainerGpus
    contexts: tuple[Context, ...]
    served: Mapping[int, int] = MappingProxyType({})


def look(
    spec: dict[str, Any], tree: Collection[int], pids: Collection[int], low_level: str, libcuda: str
) -> tuple[ContainerGpus, Users | None]:
    """The GPUs of a container with this spec, and who of its processes `pids` (host) uses them; None if nobody does.
    `tree` are those below its init, which a snapshot holds.

    Raises GpuError or Unfit for what the driver cannot checkpoint, or if there is no driver that can.
    """
    gpus = container.of_spec(spec, low_level, libcuda)
    if not gpus.devices:
        return gpus, None
    from . import contexts, library

    driver = library.load(libcuda)
    found = contexts.find(driver, pids)
    nvml = container.nvml(libcuda)
    contexts.check_inside(found, tree)
    contexts.check(found, pids, nvml.mps_clients(tuple(device.gpu.uuid for device in gpus.devices)))
    if not found:
        return gpus, None
    from . import taking

    return gpus, Users(driver, nvml, gpus, tuple(found), taking.look(found, _LIBRARY))


class Guard(NamedTuple):
    """Whoever lets the processes go on if this process cannot: told when all are locked, what is taken of which GPU
    (before that where NVML says it, else after), and when they are released. `frozen` says whether they cannot run now:
    the driver would wait then. `taking`: that these processes (host pids) are about to be stopped and their pieces
    taken; `piece`: one of a process, before it is taken, with the descriptor of its memory.
    """

    locked: Callable[[], None]
    taking: Callable[[Collection[int]], None]
    piece: Callable[[int, Span, int], None]
    taken: Callable[[Needed], None]
    released: Callable[[], None]
    frozen: Callable[[], bool]


class Hold:
    """Context manager: held inside, running again after. `seconds` is how long CUDA calls were blocked.

    `used` are the bytes that the processes had on each GPU of the container.
    """

    def __init__(self, gpus: ContainerGpus, users: Users | None, timeout: float, limit: float, guard: Guard) -> None:
        """`gpus` and `users` are what `look` gave; `timeout`: seconds in which the GPUs have to finish what they are
        doing for the processes; `limit`: those in which the driver has to move the memory.
        """
        self._gpus = gpus
        self._users = users
        self._timeout = timeout
        self._limit = limit
        self._guard = guard
        self._began = 0.0
        self._resumed = users is None
        self._needed: Needed = {}
        self.seconds = 0.0
        self.used: tuple[int, ...] = ()
        self.needed: tuple[int, ...] = ()
        """What of that has to have room to come back, since the driver has taken it off."""
        self.taken: dict[int, list[tuple[Listed, int]]] = {}
        """By host pid: pieces of device memory that were taken, and the descriptors of their memory."""

    @property
    def pids(self) -> tuple[int, ...]:
        """Host pids of the processes whose device memory is held."""
        return () if self._users is None else tuple(context.pid for context in self._users.contexts)

    def __enter__(self) -> Hold:
        if self._users is None:
            return self
        from . import actions, room, threads
        from .advise import HugePages

        driver, nvml, _, found, served = self._users
        uuids = [device.gpu.uuid for device in self._gpus.devices]
        # Of the others little is left to the driver; and a thread has one tracer at a time.
        advised = [pid for pid in self.pids if pid not in served]
        try:
            with HugePages(self._ask(lambda: threads.of_driver(driver, advised))):
                self._began = time.monotonic()
                before = self._ask(lambda: [nvml.free_bytes(uuid) for uuid in uuids])
                told = self._ask(lambda: nvml.used_bytes(uuids, self.pids))
                missed = self._take_served(driver, [context for context in found if context.pid in served])
                rest = [context for context in found if context.pid not in served or context in missed]
                actions.lock(driver, rest, self._timeout)
                self._guard.locked()
                if told is not None:
                    self._take(told)
                actions.checkpoint(driver, found, self._limit)
            imported = self._taken_bytes(imported=True)
            if told is None or imported:
                # What others take or free meanwhile counts as well.
                after = self._ask(lambda: [nvml.free_bytes(uuid) for uuid in uuids])
                freed = {uuid: max(0, free - was) for uuid, was, free in zip(uuids, before, after, strict=True)}
                if told is None:
                    taken = self._taken_bytes()
                    sizes = {uuid: size + sum(taken.get(uuid, {}).values()) for uuid, size in freed.items()}
                    self._take({uuid: {room.ALL: size} for uuid, size in sizes.items()})
                else:
                    self._take(room.with_imported(told, self._taken_bytes(), imported, freed))
        except BaseException as error:
            try:
                room.wait(driver, nvml, found, self._needed, self._limit)
                self._put_back(_PATIENCE, _PATIENCE)
                # A call that was left in the driver may do its work yet, and only then is there something to undo.
                if not isinstance(error.__cause__, TimeoutError):
                    self._guard.released()
            except GpuError as second:
                # The first is what went wrong; what it leads to is what there is to do.
                if isinstance(error, RewarmError):
                    error.next_step = f"{second}; {error.next_step}"
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        if not self._guard.frozen():  # else whoever thaws it is to do this, too
            self.resume()

    def _take_served(self, driver: Driver, users: list[Context]) -> list[Context]:
        """Take what the library serves; those of which it could not be done."""
        from . import descriptors, taking

        if not users:
            return []
        descriptors.allow()
        self.taken = {context.pid: [] for context in users}
        self._guard.taking(self.taken)
        longest = min(self._timeout, _TRIES)
        missed = self._ask(lambda: taking.take(driver, users, longest, _LIBRARY, self._took))
        self._ask(lambda: taking.check_own(missed, _LIBRARY))
        return missed

    def _take(self, used: Needed) -> None:
        """Note what the processes had; what was taken needs no room to come back, since it is there."""
        taken = self._taken_bytes()
        # What was allocated since it was asked, or what NVML leaves out, has to have room on a restore as well.
        self.used = tuple(max(sum(sizes.values()), sum(taken.get(uuid, {}).values())) for uuid, sizes in used.items())
        self._needed = {
            uuid: {pid: max(0, size - _part(taken.get(uuid, {}), pid)) for pid, size in sizes.items()}
            for uuid, sizes in used.items()
        }
        self.needed = tuple(sum(sizes.values()) for sizes in self._needed.values())
        self._guard.taken(self._needed)

    def _took(self, pid: int, piece: Listed, fd: int) -> None:
        self.taken[pid].append((piece, fd))
        if piece.uuid not in self._uuids():
            raise GpuError("take GPU memory of", f"process {pid}", "it is on a GPU that is not the container's")
        self._guard.piece(pid, piece.span, fd)

    def _uuids(self) -> dict[bytes, str]:
        return {container.uuid_bytes(device.gpu.uuid): device.gpu.uuid for device in self._gpus.devices}

    def _taken_bytes(self, *, imported: bool = False) -> dict[str, dict[int, int]]:
        """By the GPU's UUID and the host pid; or of what was imported alone."""
        sizes: dict[str, dict[int, int]] = {}
        uuids = self._uuids()
        for pid, pieces in self.taken.items():
            for piece, _ in pieces:
                if imported and not piece.imported:
                    continue
                of_gpu = sizes.setdefault(uuids[piece.uuid], {})
                of_gpu[pid] = of_gpu.get(pid, 0) + piece.span.size
        return sizes

    def _put_back(self, patience: float, limit: float) -> None:
        """Let all go on, with the memory that was taken."""
        from . import descriptors, taking

        assert self._users is not None
        places = {pid: [(piece.span, fd) for piece, fd in pieces] for pid, pieces in self.taken.items()}
        users = self._users
        # It waits for what runs in the processes, which may hang; the helper goes on trying then.
        self._ask(lambda: taking.go_on(users.driver, users.contexts, places, patience, limit), limit + _LIBRARY)
        descriptors.close(places)
        self.taken = {}

    def _ask(self, question: Callable[[], T], limit: float | None = None) -> T:
        """The driver's or NVML's answer. Raises GpuError if there is none in time: others wait."""
        try:
            return aside.run(question, self._limit if limit is None else limit)
        except TimeoutError as error:
            # Whoever undoes this has to know that a thread may still be at work.
            raise GpuError("ask the driver about", "the GPUs", str(error), "look for Xid lines in `dmesg`") from error

    def check(self, pids: Collection[int]) -> None:
        """All of the container's processes are at rest now: none may have a device, and those whose memory is held are
        there. Raises GpuError."""
        if self._gpus.devices:
            from . import contexts

            contexts.check_alive(() if self._users is None else self._users.contexts)
            contexts.check_released(pids)

    def resume(self) -> None:
        """Give the device memory back and let CUDA calls go on; nothing happens the second time. Raises GpuError, also
        if others have taken the room on a GPU and keep it: the driver does not undo a restore for which there is none.
        """
        if self._resumed or self._users is None:
            return
        from . import room

        users = self._users
        room.wait(users.driver, users.nvml, users.contexts, self._needed, self._limit)
        self._put_back(_RETRY, self._limit)
        self._resumed = True
        self.seconds = time.monotonic() - self._began
        self._guard.released()

    def places(self) -> list[tuple[int, int, Span, int]]:
        """What was taken: host pid, index of the GPU among the container's, piece, descriptor."""
        index = {uuid: at for at, uuid in enumerate(self._uuids())}
        return [(pid, index[one.uuid], one.span, fd) for pid, found in self.taken.items() for one, fd in found]

    def forget(self) -> None:
        """The processes are killed: there is nothing to give back."""
        self._resumed = True
        if self._users is not None:
            self.seconds = time.monotonic() - self._began


def _part(taken: Mapping[int, int], pid: int) -> int:
    """What was taken of one process, or of all where NVML speaks of all together."""
    return taken.get(pid, 0) if pid else sum(taken.values())
