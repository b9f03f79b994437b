"""The option file that rewarm gives CRIU through the environment variable CRIU_CONFIG_FILE.

runc has no flags for these options. CRIU (criu/config.c) reads the file named by CRIU_CONFIG_FILE before
what runc sends by RPC, so anything runc sets itself wins over it; none of the options below is one that
runc sets. The file needs no annotation in the container's spec, which is why a container that rewarm did
not create can be captured too.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

# Deleted files that are still open are copied into the images up to this size (CRIU's own default is 1 MiB).
_GHOST_LIMIT = 2 << 30

DUMP = (
    # Names of files that were unlinked while other links remain: POSIX semaphores are made that way.
    "link-remap",
    f"ghost-limit {_GHOST_LIMIT}",
    # A peer outside cannot be restored: connections come back closed, which clients handle as a restart.
    "tcp-close",
    "skip-in-flight",
    # Nothing of a connection is dumped, so no packet has to be kept from it: no iptables rules are made
    # that a killed CRIU would leave behind in a namespace that outlives the container.
    "network-lock skip",
)
# Podman calls with almost no environment, and CRIU needs tar and ip.
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def restore(cgroup: str, connections: bool) -> Iterator[str]:
    """The options of a restore into `cgroup`, a path on the v2 hierarchy; "" where there is none.

    `connections`: whether the images have some that survive (connections.py); the others are closed in them already.

    There CRIU puts the tree into the cgroups that its images name: runc 1.1 tells it the new root on v1 alone, and the
    tree would be in the source's cgroup, made anew if that is gone.
    """
    # The tree must not run before its memory is verified, nor before `start`.
    yield "leave-stopped"
    if not connections:
        yield "tcp-close"  # whatever `--tcp-established` says, which runc does not leave to this file
    # What CRIU would take for two words or for a controller's name (criu/config.c) is left to cgroups.take.
    if cgroup and cgroup.isascii() and not set(cgroup) & set(" \t\n\"'#:\\"):
        yield f"cgroup-root {cgroup}"


def write(path: str, options: Iterable[str]) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.writelines(option + "\n" for option in options)


def environment(option_file: str, criu: str) -> dict[str, str]:
    """The environment for runc: CRIU's options, and PATH with the right `criu` first (runc looks for it there)."""
    path = os.environ.get("PATH") or _PATH
    env = {key: value for key, value in os.environ.items() if key not in ("CRIU_CONFIG_FILE", "NOTIFY_SOCKET")}
    env["CRIU_CONFIG_FILE"] = option_file
    env["PATH"] = f"{os.path.dirname(criu)}:{path}" if criu else path
    return env
