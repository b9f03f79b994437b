"""The node's settings: /etc/rewarm/config.yaml, every key with a default, anything unknown refused by name.

`runtimes` and `state_dir` are also read by the C launcher (native/launcher.c); their form is part of its contract.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from . import lines, policy
from .annotation import ON_MISS
from .errors import SettingsError

DEFAULT_PATH = "/etc/rewarm/config.yaml"
MAX_BYTES = 1 << 20
MAX_SECONDS = 86400.0
COMPRESSIONS = ("auto", "zstd", "off")
MAX_THREADS = 1024
MAX_SIZE = 1 << 60
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}

# Kubernetes adds variables for every service of the namespace, so they differ from pod to pod and from day to day.
_IGNORE_ENV = (
    "*_SERVICE_HOST",
    "*_SERVICE_PORT",
    "*_SERVICE_PORT_*",
    "*_PORT",
    "*_PORT_*_TCP*",
    "*_PORT_*_UDP*",
    "*_PORT_*_SCTP*",
    "HOSTNAME",
)


def _runtime_roots() -> tuple[str, ...]:
    roots = ("/run/runc", "/run/containerd/runc/*", "/run/docker/runtime-runc/*")
    if os.path.realpath("/var/run") == os.path.realpath("/run"):
        return roots
    return roots + tuple(f"/var{root}" for root in roots)


class Settings(NamedTuple):
    """Settings of one node. Times are seconds; paths are absolute."""

    store: str = "/var/lib/rewarm/store"
    """A directory, or a file:// URL of one."""
    runtimes: tuple[str, ...] = ("runc",)
    """Low-level runtimes: the first that PATH has is used."""
    runtime_roots: tuple[str, ...] = _runtime_roots()
    """Globs of runc roots in which `rewarm capture` looks for a container."""
    criu: str = "auto"
    """Path of criu; auto: the one that the install provided, or PATH's."""
    deadline: float = 60.0
    """A restore that takes longer is given up for a cold start, in time for the kubelet (deadline.py)."""
    on_miss: str = "cold-start"
    """What a container gets that does not say: cold-start or fail."""
    state_dir: str = "/run/rewarm"
    work_dir: str = "/var/lib/rewarm/work"
    """Large temporary files; on the store's file system a capture links them instead of copying."""
    ready_timeout: float = 600.0
    """How long a watcher waits for a container to become ready."""
    capture_timeout: float = 600.0
    compression: str = "auto"
    """Of memory in the store: auto, zstd or off. auto measures whether it makes restores faster."""
    threads: int = 0
    """Threads that move memory in a restore or capture; 0: as many as there are processors for the process."""
    cache: str = "auto"
    """The node's own copy of packs: a directory, off, or auto: /var/lib/rewarm/cache if the store is not local."""
    cache_size: int = 50 * 10**9
    """Bytes that the cache may take."""
    read_ahead: int = 8 * 10**9
    """Bytes of memory that a restore may read before CRIU has made the processes; never more than a sixteenth of what
    is available beside the container's own."""
    libcuda: str = "auto"
    """Path of libcuda.so.1; auto: where NVIDIA's driver, images of nodes and the GPU operator put it."""
    gpu_lock_timeout: float = 30.0
    """How long a capture waits for what the GPUs still have to do for the container."""
    gpu_copy: int = 0
    """Percentage of a GPU's free memory that a capture may take for a copy, so that the source need not wait for the
    store; 0: none. Others miss it until all is stored."""
    engine_timeout: float = 60.0
    """How long an engine named by rewarm.dev/engine may take to be quiet before a capture, and to go on after it."""
    ignore_env: tuple[str, ...] = _IGNORE_ENV
    """Globs of environment keys that may differ between a snapshot and a container."""
    namespaces: Mapping[str, policy.Policy] = MappingProxyType({})
    """What pods of a namespace may, by its name, or by "*" for all that are not named."""


