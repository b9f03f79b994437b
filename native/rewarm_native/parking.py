"""Holding single threads of other processes still, by ptrace(2): see parking.c.

The kernel knows a tracer by its thread: a thread can only be let go by the thread that holds it, and
when that ends, however it does, every thread that it holds goes on.
"""

from __future__ import annotations

import os

from ._native import lib


def hold(tid: int) -> None:
    """Have a thread stop as soon as it is not in the kernel; `is_held` says when it has.

    A group stop (SIGSTOP) is no hindrance, and SIGCONT does not set the thread going. Raises OSError: ESRCH (gone),
    EPERM (no CAP_SYS_PTRACE, or traced by another, or about to end).
    """
    _check(lib.rw_hold(tid), "hold", tid)


def interrupt(tid: int) -> None:
    """Have a thread that is traced already stop, again. Raises OSError: ESRCH."""
    _check(lib.rw_interrupt(tid), "interrupt", tid)


def is_held(tid: int) -> bool:
    """Whether a thread has stopped; any thread of the process may ask. Raises OSError: ESRCH when it has ended."""
    return bool(_check(lib.rw_is_held(tid), "wait for", tid))


def let_go(tid: int) -> None:
    """Let a held thread go on from where it was, or stay in its group stop. A signal that came meanwhile reaches it.

    Raises OSError: ESRCH (it has ended), EBUSY (it has not stopped yet: only the end of the calling thread frees it).
    """
    _check(lib.rw_let_go(tid), "let go", tid)


def _check(result: int, what: str, tid: int) -> int:
    if result < 0:
        raise OSError(-result, f"{what} thread {tid}: {os.strerror(-result)}")
    return result
