"""Device memory taken out of processes before the driver's checkpoint, and put back: the pieces that the device memory
library serves there (served.py). The memory stays on the GPU, behind descriptors; what is taken is its place.

    stop -> lock and unlock -> export and unmap -> lock -> go on      (then the driver's checkpoint)
    locked -> stop -> unlock -> map -> go on                          (after the driver's restore)

The library needs CUDA calls, so for that moment the processes are not locked, but stopped (awake.py). A process goes on
if it is locked or has all of its memory, and never otherwise.

A thread that the lock finds in a call, or that waits in one for the unlock, has its part in the driver's lock from then
on: stopped, it would keep the second lock from ever being had (seen with threads that do nothing but call). So the
first lock is tried with all of them stopped: it is had, at once, if none is in a call and the GPU is done. If not, they
go on for a moment, and it is tried again.
"""

from __future__ import annotations

import os
import random
import resource
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from rewarm import processes
from rewarm.errors import GpuError
from rewarm_native import cuda
from rewarm_native.cuda import CudaError, Driver

from . import actions, awake, served
from .contexts import Context
from .descriptors import Places
from .pieces import Span
from .served import Listed, Served

_SPARE = 64
"""Descriptors beside those of the pieces."""
_FIRST_TRY, _LAST_TRY = 0.005, 0.2
"""Seconds for which a GPU is waited for with the program stopped."""
_STOP = 5.0
"""Seconds in which a process stops, unless it hangs in the kernel."""


def look(contexts: Sequence[Context], limit: float) -> dict[int, int]:
    """Which of the processes have memory that the library serves, and how many bytes. Raises GpuError."""
    found = {}
    for context in contexts:
        library = served.find(context.pid, limit)
        if library is not None:
            try:
                size, count = library.hello()
                lost = count == 0 and library.imported()
            finally:
                library.close()
            if count or lost:
                found[context.pid] = size
    return found


def check_own(contexts: Sequence[Context], limit: float) -> None:
    """The memory of these may go the driver's way. That which a restore has brought may not: the driver takes it, and
    never gives it back (NOT_SUPPORTED, driver 580). Raises GpuError."""
    for context in contexts:
        library = _find(context.pid, limit)
        try:
            if library.imported():
                cause, next_step = "some thread of it is in a CUDA call all the time", "capture it when it does less"
                if loose := _loose(library, library.list()):
                    cause = (
                        f"{loose} bytes of it are not mapped, in more than one place, or for more than their own GPU"
                    )
                    next_step = "capture a container that was started cold"
                raise GpuError(
                    "take GPU memory of", str(context), f"{cause}, and its memory is that of a restore", next_step
                )
        finally:
            library.close()


def take(
    driver: Driver,
    contexts: Sequence[Context],
    timeout: float,
    limit: float,
    took: Callable[[int, Listed, int], None],
) -> list[Context]:
    """Take the memory of processes, which are locked afterwards.

    Returns those of which nothing was taken, since some thread was in a CUDA call whenever it was tried, or memory of a
    restore was not mapped: they are not locked, and their memory can go the driver's way (`check_own`).

    `took` is told pid (host), piece and descriptor of each before the piece is unmapped, and has to close that in the
    end; `timeout` are the seconds for which it is tried, `limit` those for everything the library does. Raises
    GpuError; what was taken by then is to be put back.
    """
    missed = []
    for context in contexts:
        end = time.monotonic() + timeout
        patience = _FIRST_TRY
        while not _take_now(driver, context, patience, limit, took):
            awake.go_on([context.pid])
            if time.monotonic() > end:
                missed.append(context)
                break
            # Not in step with what the program does.
            time.sleep(random.uniform(0.001, 0.02))
            patience = min(_LAST_TRY, patience * 1.5)
    return missed


def _take_now(
    driver: Driver,
    context: Context,
    patience: float,
    limit: float,
    took: Callable[[int, Listed, int], None],
) -> bool:
    """Whether it could be done: if not, the process is stopped, and nothing else has changed. `patience`: seconds for
    the GPU to finish."""
    pid = context.pid
    if not _lives(context):
        raise GpuError("take GPU memory of", str(context), "it has ended", "look into the container's log")
    awake.stop([pid], _STOP)
    with awake.Awake(driver, [pid]):
        try:
            driver.lock(pid, max(1, int(patience * 1000)))
        except CudaError as error:
            if error.code == cuda.NOT_READY:
                return False
            raise _failed(error, pid) from None
        _call(driver.unlock, pid)
        library = _find(pid, limit)
        try:
            try:
                found = library.list()
            except served.Busy:
                return False
            if library.changing or _loose(library, found):
                return False
            _take(library, found, took)
        finally:
            library.close()
        _call(lambda pid: driver.lock(pid, int(limit * 1000)), pid)
    awake.go_on([pid])
    return True


def _take(library: Served, found: Sequence[Listed], took: Callable[[int, Listed, int], None]) -> None:
    spans = [piece.span for piece in found]
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if len(spans) + len(os.listdir("/proc/self/fd")) + _SPARE > most:
        cause = f"it has {len(spans)} pieces of device memory, and rewarm may have {most} descriptors"
        raise GpuError("take GPU memory of", _name(library.pid), cause, "raise the limit of open files for rewarm")
    library.own([piece.span for piece in found if piece.imported])
    library.export(spans, lambda index, fd: took(library.pid, found[index], fd))
    library.unmap(spans)