def store_directory(store: str) -> str:
    """The directory that a `store` setting names. Raises ValueError that says what is wrong with it."""
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):", store)
    if scheme and scheme[1].lower() != "file":
        raise ValueError(f"scheme {scheme[1]} is not supported")
    path = store
    if scheme:
        from urllib.parse import unquote, urlsplit  # only for who writes an URL; a restore has no time for it

        url = urlsplit(store)
        if url.netloc not in ("", "localhost") or url.query or url.fragment:
            raise ValueError("a file URL has no host, query or fragment")
        path = unquote(url.path)
    if not path.startswith("/") or "\0" in path:
        raise ValueError("is not an absolute path")
    return os.path.normpath(path)


def load(path: Path | None = None) -> Settings:
    """The settings from `path`, else from $REWARM_CONFIG, else from /etc/rewarm/config.yaml; an absent file is all
    defaults.

    Raises SettingsError that names the file, the key, the value and what is allowed; also for a file that someone
    other than root could have written, since it names programs that run as root.
    """
    file = str(path) if path is not None else os.environ.get("REWARM_CONFIG") or DEFAULT_PATH
    text = _read(file)
    if text is None:
        return Settings()
    document = _parse(file, text)
    known = {name: _CHECKS[name] for name in Settings._fields}
    values: dict[str, Any] = {}
    for key, value in document.items():
        if key not in known:
            allowed = ", ".join(known)
            raise SettingsError("read settings", file, f"unknown key {_show(key)}", f"allowed keys: {allowed}")
        check, wanted = known[key]
        try:
            values[key] = check(value)
        except ValueError as error:
            cause = f"{key} has the bad value {_show(value)}" + (f" ({error})" if str(error) else "")
            raise SettingsError("read settings", file, cause, f"allowed: {wanted}") from None
    return Settings(**values)


def without_mistakes() -> Settings:
    """What the node has where `load` raises: the defaults, with the state directory that the file names nevertheless,
    since the launcher, which passes over what it does not know, looks for containers there."""
    file = os.environ.get("REWARM_CONFIG") or DEFAULT_PATH
    try:
        return Settings(state_dir=_path(_parse(file, _read(file) or b"").get("state_dir")))
    except (SettingsError, ValueError):
        return Settings()


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _read(file: str) -> bytes | None:
    try:
        # Non-blocking, so that a FIFO in its place cannot hang the runtime.
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SettingsError("read settings", file, error.strerror or str(error), "make it a readable file") from None
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise SettingsError("read settings", file, "is not a regular file", "put a YAML file there")
        if status.st_uid != 0 or status.st_mode & 0o022:
            cause = f"owner {status.st_uid}, mode {stat.S_IMODE(status.st_mode):04o}: others than root may write it"
            raise SettingsError("read settings", file, cause, f"run: chown 0:0 {file} && chmod 644 {file}")
        with os.fdopen(fd, "rb", closefd=False) as handle:
            text = handle.read(MAX_BYTES + 1)
    except OSError as error:
        raise SettingsError("read settings", file, error.strerror or str(error)) from None
    finally:
        os.close(fd)
    if len(text) > MAX_BYTES:
        raise SettingsError("read settings", file, f"is longer than {MAX_BYTES} bytes")
    return text


def _parse(file: str, text: bytes) -> dict[Any, Any]:
    found = lines.read(text)
    return _parse_yaml(file, text) if found is None else found


