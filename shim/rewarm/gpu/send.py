"""One thread's copies to the GPUs: pinned buffers in turn, and which chunks have arrived.

Python takes turns: what ten threads do for each window is time in which the restore itself, which has CRIU and the
driver to look after, does not go on. What is in the page cache as it is goes to the GPU in one call for many windows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from rewarm_native.device import Device, Lane

from .layout import Layout
from .pieces import WINDOW

_GROUP = 16
"""Chunks that are reported as arrived at a time."""

Run = tuple[int, Sequence[int]]
"""An offset in a file, and the numbers of the chunks that lie there one after the other."""


class Sender:
    """For one thread. Its methods raise CudaError, and what `claim` raises."""

    def __init__(
        self,
        devices: Sequence[Device],
        buffers: Sequence[memoryview],
        where: Layout,
        claim: Callable[[Sequence[int]], None],
        arrived: Callable[[Sequence[int]], None],
    ) -> None:
        """`buffers` are pinned. `claim` is called with chunks before they are copied, and says if they must not be;
        `arrived` with those that are there as a whole."""
        self._devices = devices
        self._buffers = buffers
        self._where = where
        self._claim = claim
        self._arrived = arrived
        self._lanes = [_lane(device, len(buffers)) for device in devices]
        self._slot = 0
        self._on_the_way: deque[Sequence[int]] = deque()
        self._there: list[int] = []
        self.size = 0
        """Bytes that were sent."""

    @property
    def buffer(self) -> memoryview:
        """That of what is sent next: nothing is on its way from it."""
        return self._buffers[self._slot]

    @property
    def takes_files(self) -> bool:
        """Whether there is `send_file`: for one GPU."""
        return len(self._lanes) == 1

    def send(self, chunks: Sequence[int], data: memoryview) -> None:
        """Begin to copy what lies in `buffer`, which is another one afterwards."""
        self._claim(chunks)
        slot, following = self._slot, (self._slot + 1) % len(self._buffers)
        if self.takes_files:
            self._lanes[0].upload([self._where[chunk][1] for chunk in chunks], data, slot, following)
        else:
            self._spread(chunks, data, slot, following)
        self._slot = following
        self._begun(chunks)

    def send_file(self, fd: int, runs: Sequence[Run]) -> tuple[int, bool]:
        """The same with what lies in a file, as long as it is in the page cache: how many of the runs, and whether the
        file system can say what is. None has more windows than a buffer."""
        chunks = [chunk for _, numbers in runs for chunk in numbers]
        addresses = [self._where[chunk][1] for chunk in chunks]
        self._claim(chunks)
        places = [(offset, len(numbers)) for offset, numbers in runs]
        lane, slot = self._lanes[0], self._slot
        done, self._slot, refused = lane.upload_file(fd, places, addresses, WINDOW, self._buffers, slot)
        for _, numbers in runs[:done]:
            self._begun(numbers)
        return done, not refused

    def finish(self) -> None:
        """Wait until all is there."""
        for lane in self._lanes:
            lane.finish()
        self._there += (chunk for chunks in self._on_the_way for chunk in chunks)
        self._on_the_way.clear()
        self._report()

    def _spread(self, chunks: Sequence[int], data: memoryview, slot: int, following: int) -> None:
        for at, chunk in enumerate(chunks):
            index, address = self._where[chunk]
            self._devices[index].enter()
            self._lanes[index].upload([address], data[at * WINDOW : (at + 1) * WINDOW], slot)
        for device, lane in zip(self._devices, self._lanes, strict=True):
            device.enter()
            lane.wait(following)

    def _begun(self, chunks: Sequence[int]) -> None:
        self.size += len(chunks) * WINDOW
        self._on_the_way.append(chunks)
        # The buffer that is free now is that of the first of these.
        if len(self._on_the_way) == len(self._buffers):
            self._there += self._on_the_way.popleft()
        if len(self._there) >= _GROUP:
            self._report()

    def _report(self) -> None:
        there, self._there = self._there, []
        if there:
            self._arrived(there)


def _lane(device: Device, slots: int) -> Lane:
    device.enter()
    lane = device.lane()
    for _ in range(slots):
        lane.event()
    return lane
