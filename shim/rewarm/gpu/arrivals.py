"""Whether what has arrived on the GPUs is what the snapshot says: they take the digests themselves, of many windows at
once, while others are on their way. So the processors have only to read, and are free for CRIU.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Mapping, Sequence
from queue import SimpleQueue

from rewarm_native.device import Device

from . import blake3_ptx

MOST = 256
"""Windows of one launch: some two for each of a large GPU's multiprocessors."""
_DIGEST = 32
_ADDRESS = struct.Struct("<Q")


class Digests:
    """The kernel on one GPU; for one thread at a time."""

    def __init__(self, device: Device) -> None:
        """Has the kernel compiled. Raises CudaError, also where the driver comes without its compiler."""
        self._device = device
        device.enter()
        self._kernel = device.kernel(blake3_ptx.text(), blake3_ptx.NAME)
        self._space = mmap.mmap(-1, MOST * (_ADDRESS.size + _DIGEST), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._addresses = device.reach(self._space)
        self._found = MOST * _ADDRESS.size
        self._lane = device.lane()

    def of(self, addresses: Sequence[int]) -> list[bytes]:
        """The digest of each window at these addresses of the GPU, MOST at most. Raises CudaError."""
        self._device.enter()
        for at, address in enumerate(addresses):
            _ADDRESS.pack_into(self._space, at * _ADDRESS.size, address)
        # What a launch does not write must not look like the digests of an earlier one.
        end = self._found + len(addresses) * _DIGEST
        self._space[self._found : end] = bytes(end - self._found)
        self._lane.launch(
            self._kernel, len(addresses), blake3_ptx.THREADS, self._addresses, self._addresses + self._found
        )
        self._lane.finish()
        return [self._space[at : at + _DIGEST] for at in range(self._found, end, _DIGEST)]


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

    def compile(self, devices: Sequence[Device]) -> None:
        """Make the kernel for each of these. Raises CudaError."""
        self._on = [Digests(device) for device in devices]

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

    def wrong(self, chunks: Sequence[int], where: Mapping[int, tuple[int, int]]) -> list[int]:
        """Those whose digest is not what it should be; without a kernel all of them. `where` has the index of the
        device and the address of each. Raises CudaError."""
        if not self._on:
            return list(chunks)
        found: list[int] = []
        for index, digests in enumerate(self._on):
            here = [chunk for chunk in chunks if where[chunk][0] == index]
            for at in range(0, len(here), MOST):
                part = here[at : at + MOST]
                taken = digests.of([where[chunk][1] for chunk in part])
                found += [chunk for chunk, digest in zip(part, taken, strict=True) if digest != self._digests[chunk]]
        return found
