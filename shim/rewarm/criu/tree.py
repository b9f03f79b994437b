"""`pstree.img`: the processes of a dump."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from rewarm.criu import images
from rewarm.criu.images import Message

_DEAD = 2  # criu/include/pstree.h: TASK_DEAD


class Process(NamedTuple):
    """A process by its number in the images (that of the container's pid namespace), its parent's, its threads'."""

    pid: int
    parent: int
    threads: tuple[int, ...]


def processes(directory: Path) -> list[Process]:
    """Every process that has memory: zombies have none. Raises images.ImageError."""
    found = []
    for record in images.records(directory / "pstree.img"):
        pid = images.number(record, 1)
        if (directory / f"mm-{pid}.img").exists():
            found.append(Process(pid, images.number(record, 2), tuple(images.numbers(record, 5)) or (pid,)))
    return found


def living(directory: Path) -> list[int]:
    """Every process that CRIU gives files and memory to: it reads one record of each core image. One that says both
    counts as dead. Raises images.ImageError."""
    found = [images.u32(record, 1) for record in images.records(directory / "pstree.img")]
    return [pid for pid in found if _DEAD not in _states(next(_cores(directory, pid), {}))]


def _cores(directory: Path, pid: int) -> Iterator[Message]:
    path = directory / f"core-{pid}.img"
    return images.records(path) if path.exists() else iter(())


def _states(core: Message) -> list[int]:
    return [images.number(task, 1) for task in images.messages(core, 3)]


def is_dead(core: Message) -> bool:
    """A process that its parent has not reaped: CRIU (restore_one_zombie) has it end at once, whatever else it says."""
    states = _states(core)
    return bool(states) and all(state == _DEAD for state in states)
