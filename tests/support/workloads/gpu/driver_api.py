"""The CUDA driver API by ctypes: what the cases need that no framework offers, and without its seconds of importing."""

from __future__ import annotations

import ctypes
import os
from ctypes import POINTER, byref, c_int, c_size_t, c_uint, c_ulonglong, c_void_p

_PINNED = 1
_ON_DEVICE = 1
_DESCRIPTOR = 1
_READ_WRITE = 3
_ATTACH_GLOBAL = 1


class _Properties(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = (
        ("type", c_int),
        ("handle_types", c_int),
        ("location_type", c_int),
        ("location_id", c_int),
        ("win32", c_void_p),
        ("flags", ctypes.c_ubyte * 8),
    )


class _Access(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = (("location_type", c_int), ("location_id", c_int), ("flags", c_int))


class Failed(Exception):
    """A call of the driver, and what it answered."""


class Cuda:
    """GPU 0's primary context, current in the thread that made this. Every method raises Failed."""

    def __init__(self) -> None:
        self._lib = ctypes.CDLL("libcuda.so.1")
        self.call("cuInit", c_uint(0))
        context = c_void_p()
        self.call("cuDevicePrimaryCtxRetain", byref(context), c_int(0))
        self.call("cuCtxSetCurrent", context)

    def call(self, name: str, *arguments: object) -> None:
        code = getattr(self._lib, name)(*arguments)
        if code:
            raise Failed(f"{name}: CUresult {code}")

    def memory(self) -> tuple[int, int]:
        """Free and all bytes of the GPU."""
        free, total = c_size_t(), c_size_t()
        self.call("cuMemGetInfo_v2", byref(free), byref(total))
        return free.value, total.value

    def allocate(self, size: int) -> int:
        found = c_ulonglong()
        self.call("cuMemAlloc_v2", byref(found), c_size_t(size))
        return found.value

    def managed(self, size: int) -> int:
        """Managed memory: small amounts only, since too much of it can hang a GPU."""
        found = c_ulonglong()
        self.call("cuMemAllocManaged", byref(found), c_size_t(size), c_uint(_ATTACH_GLOBAL))
        return found.value

    def exported(self, size: int) -> tuple[int, int]:
        """Memory of the virtual memory API, and an open descriptor by which another process could import it."""
        properties = _Properties(type=_PINNED, handle_types=_DESCRIPTOR, location_type=_ON_DEVICE, location_id=0)
        handle, address, descriptor = c_ulonglong(), c_ulonglong(), c_int(-1)
        self.call("cuMemCreate", byref(handle), c_size_t(size), byref(properties), c_ulonglong(0))
        self.call("cuMemAddressReserve", byref(address), c_size_t(size), c_size_t(0), c_ulonglong(0), c_ulonglong(0))
        self.call("cuMemMap", address, c_size_t(size), c_size_t(0), handle, c_ulonglong(0))
        access = _Access(_ON_DEVICE, 0, _READ_WRITE)
        self.call("cuMemSetAccess", address, c_size_t(size), byref(access), c_size_t(1))
        self.call("cuMemExportToShareableHandle", byref(descriptor), handle, c_int(_DESCRIPTOR), c_ulonglong(0))
        os.fstat(descriptor.value)
        return address.value, descriptor.value

    def fill(self, address: int, value: int, count: int) -> None:
        """`count` 32-bit numbers."""
        self.call("cuMemsetD32_v2", c_ulonglong(address), c_uint(value), c_size_t(count))

    def read(self, address: int, size: int) -> bytes:
        self.call("cuCtxSynchronize")
        data = ctypes.create_string_buffer(size)
        self.call("cuMemcpyDtoH_v2", ctypes.cast(data, POINTER(ctypes.c_char)), c_ulonglong(address), c_size_t(size))
        return data.raw
