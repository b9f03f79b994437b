"""Memory of a GPU in this process, by the CUDA driver's virtual memory API: to fill it, to read it, to hand it on.

Made by one process, exported as a descriptor, and mapped by another (cuda.h, "Virtual Memory Management"; measured in
docs/decisions/0015). Bound like cuda.py: nothing is loaded before the first object. Every call raises CudaError.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from ._cuda import ffi
from ._native import ffi as native_ffi
from ._native import lib as native
from .cuda import CudaError

GRANULARITY = 2 << 20
"""Bytes: sizes and addresses are multiples of it (cuMemGetAllocationGranularity)."""

_PINNED, _ON_DEVICE, _READ_WRITE, _DESCRIPTOR = 1, 1, 3, 1
_NON_BLOCKING, _NO_TIMING = 1, 2
_CAPABILITY = (75, 76)
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR."""
_PTX = 1
"""CU_JIT_INPUT_PTX."""
_RDMA_WITH_VMM = 110
"""CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED: memory is made as the library makes it."""


class Device:
    """This process's primary context on one GPU. `enter` is to be called in every thread that uses it."""

    def __init__(self, path: str, uuid: bytes) -> None:
        """Load the library at `path`, initialise it and make the context on the GPU with these 16 bytes: some tenths of
        a second. Raises OSError, CudaError; LookupError if this process sees no such GPU."""
        self._lib: Any = ffi.dlopen(path)
        self._call("cuInit", 0)
        self._ordinal = self._find(uuid)
        context = ffi.new("void **")
        self._call("cuDevicePrimaryCtxRetain", context, self._ordinal)
        self._context = context[0]
        self.enter()
        rdma = ffi.new("int *")
        self._call("cuDeviceGetAttribute", rdma, _RDMA_WITH_VMM, self._ordinal)
        self._rdma = int(rdma[0] != 0)
        version = ffi.new("int[2]")
        for at, attribute in enumerate(_CAPABILITY):
            self._call("cuDeviceGetAttribute", version + at, attribute, self._ordinal)
        self.capability = int(version[0]), int(version[1])
        """Compute capability."""
        driver = ffi.new("int *")
        self._call("cuDriverGetVersion", driver)
        self.version = int(driver[0])
        """The CUDA version of the driver, 1000 times the major and 10 times the minor one."""
        names = {
            "upload": "cuMemcpyHtoDAsync_v2",
            "download": "cuMemcpyDtoHAsync_v2",
            "record": "cuEventRecord",
            "wait": "cuEventSynchronize",
        }
        calls = {key: self._function(name) for key, name in names.items()}
        self._calls = native_ffi.new("struct rw_lane_calls *", calls)

    def enter(self) -> None:
        """Make the context that of the calling thread."""
        self._call("cuCtxSetCurrent", self._context)

    def free(self) -> int:
        """Bytes of the GPU that nobody has, as far as this process may have them."""
        free, total = ffi.new("size_t *"), ffi.new("size_t *")
        self.enter()
        self._call("cuMemGetInfo_v2", free, total)
        return int(free[0])

    def create(self, sizes: Sequence[int]) -> list[int]:
        """New memory that can be exported, in one call without Python's lock: a handle for each size, or none at all.
        What is in it is not said."""
        prop = ffi.new("CUmemAllocationProp *")
        prop.type, prop.requestedHandleTypes = _PINNED, _DESCRIPTOR
        prop.location.type, prop.location.id = _ON_DEVICE, self._ordinal
        prop.allocFlags.gpuDirectRDMACapable = self._rdma
        handles, done = native_ffi.new("uint64_t[]", len(sizes)), native_ffi.new("size_t *")
        wanted = native_ffi.new("uint64_t[]", sizes)
        properties = native_ffi.cast("void *", int(ffi.cast("uintptr_t", prop)))
        code = native.rw_create_pieces(self._function("cuMemCreate"), properties, wanted, len(sizes), handles, done)
        if code:
            for handle in handles[0 : done[0]]:
                with suppress(CudaError):
                    self.release(handle)
        self.check(code, "cuMemCreate")
        return list(handles)

    def take(self, fd: int) -> int:
        """The handle of memory that another process has exported; `fd` stays the caller's to close."""
        handle = ffi.new("CUmemGenericAllocationHandle *")
        self._call("cuMemImportFromShareableHandle", handle, ffi.cast("void *", fd), _DESCRIPTOR)
        return int(handle[0])

    def give(self, handles: Sequence[int]) -> list[int]:
        """A descriptor for each of these that `create` made, which keeps the memory as long as it is open, whatever
        this process does; or none at all. An imported one cannot be exported (INVALID_VALUE)."""
        fds, done = native_ffi.new("int[]", len(handles)), native_ffi.new("size_t *")
        export, given = self._function("cuMemExportToShareableHandle"), native_ffi.new("uint64_t[]", handles)
        code = native.rw_export_pieces(export, given, len(handles), _DESCRIPTOR, fds, done)
        if code:
            for fd in fds[0 : done[0]]:
                os.close(fd)
        self.check(code, "cuMemExportToShareableHandle")
        return list(fds)

    def release(self, handle: int) -> None:
        """Let go of a handle; what is mapped stays."""
        self._call("cuMemRelease", handle)

    def map(self, parts: Sequence[tuple[int, int]]) -> int:
        """The address at which this process sees memory from now on: handles and sizes, one after the other."""
        found, sizes = ffi.new("CUdeviceptr *"), [size for _, size in parts]
        self._call("cuMemAddressReserve", found, sum(sizes), 0, 0, 0)
        address = int(found[0])
        access = ffi.new("CUmemAccessDesc *")
        access.location.type, access.location.id, access.flags = _ON_DEVICE, self._ordinal, _READ_WRITE
        done = native_ffi.new("size_t *")
        lengths, handles = native_ffi.new("uint64_t[]", sizes), native_ffi.new("uint64_t[]", [one for one, _ in parts])
        try:
            code = native.rw_map_pieces(self._function("cuMemMap"), address, lengths, handles, len(parts), done)
            self.check(code, "cuMemMap")
            # Once for all: it is what takes the time.
            self._call("cuMemSetAccess", address, sum(sizes), access, 1)
        except CudaError:
            with suppress(CudaError):
                self._unmap(address, sizes[: done[0]])
                self._call("cuMemAddressFree", address, sum(sizes))
            raise
        return address

    def unmap(self, address: int, sizes: Sequence[int]) -> None:
        """Undo `map` of parts of these sizes."""
        self._unmap(address, sizes)
        self._call("cuMemAddressFree", address, sum(sizes))

    def pin(self, space: mmap.mmap) -> None:
        """Have the GPU reach a mapping by itself: its pages stay where they are until this process ends."""
        self._call("cuMemHostRegister_v2", ffi.from_buffer(space), len(space), 0)

    def reach(self, space: mmap.mmap) -> int:
        """Pin a mapping: the address at which the GPU sees it."""
        self.pin(space)
        address = ffi.new("CUdeviceptr *")
        self._call("cuMemHostGetDevicePointer_v2", address, ffi.from_buffer(space), 0)
        return int(address[0])

    def compile(self, text: str) -> bytes:
        """What the driver makes of PTX for this GPU, for `kernel`: some hundredths of a second. A driver without its
        compiler (libnvidia-ptxjitcompiler) says JIT_COMPILER_NOT_FOUND."""
        state, code, size = ffi.new("void **"), ffi.new("void **"), ffi.new("size_t *")
        data = ffi.new("char[]", text.encode("ascii"))
        self._call("cuLinkCreate_v2", 0, ffi.NULL, ffi.NULL, state)
        try:
            self._call("cuLinkAddData_v2", state[0], _PTX, data, len(data), b"rewarm", 0, ffi.NULL, ffi.NULL)
            self._call("cuLinkComplete", state[0], code, size)
            return bytes(ffi.buffer(code[0], size[0]))  # it goes with the state
        finally:
            with suppress(CudaError):
                self._call("cuLinkDestroy", state[0])

    def kernel(self, code: bytes, name: str) -> Any:
        """A kernel for `Lane.launch`, out of a module: what `compile` has made, or PTX, which is compiled then."""
        module, kernel = ffi.new("void **"), ffi.new("void **")
        self._call("cuModuleLoadData", module, ffi.new("char[]", code))
        self._call("cuModuleGetFunction", kernel, module[0], name.encode("ascii"))
        return kernel[0]

    def lane(self) -> Lane:
        """A stream of copies."""
        return Lane(self)

    def close(self) -> None:
        """Give up the context, and all memory of it that nobody else has."""
        self._call("cuDevicePrimaryCtxRelease_v2", self._ordinal)

    def _unmap(self, address: int, sizes: Sequence[int]) -> None:
        """All that can be; raises the first error."""
        first: CudaError | None = None
        for size in sizes:
            try:
                self._call("cuMemUnmap", address, size)
            except CudaError as error:
                first = first or error
            address += size
        if first is not None:
            raise first

    def _find(self, uuid: bytes) -> int:
        count, device, found = ffi.new("int *"), ffi.new("int *"), ffi.new("CUuuid *")
        self._call("cuDeviceGetCount", count)
        for ordinal in range(count[0]):
            self._call("cuDeviceGet", device, ordinal)
            self._call("cuDeviceGetUuid_v2", found, device[0])
            if bytes(found.bytes) == uuid:
                return int(device[0])
        raise LookupError(f"the driver shows {count[0]} GPUs, and not this one")

    def _function(self, name: str) -> Any:
        """A function of the driver, for calls from C."""
        return native_ffi.cast("void *", int(ffi.cast("uintptr_t", ffi.addressof(self._lib, name))))

    def _call(self, name: str, *arguments: object) -> None:
        self.check(int(getattr(self._lib, name)(*arguments)), name)

    def check(self, code: int, name: str) -> None:
        """Raise CudaError if a call has failed."""
        if code:
            text = ffi.new("const char **")
            known = self._lib.cuGetErrorName(code, text) == 0 and text[0]
            word = bytes(ffi.string(text[0])).decode("ascii", "replace") if known else f"CUresult {code}"
            raise CudaError(code, word, name, 0)


