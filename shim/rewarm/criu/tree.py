"""`pstree.img`: the processes of a dump."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rewarm.criu import images


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
