"""CRIU's network lock: the iptables rules that drop a container's traffic while its TCP connections are dumped.

CRIU (criu/net.c) puts a chain `CRIU` in front of INPUT and OUTPUT in the container's network namespace and
takes it out again when the dump ends well or badly. When CRIU is killed, or the dump was a final one, the
rules stay and the namespace is deaf for ever: a pod's namespace outlives its containers.
"""

from __future__ import annotations

import subprocess

from rewarm.errors import CaptureError

_REMOVE = "*filter\n-D INPUT -j CRIU\n-D OUTPUT -j CRIU\n-F CRIU\n-X CRIU\nCOMMIT\n"


def remove(pid: int) -> bool:
    """Take a left-behind lock out of the network namespace of `pid`; True when there was one.

    Raises CaptureError when there is one and it stays.
    """
    found = False
    for family in ("iptables", "ip6tables"):
        prefix = ["nsenter", "--net", "--target", str(pid), "--"]
        try:
            shown = subprocess.run(
                [*prefix, f"{family}-save", "-t", "filter"], capture_output=True, timeout=20, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            continue  # without iptables CRIU could not have locked anything
        if b":CRIU " not in shown.stdout:
            continue
        found = True
        done = subprocess.run(
            [*prefix, f"{family}-restore", "--noflush"],
            input=_REMOVE.encode(),
            capture_output=True,
            timeout=20,
            check=False,
        )
        if done.returncode != 0:
            raise CaptureError(
                "remove CRIU's network lock",
                f"namespace of process {pid}",
                " ".join(done.stderr.decode("utf-8", "replace").split()),
                f"run `nsenter -n -t {pid} {family} -S` and delete the chain CRIU",
            )
    return found


def traced(pid: int) -> bool:
    """Whether some process (CRIU, a debugger) traces `pid`."""
    try:
        with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file:
            return any(line.startswith("TracerPid:") and line.split()[1] != "0" for line in file)
    except (FileNotFoundError, ProcessLookupError):
        return False
