"""Process attributes, what other namespaces have, NUMA memory policies and huge pages of other processes.

Every failure is an OSError with the kernel's errno (so ProcessLookupError, PermissionError, …) and a text that names
the call and the object.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ._native import ffi, lib

if TYPE_CHECKING:
    import socket

NODES = 1024
"""Node masks have bits 0 to NODES - 1, the most that Linux can be built for."""

_MPOL_MF_MOVE = 1 << 1
_UTS_LENGTH = 65
"""__NEW_UTS_LEN and the zero."""
_NODE_WORDS = NODES // 64


def set_child_subreaper(on: bool) -> None:
    """Make the calling process adopt its orphaned descendants, or stop that: prctl(PR_SET_CHILD_SUBREAPER).

    Holds for the whole process and across execve(2), not for children.
    """
    _check(lib.rw_set_child_subreaper(int(on)), "prctl PR_SET_CHILD_SUBREAPER")


def set_pdeathsig(sig: int) -> None:
    """Have `sig` sent to the calling process when the *thread* that forked it ends (0: none): prctl(PR_SET_PDEATHSIG).

    Kept across execve(2) except of setuid programs, and not inherited by children. A parent that died before the call
    sends nothing: compare os.getppid() afterwards.
    """
    _check(lib.rw_set_pdeathsig(sig), f"prctl PR_SET_PDEATHSIG {sig}")


def open_socket_in_netns(target: int | str | os.PathLike[str], family: int, type: int, proto: int = 0) -> socket.socket:
    """A new socket, not inheritable, that belongs to another network namespace for as long as it lives.

    `target` is a pid, or the path of a namespace file (`/proc/PID/ns/net`, `/run/netns/NAME`; `/proc/self/fd/N` for an
    open descriptor). None of the caller's threads changes its namespace. Needs CAP_SYS_ADMIN in both. Raises OSError:
    ESRCH for a pid that is gone, EINVAL for a path that is not a network namespace.
    """
    import socket  # takes ten times as long as all else here, and only this function needs it

    path = f"/proc/{target}/ns/net" if isinstance(target, int) else os.fspath(target)
    try:
        namespace = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        if isinstance(target, int):
            raise _error(errno.ESRCH, f"open network namespace of process {target}") from error
        raise
    try:
        fd = _check(lib.rw_socket_in_netns(namespace, family, type, proto), f"open socket in network namespace {path}")
    finally:
        os.close(namespace)
    return socket.socket(family, type, proto, fileno=fd)


def names_in_utsns(path: str | os.PathLike[str]) -> tuple[str, str]:
    """Host name and NIS domain name in the UTS namespace of a namespace file: uname(2) inside.

    None of the caller's threads changes its namespace. Needs CAP_SYS_ADMIN in it. Raises OSError: EINVAL for a path
    that is no UTS namespace.
    """
    namespace = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        host, domain = ffi.new("char[]", _UTS_LENGTH), ffi.new("char[]", _UTS_LENGTH)
        done = lib.rw_names_in_utsns(namespace, host, domain, _UTS_LENGTH)
        _check(done, f"read host name in UTS namespace {os.fspath(path)}")
    finally:
        os.close(namespace)
    return _text(host), _text(domain)


def set_last_pid(path: str | os.PathLike[str], pid: int) -> None:
    """Have the next process that is born in the pid namespace of a namespace file get `pid` + 1, or the next number
    that is free: /proc/sys/kernel/ns_last_pid (kernel/pid_namespace.c, CONFIG_CHECKPOINT_RESTORE).

    None of the caller's threads changes its namespace. Needs CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE in it. Raises
    OSError: EINVAL for a path that is no pid namespace and for a number over kernel.pid_max, ENOMEM for a namespace
    whose init has ended.
    """
    namespace = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check(lib.rw_set_last_pid(namespace, pid), f"set last pid {pid} in pid namespace {os.fspath(path)}")
    finally:
        os.close(namespace)


def mount_tmpfs(path: str | os.PathLike[str], *, size: int, inodes: int, mode: int, label: str = "") -> None:
    """Mount an empty file system in memory at a directory, of at most `size` bytes and `inodes` files (tmpfs(5)),
    without set-user-ID programs, devices and execution. `label`: what SELinux shall call all of it. Raises OSError."""
    options = f"size={size},nr_inodes={inodes},mode={mode:o}" + (f',context="{label}"' if label else "")
    _check(lib.rw_mount_tmpfs(os.fsencode(path), options.encode()), f"mount tmpfs at {os.fspath(path)}")


def _text(found: Any) -> str:
    text: str = ffi.string(found).decode("utf-8", "surrogateescape")
    return text


def get_fd(pid: int, fd: int) -> int:
    """A descriptor of another process, not inheritable: pidfd_getfd(2), Linux 5.6.

    Raises OSError: ESRCH (gone), EBADF (it has no such), EPERM (no CAP_SYS_PTRACE).
    """
    pidfd = os.pidfd_open(pid)
    try:
        return _check(lib.rw_get_fd(pidfd, fd), f"take descriptor {fd} of process {pid}")
    finally:
        os.close(pidfd)


def set_memory_policies(
    pid: int,
    tid: int,
    policy: tuple[int, int] | None,
    vma_policies: Sequence[tuple[int, int, int, int]] = (),
    *,
    move: bool = False,
) -> None:
    """Set NUMA memory policies in another process: the thread's own, and those of address ranges of the process.

    `policy` is (mode, node mask) for set_mempolicy(2) in thread `tid` of process `pid`, None to leave it as it is;
    `vma_policies` are (start, length in bytes, mode, node mask) for mbind(2), starts on page boundaries. Modes are
    those of linux/mempolicy.h with their flags; bit N of a mask is node N. Pages already there stay where they are
    unless `move`.

    The thread is borrowed by ptrace for some system calls (see mempolicy.c) and is afterwards as it was: a group stop
    (SIGSTOP) lasts, a system call that was interrupted goes on, pending signals stay pending. If the caller is killed
    in the middle, so is the process, which would otherwise run on with foreign registers.

    Raises OSError: ESRCH (gone), EPERM (no CAP_SYS_PTRACE, or traced by another, or a zombie), EINVAL (mode, or nodes
    that the process may not use), EFAULT (an unmapped range), ETIMEDOUT (stuck in the kernel; stays attached until the
    calling thread ends), ENOSYS (not a 64-bit x86 process); the policies before the one that failed are set then.
    ValueError for a bad mask or length.
    """
    wanted = [] if policy is None else [(0, 0, policy[0], policy[1])]
    for start, length, mode, mask in vma_policies:
        if length <= 0:
            raise ValueError(f"range at {start:#x} has length {length}")
        wanted.append((start, length, mode, mask))
    if not wanted:
        return
    if not os.path.exists(f"/proc/{pid}/task/{tid}"):
        raise _error(errno.ESRCH, f"set memory policy of thread {tid} of process {pid}")

    flags = _MPOL_MF_MOVE if move else 0
    policies = ffi.new(
        "struct rw_policy[]",
        [(start, length, mode, flags, _node_words(mask)) for start, length, mode, mask in wanted],
    )
    failed = ffi.new("size_t *")
    result = lib.rw_set_policies(tid, policies, len(wanted), failed)
    if result < 0:
        what = f"run system calls in thread {tid} of process {pid}"
        if failed[0] < len(wanted):
            start, length, mode, mask = wanted[failed[0]]
            call = f"mbind {start:#x}-{start + length:#x}" if length else "set_mempolicy"
            what = f"{call} to mode {mode:#x}, nodes {mask:#x} in thread {tid} of process {pid}"
        raise _error(-result, what)


class HugePages:
    """Large private mappings that a thread of another process makes from now on are told to use huge pages.

    It is traced (ptrace, so by nobody else meanwhile), and sent to madvise(2) itself as soon as it has made one that is
    anonymous and writable: see advise.c. The process notices nothing, also when the tracer is killed. One thread has to
    make the object and call `work`, and then has to end, by which the other one is let go.
    """

    def __init__(self, tid: int, smallest: int) -> None:
        """`smallest`: bytes of a mapping that counts. Waits up to 2 s for the thread to be traced; one that is in the
        kernel for longer is traced from its return on.

        Raises OSError: ESRCH (gone), EPERM (no CAP_SYS_PTRACE, or traced by another, or a zombie), ENOEXEC (no code
        that would bring the thread back), ENOSYS (not x86-64).
        """
        self._smallest = smallest
        self._way = ffi.new("struct rw_way *")
        _check(lib.rw_watch_begin(tid, self._way), f"trace thread {tid}")

    def work(self) -> None:
        """Returns when the thread has ended, or raises OSError: ENOEXEC (it runs another program now)."""
        _check(lib.rw_watch(self._way, self._smallest), "trace a thread")


def _node_words(mask: int) -> list[int]:
    if not 0 <= mask < 1 << NODES:
        raise ValueError(f"node mask {mask:#x} has bits outside 0..{NODES - 1}")
    return [mask >> 64 * word & (1 << 64) - 1 for word in range(_NODE_WORDS)]


def _error(number: int, what: str) -> OSError:
    return OSError(number, f"{what}: {os.strerror(number)}")


def _check(result: int, what: str) -> int:
    if result < 0:
        raise _error(-result, what)
    return result
