"""Pages that CRIU itself has to bring back, because the kernel writes to them before rewarm does.

Between CRIU's last step and the fill the threads are on their way into the stop. Until they get there the kernel may
write to their memory, and the fill would put the old content over it:

- the rseq area of each thread, with the number of its CPU, which is written when it is registered and again only when
  the thread moves (kernel/rseq.c): an old number would break programs that use it instead of locks;
- the frame of a signal that is delivered before the stop: below the stack pointer, or on the alternate stack.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from rewarm.criu import images

PAGE = 4096
# A frame has registers, extended state (AVX-512 2.7 KiB, AMX 8 KiB more) and a red zone; all signals that come before
# SIGSTOP in the kernel's order may be pending, with one frame below the other.
_FRAME = 256 << 10
# Larger alternate stacks than this have their frames at the end that is used first: the top.
_ALTERNATE = 256 << 10


def pages(directory: Path, threads: Iterable[int]) -> set[int]:
    """Addresses of such pages of one process; `threads` are its threads as the images number them.

    Raises images.ImageError, also when a thread's image is not there.
    """
    found: set[int] = set()
    for thread in threads:
        path = directory / f"core-{thread}.img"
        if not path.exists():
            raise images.ImageError(f"{path.name}: it is missing")
        for core in images.records(path):
            for info in images.messages(core, 2):
                for registers in images.messages(info, 2):
                    pointer = images.number(registers, 20)
                    found.update(_range(pointer - _FRAME, pointer + 1))
            for thread_core in images.messages(core, 5):
                for area in images.messages(thread_core, 15):
                    start = images.number(area, 1)
                    found.update(_range(start, start + max(1, images.number(area, 2))))
                for stack in images.messages(thread_core, 7):
                    top = images.number(stack, 1) + images.number(stack, 2)
                    found.update(_range(max(images.number(stack, 1), top - _ALTERNATE), top))
    return found


def _range(start: int, end: int) -> range:
    start = max(0, start)
    return range(start - start % PAGE, max(start, min(end, start + (1 << 20))), PAGE)