def _loose(library: Served, found: Sequence[Listed]) -> int:
    """Bytes that a restore has brought, and that cannot be taken out: the program has unmapped them, for a moment or
    for good, or has them in a way that is the driver's."""
    return library.imported() - sum(piece.span.size for piece in found if piece.imported)


def put(driver: Driver, contexts: Sequence[Context], places: Places, limit: float, patience: float = 0.0) -> None:
    """Have the driver give back what it has of processes, map the rest, and let them go on, whatever state they are in.

    What is there already stays, and who runs already with all of it is left alone. `patience` as in `actions.go_on`,
    for those of which nothing was taken: theirs may have gone the driver's way. Raises the first GpuError, after all
    were tried; the process that it names stays stopped, since it may not have all of its memory.
    """
    failures = []
    for context in contexts:
        if context.pid in places and _lives(context):
            try:
                _put(driver, context, places[context.pid], limit, patience)
            except GpuError as error:
                if _lives(context):
                    failures.append(error)
    if failures:
        raise failures[0]


def _put(driver: Driver, context: Context, places: Sequence[tuple[Span, int]], limit: float, patience: float) -> None:
    # The driver answers for a process by a thread of that: while it is stopped, only inside Awake.
    pid = context.pid
    if not places:
        _check_whole(driver, pid, limit)
        # Nothing was taken. What may be on its way would be kept by the library's socket: reading it ends that.
        awake.go_on([pid])
        actions.go_on(driver, [context], patience, limit)
        with suppress(GpuError):
            look([context], limit)
        return
    if not _is_stopped(pid):
        if served.find(pid, limit) is None:
            # By execve(2), or since it has closed all that it had open: nobody could put anything anywhere.
            actions.go_on(driver, [context])
            return
        if _call(driver.state, pid) == cuda.RUNNING and not _away(pid, limit):
            return
    awake.stop([pid], _STOP)
    with awake.Awake(driver, [pid]):
        if _call(driver.state, pid) == cuda.CHECKPOINTED:
            _call(driver.restore, pid)
        fill(driver, pid, places, limit)
    awake.go_on([pid])


def _check_whole(driver: Driver, pid: int, limit: float) -> None:
    """Raises GpuError for a stopped process that lacks a piece of which nobody has a descriptor: neither it nor its
    copy could be put to where it was."""
    lost = False
    if _is_stopped(pid):
        # Whom a debugger keeps from answering goes on, as one of which nothing was touched: that is nearly certain.
        with suppress(GpuError), awake.Awake(driver, [pid]):
            lost = _call(driver.state, pid) == cuda.RUNNING and _away(pid, limit)
    if lost:
        raise GpuError("give back GPU memory of", _name(pid), "a piece of it is lost", "restart the container")


def fill(driver: Driver, pid: int, places: Sequence[tuple[Span, int]], limit: float, *, whole: bool = False) -> None:
    """Unlock one process of which only what it takes runs (awake.Awake), and map its memory.

    What is not the process's any more is passed over, unless all has to be there (`whole`). Raises GpuError, also if
    any memory is missing afterwards.
    """
    if _call(driver.state, pid) == cuda.LOCKED:
        _call(driver.unlock, pid)
    library = _find(pid, limit)
    try:
        fds = dict(places)
        listed = library.list()
        if whole and sorted(fds) != [piece.span for piece in listed]:
            cause = (
                f"its program has {len(listed)} pieces of device memory, and they are not the {len(fds)} that are there"
            )
            raise GpuError("map GPU memory of", _name(pid), cause, "capture the container again")
        away = [piece.span for piece in listed if piece.away and piece.span in fds]
        library.map(away, [fds[span] for span in away])
        if missing := [piece.span for piece in library.list() if piece.away]:
            cause = f"{len(missing)} pieces of it are not there"
            raise GpuError("map GPU memory of", _name(pid), cause, "restart the container")
    finally:
        library.close()


def go_on(driver: Driver, contexts: Sequence[Context], places: Places, patience: float, limit: float) -> None:
    """`actions.go_on` for processes of which those of `places` have had their memory taken."""
    others = [one for one in contexts if one.pid not in places]
    try:
        actions.go_on(driver, others, patience, limit)
    finally:
        put(driver, contexts, places, limit, patience)


def _away(pid: int, limit: float) -> bool:
    """Whether any memory of a process that runs is missing."""
    library = _find(pid, limit)
    try:
        return any(piece.away for piece in library.list())
    finally:
        library.close()


def _find(pid: int, limit: float) -> Served:
    found = served.find(pid, limit)
    if found is None:
        raise GpuError("reach the device memory library in", _name(pid), "its thread is gone", "capture it again")
    return found


def _lives(context: Context) -> bool:
    return processes.start_time(context.pid) == context.start_time


def _is_stopped(pid: int) -> bool:
    found = processes.stat(pid)
    return found is not None and found.state in "Tt"


def _name(pid: int) -> str:
    return f"process {pid} ({processes.command(pid)})"


def _call(call: Callable[[int], object], pid: int) -> object:
    try:
        return call(pid)
    except CudaError as error:
        raise _failed(error, pid) from None


def _failed(error: CudaError, pid: int) -> GpuError:
    cause = f"{error.call}: {error.name}"
    return GpuError("take or give back GPU memory of", _name(pid), cause, "look at `dmesg`")
