"""System calls without a wrapper in Python: NUMA memory policy and io_uring, x86_64 and arm64 Linux."""

from __future__ import annotations

import ctypes
import os
import platform

MPOL_PREFERRED = 1
MPOL_BIND = 2
_MPOL_F_ADDR = 2
_NODES = 1024  # bits in the node masks: at least what the kernel is built for

_NUMBERS = {
    "x86_64": {"mbind": 237, "set_mempolicy": 238, "get_mempolicy": 239, "io_uring_setup": 425},
    "aarch64": {"mbind": 235, "get_mempolicy": 236, "set_mempolicy": 237, "io_uring_setup": 425},
}[platform.machine()]
_libc = ctypes.CDLL(None, use_errno=True)
_Mask = ctypes.c_ulong * (_NODES // (8 * ctypes.sizeof(ctypes.c_ulong)))


def _call(name: str, *arguments: object) -> int:
    result: int = _libc.syscall(ctypes.c_long(_NUMBERS[name]), *arguments)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), name)
    return result


def _mask(nodes: list[int]) -> ctypes.Array[ctypes.c_ulong]:
    mask = _Mask()
    for node in nodes:
        mask[node // 64] |= 1 << node % 64
    return mask


def set_memory_policy(mode: int, nodes: list[int]) -> None:
    """set_mempolicy(2) for the calling thread. Raises OSError."""
    # The kernel takes maxnode as one more than the number of bits.
    _call("set_mempolicy", ctypes.c_long(mode), _mask(nodes), ctypes.c_ulong(_NODES + 1))


def bind_memory(address: int, length: int, mode: int, nodes: list[int]) -> None:
    """mbind(2) for the page-aligned range; nothing is moved. Raises OSError."""
    _call(
        "mbind",
        ctypes.c_void_p(address),
        ctypes.c_ulong(length),
        ctypes.c_long(mode),
        _mask(nodes),
        ctypes.c_ulong(_NODES + 1),
        ctypes.c_ulong(0),
    )


def memory_policy(address: int | None = None) -> tuple[int, list[int]]:
    """get_mempolicy(2): mode and nodes of the calling thread, or of the mapping at `address`. Raises OSError."""
    mode, mask = ctypes.c_int(), _Mask()
    _call(
        "get_mempolicy",
        ctypes.byref(mode),
        mask,
        ctypes.c_ulong(_NODES + 1),
        ctypes.c_void_p(address),
        ctypes.c_ulong(0 if address is None else _MPOL_F_ADDR),
    )
    return mode.value, [node for node in range(_NODES) if mask[node // 64] >> node % 64 & 1]


def io_uring_errno() -> int:
    """0 when io_uring_setup(2) makes a ring, which is closed again at once; else its error number."""
    parameters = ctypes.create_string_buffer(120)  # struct io_uring_params
    try:
        os.close(_call("io_uring_setup", ctypes.c_uint(1), parameters))
    except OSError as error:
        assert error.errno is not None
        return error.errno
    return 0
