"""Facts about this node that decide whether a snapshot fits it."""

from __future__ import annotations

import json
import os
import re

from rewarm import installation, private
from rewarm.errors import RewarmError
from rewarm.settings import Settings

MINIMUM_CRIU = (4, 1, 1)
# Linux 6.16 answers getsockopt(SO_PASSCRED) on an inet socket with EOPNOTSUPP; CRIU dumps such sockets since 4.2.
MINIMUM_CRIU_SINCE_6_16 = (4, 2, 0)
_NUMBER = re.compile(r"(\d+)(?:\.(\d+))?(?:\.(\d+))?")


def architecture() -> str:
    return os.uname().machine


def threads(settings: Settings) -> int:
    """How many threads memory is read and written with: the setting, else the CPUs that this process may use."""
    return settings.threads or len(os.sched_getaffinity(0))


def kernel() -> str:
    return os.uname().release


def cpu_features() -> tuple[str, ...]:
    """The CPU's feature flags as the kernel names them, without those that say nothing about instructions."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith(("flags", "Features")):
                    return tuple(sorted(set(line.partition(":")[2].split())))
    except OSError as error:
        raise RewarmError("read CPU features", "/proc/cpuinfo", error.strerror or str(error)) from error
    return ()


def cgroup_version() -> int:
    """2 where /sys/fs/cgroup is the unified hierarchy, else 1 (the hybrid layout has v1's controllers)."""
    return 2 if os.path.exists("/sys/fs/cgroup/cgroup.controllers") else 1


def version_tuple(text: str) -> tuple[int, int, int]:
    """The first number in a version text, as three; (0, 0, 0) when there is none."""
    found = _NUMBER.search(text)
    return (0, 0, 0) if found is None else (int(found[1]), int(found[2] or 0), int(found[3] or 0))


def criu_needed() -> tuple[int, int, int]:
    return MINIMUM_CRIU_SINCE_6_16 if version_tuple(kernel()) >= (6, 16, 0) else MINIMUM_CRIU


def criu_binary(settings: Settings) -> str:
    """The criu to use: the settings', else the one of rewarm's own prefix, else PATH's; "" when there is none."""
    if settings.criu != "auto":
        return settings.criu
    own = installation.criu()
    if os.access(own, os.X_OK):
        return own
    import shutil  # only nodes without rewarm's own criu come here

    return shutil.which("criu") or ""


def version_of(binary: str, settings: Settings) -> str:
    """The version that `BINARY --version` prints first, e.g. "1.1.5"; "" when it prints none.

    Asked once for each state of the file: starting runc or CRIU costs 10 to 20 ms, which is a part of
    what a restore may cost. The answers are kept in the state directory, which a reboot empties.
    """
    try:
        status = os.stat(binary)
    except OSError:
        return ""
    key = f"{os.path.realpath(binary)}:{status.st_mtime_ns}:{status.st_size}"
    path = os.path.join(settings.state_dir, "versions.json")
    known = _known(path)
    if key in known:
        return known[key]
    import subprocess  # the first call of a boot only

    try:
        done = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RewarmError("ask for the version", binary, str(error), "reinstall it") from error
    found = _NUMBER.search(done.stdout)
    version = found[0] if found else ""
    if version:
        _remember(path, {**known, key: version})
    return version


def _known(path: str) -> dict[str, str]:
    try:
        with open(path, "rb") as file:
            found = json.loads(file.read(1 << 16))
    except (OSError, ValueError):
        return {}  # it is only a cache
    return {str(k): str(v) for k, v in found.items()} if isinstance(found, dict) else {}


def _remember(path: str, known: dict[str, str]) -> None:
    temporary = f"{path}.{os.getpid()}"
    try:
        private.make(os.path.dirname(path))
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with open(fd, "w", encoding="ascii") as file:
            json.dump(dict(list(known.items())[-16:]), file)
        os.rename(temporary, path)
    except OSError:
        return  # without the cache the next call asks again
