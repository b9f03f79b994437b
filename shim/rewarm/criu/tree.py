"""`pstree.img`: the processes of a dump."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rewarm.criu import images
from rewarm.criu.images import Message

_DEAD = 2  # criu/include/pstree.h: TASK_DEAD


@dataclass(frozen=True)
class Process:
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
    """Every process that CRIU gives files and memory to. Raises images.ImageError."""
    found = [images.u32(record, 1) for record in images.records(directory / "pstree.img")]
    return [pid for pid in found if not all(is_dead(core) for core in _cores(directory, pid))]


def _cores(directory: Path, pid: int) -> list[Message]:
    path = directory / f"core-{pid}.img"
    return list(images.records(path)) if path.exists() else []


def is_dead(core: Message) -> bool:
    """A process that its parent has not reaped: CRIU (restore_one_zombie) has it end at once, whatever else it says."""
    states = [images.number(task, 1) for task in images.messages(core, 3)]
    return bool(states) and all(state == _DEAD for state in states)
