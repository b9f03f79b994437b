"""Checks of the programs that rewarm calls, and of its own."""

from __future__ import annotations

import importlib
import os
import shutil

from rewarm import node as facts
from rewarm.checks import FAILED, OK, WARNING, Check, Node, ask, last_line
from rewarm.oci import runc as low_level

MINIMUM_RUNC = (1, 1, 0)
# Debian's packages. CRIU calls tar and gzip for the content of a tmpfs and ip for a network namespace of its own.
_HELPERS = {"tar": "tar", "gzip": "gzip", "ip": "iproute2", "nsenter": "util-linux"}
_INSTALL = "run install/install.sh again"


def runc(node: Node) -> Check:
    binary = low_level.find(node.settings)
    status, said = ask([binary, "--version"])
    if status != 0:
        return Check("runc", FAILED, f"{binary}: {last_line(said)}", "reinstall it")
    version = facts.version_tuple(said)
    text = ".".join(map(str, version))
    if said.startswith("crun"):
        step = "put runc first in `runtimes` of the settings: crun runs no hooks on a restore"
        return Check("runc", FAILED, f"{binary} is crun {text}", step)
    if version < MINIMUM_RUNC:
        return Check("runc", FAILED, f"{text or 'no version'} ({binary})", "install runc 1.1 or newer")
    return Check("runc", OK, f"{text} ({binary})")


def criu(node: Node) -> Check:
    binary = facts.criu_binary(node.settings)
    needed = ".".join(map(str, facts.criu_needed()))
    step = f"{_INSTALL}, which provides it, or set `criu` in the settings to CRIU {needed} or newer"
    if not binary:
        return Check("criu", FAILED, "not found", step)
    status, said = ask([binary, "--version"])
    if status != 0:
        return Check("criu", FAILED, f"{binary}: {last_line(said)}", step)
    version = facts.version_tuple(said)
    text = f"{'.'.join(map(str, version))} ({binary})"
    if version >= facts.criu_needed():
        return Check("criu", OK, text)
    reason = f"Linux {facts.kernel()} needs {needed}"
    if version >= facts.MINIMUM_CRIU:
        reason += ": older ones cannot dump inet sockets on Linux 6.16 and newer"
    return Check("criu", FAILED, f"{text}; {reason}", step)


def criu_check(node: Node) -> Check:
    """CRIU's own test of the kernel; it needs root."""
    binary = facts.criu_binary(node.settings)
    if not binary:
        return Check("criu check", FAILED, "no CRIU to ask", "see the check before")
    status, said = ask([binary, "check"], timeout=60)
    if status == 0:
        return Check("criu check", OK, last_line(said))
    if os.geteuid() != 0:
        return Check("criu check", WARNING, f"not as user {os.geteuid()}: {last_line(said)}", "run it as root")
    return Check("criu check", FAILED, last_line(said), f"run `{binary} check` and boot a kernel with what it names")


def helpers(node: Node) -> Check:
    missing = [name for name in _HELPERS if shutil.which(name) is None]
    if missing:
        packages = " ".join(_HELPERS[name] for name in missing)
        found = f"not in PATH: {', '.join(missing)}"
        return Check("helper programs", FAILED, found, f"run: apt-get install {packages}")
    return Check("helper programs", OK, ", ".join(_HELPERS))


def installation(node: Node) -> Check:
    """The launcher and the guard, beside the virtual environment that this runs in, and the compiled module."""
    for path in (node.launcher, os.path.join(node.prefix, "libexec", "rewarm-guard")):
        if not os.access(path, os.X_OK):
            found = "is not executable" if os.path.exists(path) else "is not there"
            return Check("installation", FAILED, f"{path} {found}", _INSTALL)
    hook = os.path.join(node.prefix, "lib", "rewarm-hooks", "rewarm_hooks", "workload.py")
    if not os.path.isfile(hook):
        return Check("installation", FAILED, f"{hook}, which containers get, is not there", _INSTALL)
    python = os.path.join(node.prefix, "venv", "bin", "python3")
    if not os.access(python, os.X_OK):
        return Check("installation", FAILED, f"{python}, which the launcher starts, is not there", _INSTALL)
    for module in ("rewarm_native.process", "rewarm_native.memory", "rewarm_hooks.rootfs_diff", "blake3", "zstandard"):
        try:
            importlib.import_module(module)
        except ImportError as error:
            return Check("installation", FAILED, f"{module} cannot be imported: {error}", _INSTALL)
    return Check("installation", OK, node.prefix)
