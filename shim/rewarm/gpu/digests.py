"""The digests of windows of device memory, taken by the GPU itself."""

from __future__ import annotations

import functools
import mmap
import struct
from collections.abc import Sequence

from blake3 import blake3

from rewarm_native.cuda import CudaError
from rewarm_native.device import Device

from . import blake3_ptx, kernels
from .pieces import WINDOW

MOST = 256
"""Windows of one launch: some two for each of a large GPU's multiprocessors."""
_DIGEST = 32
_UNKNOWN = 999
"""CUDA_ERROR_UNKNOWN."""
_ADDRESS = struct.Struct("<Q")


class Digests:
    """The kernel on one GPU; for one thread at a time."""

    def __init__(self, device: Device, state_dir: str) -> None:
        """Has the kernel compiled, unless it is kept there, and tried. Raises CudaError, also where the driver comes
        without its compiler."""
        self._device = device
        device.enter()
        self._space = mmap.mmap(-1, MOST * (_ADDRESS.size + _DIGEST), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._addresses = device.reach(self._space)
        self._found = MOST * _ADDRESS.size
        self._lane = device.lane()
        self._trial = mmap.mmap(-1, 2 * WINDOW, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._trial[WINDOW:] = blake3(b"rewarm").digest(length=WINDOW)
        self._trials = device.reach(self._trial)
        text = blake3_ptx.text(device.capability)
        kept = kernels.place(state_dir, device.version, device.capability, text)
        if (code := kernels.find(kept)) is not None:
            try:
                self._use(code)
                return
            except CudaError:
                kernels.forget(kept)  # another driver may have made it
        try:
            code = device.compile(text)
            self._use(code)
        except CudaError:
            self._use(text.encode("ascii"))  # by another way of the driver's, or this raises what is wrong
            return
        kernels.keep(kept, code)

    def _use(self, code: bytes) -> None:
        """This kernel, after a trial on this GPU: zeros, and bytes that are all but zeros, which it reads from here."""
        self._kernel = self._device.kernel(code, blake3_ptx.NAME)
        base = self._trials
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
