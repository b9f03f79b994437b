"""The device memory of a container held in its processes' own memory, for as long as CRIU needs that.

    lock all -> checkpoint all -> … CRIU … -> restore and unlock all

Everything that can be refused is refused by `look`, before anything is paused.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from types import TracebackType
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
    from .room import Needed


T = TypeVar("T")

_RETRY = 5.0
_PATIENCE = 60.0
"""Seconds in which a call that was interrupted comes to its end: 40 GB take 20."""


class Users(NamedTuple):
    """The processes of a container that use CUDA, the GPUs that it has, and what answers questions about both."""

    driver: Driver
    nvml: Nvml
    gpus: ContainerGpus
    contexts: tuple[Context, ...]


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
    return gpus, Users(driver, nvml, gpus, tuple(found)) if found else None


class Guard(NamedTuple):
    """Whoever lets the processes go on if this process cannot: told when all are locked, what is taken of which GPU
    (before that where NVML says it, else after), and when they are released. `frozen` says whether they cannot run now:
    the driver would wait then.
    """

    locked: Callable[[], None]
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

    @property
    def pids(self) -> tuple[int, ...]:
        """Host pids of the processes whose device memory is held."""
        return () if self._users is None else tuple(context.pid for context in self._users.contexts)

    def __enter__(self) -> Hold:
        if self._users is None:
            return self
        from . import actions, room, threads
        from .advise import HugePages

        driver, nvml, _, found = self._users
        uuids = [device.gpu.uuid for device in self._gpus.devices]
        try:
            with HugePages(self._ask(lambda: threads.of_driver(driver, self.pids))):
                self._began = time.monotonic()
                actions.lock(driver, found, self._timeout)
                self._guard.locked()
                before = self._ask(lambda: [nvml.free_bytes(uuid) for uuid in uuids])
                told = self._ask(lambda: nvml.used_bytes(uuids, self.pids))
                if told is not None:
                    self._take(told)
                actions.checkpoint(driver, found, self._limit)
            if told is None:
                # What others take or free meanwhile counts as well.
                after = self._ask(lambda: [nvml.free_bytes(uuid) for uuid in uuids])
                freed = [max(0, free - was) for was, free in zip(before, after, strict=True)]
                self._take({uuid: {room.ALL: size} for uuid, size in zip(uuids, freed, strict=True)})
        except BaseException as error:
            try:
                room.wait(driver, nvml, found, self._needed, self._limit)
                actions.go_on(driver, found, _PATIENCE, _PATIENCE)
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

    def _take(self, needed: Needed) -> None:
        self._needed = needed
        self.used = tuple(sum(sizes.values()) for sizes in needed.values())
        self._guard.taken(needed)

    def _ask(self, question: Callable[[], T]) -> T:
        """The driver's or NVML's answer. Raises GpuError if there is none in time: others wait."""
        try:
            return aside.run(question, self._limit)
        except TimeoutError as error:
            raise GpuError("ask the driver about", "the GPUs", str(error), "look for Xid lines in `dmesg`") from None

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
        from . import actions, room

        driver, nvml, _, found = self._users
        room.wait(driver, nvml, found, self._needed, self._limit)
        actions.go_on(driver, found, _RETRY, self._limit)
        self._resumed = True
        self.seconds = time.monotonic() - self._began
        self._guard.released()

    def forget(self) -> None:
        """The processes are killed: there is nothing to give back."""
        self._resumed = True
        if self._users is not None:
            self.seconds = time.monotonic() - self._began