def _parse_yaml(file: str, text: bytes) -> dict[Any, Any]:
    import yaml  # costs more than the rest of the settings together, and most nodes have plain lines

    base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

    class Loader(base):  # type: ignore[misc]
        """A safe loader that refuses a key written twice, of which YAML would silently take the last."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            for index, key in enumerate(keys):
                if key in keys[:index]:
                    raise SettingsError("read settings", file, f"key {_show(key)} is there twice", "remove one of them")
            result: dict[Any, Any] = super().construct_mapping(node, deep)
            return result

    try:
        document = yaml.load(text, Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        cause = " ".join(str(error).split())[:300]
        raise SettingsError("read settings", file, f"is not YAML: {cause}", "correct the file") from None
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise SettingsError("read settings", file, "is not a mapping of keys to values", "write `key: value` lines")
    return document


def _store(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError
    store_directory(value)
    return value


def _path(value: object) -> str:
    if not isinstance(value, str) or not value.startswith("/") or "\0" in value or value.strip() != value:
        raise ValueError
    return value


def _auto_or_path(value: object) -> str:
    return "auto" if value == "auto" else _path(value)


def _cache(value: object) -> str:
    # YAML 1.1 makes false of an off that is not quoted.
    return "off" if value is False else str(value) if value in ("auto", "off") else _path(value)


def _compression(value: object) -> str:
    if value is False:
        return "off"
    if value not in COMPRESSIONS:
        raise ValueError
    return str(value)


def _threads(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_THREADS:
        raise ValueError
    return value


def _percentage(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 50:
        raise ValueError
    return value


def _size(value: object) -> int:
    if isinstance(value, str):
        found = re.match(r"([0-9]{1,18})([KMGT]?)\Z", value)
        if not found:
            raise ValueError
        value = int(found[1]) * _UNITS[found[2]]
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= MAX_SIZE:
        raise ValueError
    return value


def _seconds(value: object) -> float:
    # The comparison also refuses NaN.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= MAX_SECONDS:
        raise ValueError
    return float(value)


def _on_miss(value: object) -> str:
    if value not in ON_MISS:
        raise ValueError
    return str(value)


def _list(value: object, check: Callable[[str], bool]) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise ValueError("not a list")
    for item in value:
        if not isinstance(item, str) or not item or "\0" in item or not check(item):
            raise ValueError(f"entry {_show(item)}")
    return tuple(value)


def _runtimes(value: object) -> tuple[str, ...]:
    names = _list(value, lambda name: name.startswith("/") or ("/" not in name and not name.startswith("-")))
    if not names:
        raise ValueError
    return names


_SECONDS = (_seconds, f"seconds, above 0 and at most {MAX_SECONDS:.0f}")
_ABSOLUTE = (_path, "an absolute path")
_BYTES = (_size, "bytes above 0, or a number with K, M, G or T behind it, like 50G")
_CHECKS: dict[str, tuple[Callable[[object], Any], str]] = {
    "store": (_store, "an absolute path of a directory, or a file:// URL"),
    "runtimes": (_runtimes, "a list of at least one program name or absolute path"),
    "runtime_roots": (lambda value: _list(value, lambda root: root.startswith("/")), "a list of absolute path globs"),
    "criu": (_auto_or_path, "auto, or an absolute path"),
    "deadline": _SECONDS,
    "on_miss": (_on_miss, " or ".join(ON_MISS)),
    "state_dir": _ABSOLUTE,
    "work_dir": _ABSOLUTE,
    "ready_timeout": _SECONDS,
    "capture_timeout": _SECONDS,
    "compression": (_compression, "auto, zstd or off"),
    "threads": (_threads, f"a whole number from 0 (all processors) to {MAX_THREADS}"),
    "cache": (_cache, "auto, off, or an absolute path"),
    "cache_size": _BYTES,
    "read_ahead": _BYTES,
    "libcuda": (_auto_or_path, "auto, or an absolute path"),
    "gpu_lock_timeout": _SECONDS,
    "gpu_copy": (_percentage, "a whole number from 0 (no copy) to 50, percent"),
    "engine_timeout": _SECONDS,
    "ignore_env": (lambda value: _list(value, lambda glob: "=" not in glob), "a list of globs of environment keys"),
    "namespaces": (policy.read, "a mapping of namespaces, each of share, ignore, pinned, default; see config.yaml"),
}
