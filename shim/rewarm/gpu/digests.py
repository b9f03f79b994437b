"""The digests of windows of device memory, taken by the GPU itself."""

from __future__ import annotations

import functools
import mmap
import struct
from collections.abc import Sequence

from blake3 import blake3

from rewarm_native.cuda import CudaError
from rewarm_native.device import Device

from . import blake3_ptx
from .pieces import WINDOW

MOST = 256
"""Windows of one launch: some two for each of a large GPU's multiprocessors."""
_DIGEST = 32
_UNKNOWN = 999
"""CUDA_ERROR_UNKNOWN."""
_ADDRESS = struct.Struct("<Q")


class Digests:
    """The kernel on one GPU; for one thread at a time."""

    def __init__(self, device: Device) -> None:
        """Has the kernel compiled, and tried. Raises CudaError, also where the driver comes without its compiler."""
        self._device = device
        device.enter()
        self._kernel = device.kernel(blake3_ptx.text(device.capability), blake3_ptx.NAME)
        self._space = mmap.mmap(-1, MOST * (_ADDRESS.size + _DIGEST), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._addresses = device.reach(self._space)
        self._found = MOST * _ADDRESS.size
        self._lane = device.lane()
        self._try()

    def _try(self) -> None:
        """On this GPU, before its answers count: zeros, and bytes that are all but zeros, which it reads from here."""
        self._trial = mmap.mmap(-1, 2 * WINDOW, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        pattern = blake3(b"rewarm")
        self._trial[WINDOW:] = pattern.digest(length=WINDOW)
        base = self._device.reach(self._trial)
        expected = [zeros(), blake3(memoryview(self._trial)[WINDOW:]).digest()]
        if self.of([base, base + WINDOW, base]) != [*expected, expected[0]]:
            raise CudaError(_UNKNOWN, "another digest than BLAKE3's", blake3_ptx.NAME, 0)

    def of(self, addresses: Sequence[int]) -> list[bytes]:
        """The digest of each window at these addresses of the GPU, MOST at most. Raises CudaError."""
        if not addresses:
            return []
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


@functools.cache
def zeros() -> bytes:
    """The digest of a window of zeros."""
    return blake3(bytes(WINDOW)).digest()
