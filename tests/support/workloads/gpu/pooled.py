"""The server with weights and cache in memory that the program creates itself, as vLLM's sleep mode and
torch_memory_saver do: an allocator of PyTorch's that calls CUDA's virtual memory API. Every reset maps all of it anew,
some of it as new memory.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

from support.workloads import virtual
from support.workloads.gpu import server, tensors
from support.workloads.gpu.tensors import torch

_GRANULE = 2 << 20
_ALLOCATE = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p)
_FREE = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p)


class Pool:
    """Memory by address: its size and its handle."""

    def __init__(self) -> None:
        self._calls = virtual.Calls("libcuda.so.1")
        self._all: dict[int, tuple[int, int]] = {}
        self._callbacks = _ALLOCATE(self._allocate), _FREE(self._free)
        pointers = [ctypes.cast(one, ctypes.c_void_p).value for one in self._callbacks]
        self._pool = torch.cuda.MemPool(torch._C._cuda_customAllocator(*pointers))

    def _allocate(self, size: int, _device: int, _stream: int) -> int:
        size = -(-size // _GRANULE) * _GRANULE
        handle, address = self._calls.create(size), self._calls.reserve(size)
        self._calls.map(address, size, handle)
        self._all[address] = size, handle
        return address

    def _free(self, address: int, _size: int, _device: int, _stream: int) -> None:
        size, handle = self._all.pop(address)
        self._calls.unmap(address, size)
        self._calls.release(handle)
        self._calls.unreserve(address, size)

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        with torch.cuda.use_mem_pool(self._pool):
            yield

    def renew(self) -> None:
        """Every other one gets new memory, with what was in it; the others are only mapped again."""
        torch.cuda.synchronize()
        for number, (address, (size, handle)) in enumerate(list(self._all.items())):
            if number % 2:
                self._calls.unmap(address, size)
                self._calls.map(address, size, handle)
                continue
            content = self._calls.read(address, size)
            self._calls.unmap(address, size)
            self._calls.release(handle)
            handle = self._calls.create(size)
            self._calls.map(address, size, handle)
            self._calls.write(address, content)
            self._all[address] = size, handle


class Pooled(server.Server):
    def __init__(self, gib: float, kv_gib: float) -> None:
        self._memory = Pool()
        super().__init__(gib, kv_gib=kv_gib, memory=self._memory.used())

    def reset(self) -> None:
        self._memory.renew()
        super().reset()


def main() -> None:
    tensors.set_up()
    gib, kv, _ = server.settings()
    tensors.serve(Pooled(gib, kv))


if __name__ == "__main__":
    main()
