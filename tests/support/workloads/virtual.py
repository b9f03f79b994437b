"""CUDA's virtual memory API as a program calls it that is linked with the driver: through the dynamic linker, which
finds a preloaded library first."""

from __future__ import annotations

import ctypes
from typing import Any


class Location(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class Kind(ctypes.Structure):
    """CUmemAllocationProp: memory of the first device, unless told."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location", Location),
        ("windows", ctypes.c_void_p),
        ("flags", ctypes.c_uint8 * 8),
    )


class Access(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = (("location", Location), ("flags", ctypes.c_int))


_DEVICE, _PINNED, _READ_WRITE = 1, 1, 3


class Calls:
    """`driver` is the path of libcuda. Raises RuntimeError."""

    def __init__(self, driver: str) -> None:
        self._first = ctypes.CDLL(None)
        self._driver = ctypes.CDLL(driver, mode=ctypes.RTLD_LOCAL)

    def _call(self, name: str, *arguments: Any) -> None:
        result = getattr(self._first if hasattr(self._first, name) else self._driver, name)(*arguments)
        if result:
            raise RuntimeError(f"{name}: {result}")

    def create(self, size: int) -> int:
        handle, kind = ctypes.c_uint64(), Kind(_PINNED, 0, Location(_DEVICE, 0))
        self._call("cuMemCreate", ctypes.byref(handle), ctypes.c_size_t(size), ctypes.byref(kind), ctypes.c_uint64(0))
        return handle.value

    def reserve(self, size: int) -> int:
        address, zero = ctypes.c_uint64(), ctypes.c_uint64(0)
        self._call("cuMemAddressReserve", ctypes.byref(address), ctypes.c_size_t(size), ctypes.c_size_t(0), zero, zero)
        return address.value

    def map(self, address: int, size: int, handle: int) -> None:
        """For reading and writing."""
        place, zero = ctypes.c_uint64(address), ctypes.c_uint64(0)
        self._call("cuMemMap", place, ctypes.c_size_t(size), ctypes.c_size_t(0), ctypes.c_uint64(handle), zero)
        access = Access(Location(_DEVICE, 0), _READ_WRITE)
        self._call("cuMemSetAccess", place, ctypes.c_size_t(size), ctypes.byref(access), ctypes.c_size_t(1))

    def unmap(self, address: int, size: int) -> None:
        self._call("cuMemUnmap", ctypes.c_uint64(address), ctypes.c_size_t(size))

    def release(self, handle: int) -> None:
        self._call("cuMemRelease", ctypes.c_uint64(handle))

    def read(self, address: int, size: int) -> Any:
        """Into memory of this process."""
        found = ctypes.create_string_buffer(size)
        self._call("cuMemcpyDtoH_v2", found, ctypes.c_uint64(address), ctypes.c_size_t(size))
        return found

    def write(self, address: int, content: Any) -> None:
        self._call("cuMemcpyHtoD_v2", ctypes.c_uint64(address), content, ctypes.c_size_t(len(content)))

    def unreserve(self, address: int, size: int) -> None:
        self._call("cuMemAddressFree", ctypes.c_uint64(address), ctypes.c_size_t(size))
