"""Seccomp profiles as engines give them to containers."""

from __future__ import annotations

import errno
import re
from pathlib import Path
from typing import Any

# What the default profiles of Docker and Podman leave out for a container without capabilities.
_NOT_ALLOWED = frozenset(
    """
    acct add_key bpf clock_adjtime clock_settime delete_module finit_module get_kernel_syms init_module ioperm iopl
    kexec_file_load kexec_load keyctl lookup_dcookie mount_setattr move_pages nfsservctl open_by_handle_at
    perf_event_open personality pivot_root process_vm_readv process_vm_writev ptrace query_module quotactl reboot
    request_key setns settimeofday stime swapoff swapon sysfs _sysctl umount umount2 unshare uselib userfaultfd
    ustat vhangup
    """.split()  # noqa: SIM905
)


def allow_list() -> dict[str, Any]:
    """Everything that is not named is denied (EPERM); io_uring is allowed, as Docker did until version 25."""
    return {
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": errno.EPERM,
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": [
            {"names": sorted(_all() - _NOT_ALLOWED - {"personality"}), "action": "SCMP_ACT_ALLOW"},
            {
                "names": ["personality"],
                "action": "SCMP_ACT_ALLOW",
                "args": [{"index": 0, "value": 0, "op": "SCMP_CMP_EQ"}],
            },
        ],
    }


def deny_list() -> dict[str, Any]:
    """Everything that is not named is allowed."""
    return {
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"names": ["keyctl", "add_key"], "action": "SCMP_ACT_ERRNO", "errnoRet": errno.ENOSYS}],
    }


def _all() -> set[str]:
    """Names of all system calls, from the kernel's header as libc6-dev brings it."""
    header = next(Path("/usr/include").glob("*-linux-gnu/asm/unistd_64.h"))
    return set(re.findall(r"__NR_(\w+)", header.read_text()))