class Lane:
    """One thread's stream of copies between pinned memory and the GPU. Its events stand for buffers: which of them is
    free again is asked by number."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._lib = device._lib
        self._calls = device._calls
        stream = ffi.new("void **")
        device._call("cuStreamCreate", stream, _NON_BLOCKING)
        self._stream = stream[0]
        self._native_stream = self._pointer(stream[0])
        self._events: list[Any] = []

    def event(self) -> int:
        """The number of a new event."""
        event = ffi.new("void **")
        self._device._call("cuEventCreate", event, _NO_TIMING)
        self._events.append(self._pointer(event[0]))
        return len(self._events) - 1

    def upload(self, addresses: Sequence[int], data: memoryview, event: int, after: int | None = None) -> None:
        """Begin to copy pinned `data` to the GPU, an equal part to each address; `event` is over when that is done.
        Then waits for event `after`, which may have been recorded earlier or never."""
        count = len(addresses)
        host, devices = native_ffi.from_buffer(data), native_ffi.new("uint64_t[]", addresses)
        following = native_ffi.NULL if after is None else self._events[after]
        stream, mark = self._native_stream, self._events[event]
        code = native.rw_upload(self._calls, devices, count, host, len(data) // count, stream, mark, following)
        self._device.check(code, "copy to the GPU")

    def upload_file(
        self,
        fd: int,
        runs: Sequence[tuple[int, int]],
        addresses: Sequence[int],
        size: int,
        buffers: Sequence[memoryview],
        slot: int,
    ) -> tuple[int, int, bool]:
        """As `upload` with windows of `size` bytes out of a file, in one call without Python's lock, as long as they
        are in the page cache (preadv2(2), RWF_NOWAIT). `runs` are offsets and counts of windows that lie one after the
        other there, at most what a buffer has room for; `addresses` has one for each window. The pinned buffers are
        taken in turn, that of number `slot` is free, and each has the event of its number.

        How many runs are on their way, the buffer that is free now, and whether the file system cannot say what is in
        memory. All but the last len(buffers) - 1 runs have come.
        """
        rooms = native_ffi.new("void *[]", [native_ffi.from_buffer(buffer) for buffer in buffers])
        events = native_ffi.new("void *[]", self._events[: len(buffers)])
        ring = native_ffi.new("struct rw_ring *", (rooms, events, len(buffers), slot))
        done, refused = native_ffi.new("size_t *"), native_ffi.new("int *")
        code = native.rw_upload_file(
            self._calls,
            fd,
            native_ffi.new("struct rw_run[]", runs),
            len(runs),
            native_ffi.new("uint64_t[]", addresses),
            size,
            self._native_stream,
            ring,
            done,
            refused,
        )
        self._device.check(code, "copy a file to the GPU")
        return int(done[0]), int(ring.next), bool(refused[0])

    def download(self, data: memoryview, address: int, event: int) -> None:
        """Begin to copy from the GPU into pinned `data`; `event` is over when that is done."""
        host = native_ffi.from_buffer(data)
        code = native.rw_download(self._calls, host, address, len(data), self._native_stream, self._events[event])
        self._device.check(code, "copy from the GPU")

    def wait(self, event: int) -> None:
        """Until what was begun with this event is done."""
        self._device._call("cuEventSynchronize", ffi.cast("void *", native_ffi.cast("uintptr_t", self._events[event])))

    def copy(self, to: int, source: int, size: int) -> None:
        """Begin to copy from one place of the GPU to another."""
        self._device._call("cuMemcpyDtoDAsync_v2", to, source, size, self._stream)

    def zero(self, address: int, size: int) -> None:
        """Begin to fill memory of the GPU with zeros."""
        self._device._call("cuMemsetD8Async", address, 0, size, self._stream)

    def launch(self, kernel: Any, blocks: int, threads: int, *addresses: int) -> None:
        """Begin to run a kernel, with addresses that the GPU sees as its parameters."""
        values = [ffi.new("CUdeviceptr *", address) for address in addresses]
        parameters = ffi.new("void *[]", [ffi.cast("void *", value) for value in values])
        self._device._call("cuLaunchKernel", kernel, blocks, 1, 1, threads, 1, 1, 0, self._stream, parameters, ffi.NULL)

    def finish(self) -> None:
        """Wait until all that was begun is done."""
        self._device._call("cuStreamSynchronize", self._stream)

    def _pointer(self, pointer: Any) -> Any:
        return native_ffi.cast("void *", int(ffi.cast("uintptr_t", pointer)))
