"""Single threads of a stopped process that run all the same: ptrace(2) on a group stop, see native.h.

All calls for one set of threads have to be made by one thread, which is their tracer. When that ends, for whatever
reason, they stop again with their process (kernel/ptrace.c, __ptrace_unlink).
"""

from __future__ import annotations

import os

from ._native import ffi, lib


def rouse(tid: int) -> int:
    """Have a thread run whose process a signal has stopped. Returns the signals that it blocked (a mask): none is
    delivered to it meanwhile.

    Raises OSError: ESRCH (gone), EPERM (no CAP_SYS_PTRACE, or traced by another), ETIMEDOUT (stuck in the kernel).
    """
    mask = ffi.new("uint64_t *")
    _check(lib.rw_rouse(tid, mask), tid)
    return int(mask[0])


def keep_awake() -> list[int]:
    """Have roused threads, and those that they make, go on from whatever has stopped them since. Returns those that
    were made, or stopped once more. Raises OSError."""
    found = []
    born = ffi.new("int *")
    while _check(lib.rw_keep_awake(born), 0):
        if born[0]:
            found.append(int(born[0]))
            born[0] = 0
    return found


def let_sleep(tid: int, mask: int) -> None:
    """Undo `rouse`; `mask` is what that gave. Raises OSError: ESRCH (gone), ETIMEDOUT (stuck in the kernel; the end of
    the calling thread lets go of it)."""
    _check(lib.rw_let_sleep(tid, mask), tid)


def _check(result: int, tid: int) -> int:
    if result < 0:
        raise OSError(-result, f"trace thread {tid}: {os.strerror(-result)}")
    return result
