"""CRIU's network lock: the rules that drop a container's traffic while its TCP connections are dumped.

CRIU (criu/net.c, criu/netfilter.c) makes them in the container's network namespace: a chain `CRIU` in front of
INPUT and OUTPUT by iptables, or a table `inet CRIU-…` by nf_tables. It takes them away when a dump that leaves
the processes running ends. When CRIU is killed, or the dump was a final one, the rules stay and the namespace is
deaf for ever: a pod's namespace outlives its containers.
"""

from __future__ import annotations

import errno
import subprocess

from rewarm import nftables
from rewarm.errors import CaptureError

_REMOVE = "*filter\n-D INPUT -j CRIU\n-D OUTPUT -j CRIU\n-F CRIU\n-X CRIU\nCOMMIT\n"
_INET = 1
_TIMEOUT = 20


def remove(pid: int) -> bool:
    """Take a left-behind lock out of the network namespace of `pid`; True when there was one.

    Raises CaptureError when there is one and it stays.
    """
    found = _remove_tables(pid)
    for family in ("iptables", "ip6tables"):
        found |= _remove_chain(pid, family)
    return found


def _remove_tables(pid: int) -> bool:
    try:
        locks = [t for t in nftables.tables(pid) if t.family == _INET and (t.name + "-").startswith("CRIU-")]
        for table in locks:
            nftables.delete(pid, table)
    except OSError as error:
        if error.errno in (errno.ESRCH, errno.ENOENT):
            return False  # the process has ended, or somebody else was faster
        raise CaptureError(
            "remove CRIU's network lock",
            f"namespace of process {pid}",
            error.strerror or str(error),
            f"run `nsenter -n -t {pid} nft list tables` and delete those named CRIU",
        ) from error
    return bool(locks)


def _remove_chain(pid: int, family: str) -> bool:
    prefix = ["nsenter", "--net", "--target", str(pid), "--"]
    try:
        shown = subprocess.run(
            [*prefix, f"{family}-save", "-t", "filter"], capture_output=True, timeout=_TIMEOUT, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False  # without iptables CRIU could not have locked anything this way
    if b"\n:CRIU " not in shown.stdout:
        return False
    done = subprocess.run(
        [*prefix, f"{family}-restore", "--noflush"],
        input=_REMOVE.encode(),
        capture_output=True,
        timeout=_TIMEOUT,
        check=False,
    )
    if done.returncode != 0:
        raise CaptureError(
            "remove CRIU's network lock",
            f"namespace of process {pid}",
            " ".join(done.stderr.decode("utf-8", "replace").split()),
            f"run `nsenter -n -t {pid} {family} -S` and delete the chain CRIU",
        )
    return True
