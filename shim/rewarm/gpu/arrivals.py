"""Whether what has arrived on the GPUs is what the snapshot says: they take the digests themselves, of many windows at
once, while others are on their way. So the processors have only to read, and are free for CRIU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from queue import SimpleQueue

from rewarm_native.device import Device

from .digests import MOST, Digests
from .layout import Layout


class Arrivals:
    """Chunks that are on a GPU, from the threads that copy to the one that verifies."""

    def __init__(self, digests: Sequence[bytes]) -> None:
        """`digests`: by the chunk's number."""
        self._digests = digests
        self._on: list[Digests] = []
        self._queue: SimpleQueue[Sequence[int] | None] = SimpleQueue()

    @property
    def compiled(self) -> bool:
        """Whether there is a kernel."""
        return bool(self._on)

    def compile(self, devices: Sequence[Device], state_dir: str) -> None:
        """Make the kernel for each of these, or find it. Raises CudaError."""
        self._on = [Digests(device, state_dir) for device in devices]

    def put(self, chunks: Sequence[int]) -> None:
        """These chunks are there as a whole."""
        self._queue.put(chunks)

    def end(self) -> None:
        """One who called `put` will not any more."""
        self._queue.put(None)

    def batches(self, senders: int) -> Iterator[Sequence[int]]:
        """What has arrived, MOST or a little more at a time, until each of `senders` has called `end`."""
        batch: list[int] = []
        while senders:
            chunks = self._queue.get()
            if chunks is None:
                senders -= 1
            else:
                batch += chunks
            if batch and (len(batch) >= MOST or not senders):
                yield batch
                batch = []

    def right(self, chunks: Sequence[int], where: Layout) -> set[int]:
        """Those whose digest is what it should be; without a kernel none. Raises CudaError."""
        found: set[int] = set()
        for index, digests in enumerate(self._on):
            here = [chunk for chunk in chunks if where[chunk][0] == index]
            for at in range(0, len(here), MOST):
                part = here[at : at + MOST]
                taken = digests.of([where[chunk][1] for chunk in part])
                found.update(chunk for chunk, digest in zip(part, taken, strict=True) if digest == self._digests[chunk])
        return found
