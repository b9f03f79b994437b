"""config.json: read, changed, put back.

Only these are ever added to a container's spec: the control directory's mount, that of the Python hook with its
PYTHONPATH, the denial of io_uring, for one with GPUs the device memory library with its LD_PRELOAD, and (for the time
of a restore) the hook that applies the rootfs diff. What a user may not ask for is taken out: `org.criu.config`,
`org.systemd.property.*`.
"""

from __future__ import annotations

import copy
import json
import os
from typing import Any

from rewarm import processes
from rewarm.errors import OciError

Spec = dict[str, Any]

CONTROL_DESTINATION = "/run/rewarm"
LIBRARY_DESTINATION = "/run/rewarm-device-memory.so"
"""Where the device memory library is in a container."""
HOOKS_DESTINATION = "/run/rewarm-hooks"
"""Where Python programs in a container find `rewarm_hooks.workload`."""
OWN_DESTINATIONS = (CONTROL_DESTINATION, LIBRARY_DESTINATION, HOOKS_DESTINATION)
_PRELOAD, _PYTHON = "LD_PRELOAD", "PYTHONPATH"
# What runc's `features` lists as potentially unsafe: a file of CRIU options on the node, what hooks are told is the
# bundle, and what systemd is told of the container's unit (beside what CRI-O itself says there).
_UNSAFE = ("org.criu.config", "bundle")
_UNIT = "org.systemd.property."
_UNIT_KEPT = tuple(_UNIT + name for name in ("CollectMode", "DefaultDependencies", "TimeoutStopUSec"))
_IO_URING = ("io_uring_setup", "io_uring_enter", "io_uring_register")
_EPERM = 1
_LARGEST = 64 << 20


def load(bundle: str) -> Spec:
    """The bundle's config.json; OciError when it is missing, too large or not an object."""
    path = os.path.join(bundle, "config.json")
    try:
        with open(path, "rb") as file:
            data = file.read(_LARGEST + 1)
        if len(data) > _LARGEST:
            raise ValueError("larger than 64 MiB")
        spec = json.loads(data)
    except (OSError, ValueError, RecursionError) as error:
        raise OciError("read container spec", path, str(error)) from error
    if not isinstance(spec, dict):
        raise OciError("read container spec", path, "it is not a JSON object")
    return spec


def save(bundle: str, spec: Spec) -> None:
    """Replace config.json in one step, its mode kept: a reader sees the old one or the new one."""
    path = os.path.join(bundle, "config.json")
    write_atomically(path, encode(spec), os.stat(path).st_mode & 0o7777)


def encode(spec: Spec) -> bytes:
    """The spec as `save` writes it."""
    return json.dumps(spec).encode()


def digest_of(data: bytes) -> str:
    from blake3 import blake3  # `start` does without

    return blake3(data).hexdigest()


def scratch(path: str, pid: int) -> str:
    """The name under which process `pid` writes what will be `path`."""
    return f"{path}.rewarm-{pid}"


def scratches(path: str) -> list[str]:
    """The files under such names beside `path`, whose processes are no more."""
    directory, name = os.path.split(scratch(path, 0)[:-1])
    try:
        found = [(one, one.removeprefix(name)) for one in os.listdir(directory) if one.startswith(name)]
    except FileNotFoundError:
        return []
    return [
        os.path.join(directory, one) for one, pid in found if pid.isdigit() and processes.start_time(int(pid)) is None
    ]


def write_atomically(path: str, data: bytes, mode: int = 0o600) -> None:
    temporary = scratch(path, os.getpid())
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            os.fchmod(file.fileno(), mode)  # whatever the caller's umask says
        os.rename(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def spec_annotations(spec: Spec) -> dict[str, str]:
    found = spec.get("annotations") or {}
    return {str(key): str(value) for key, value in found.items()} if isinstance(found, dict) else {}


def rootfs(bundle: str, spec: Spec) -> str:
    """The host's path of the root filesystem, which is mounted before `create` is called."""
    path = (spec.get("root") or {}).get("path") or "rootfs"
    return os.path.join(bundle, path)


def mounts(spec: Spec) -> list[tuple[str, str]]:
    """(destination, type) of every mount, `bind` for all bind mounts, in the spec's order."""
    found = []
    for mount in spec.get("mounts") or []:
        kind = "bind" if is_bind(mount) else str(mount.get("type") or "none")
        found.append((os.path.normpath(str(mount.get("destination", ""))), kind))
    return found


def is_bind(mount: dict[str, Any]) -> bool:
    options = mount.get("options") or []
    return mount.get("type") == "bind" or "bind" in options or "rbind" in options


def bind_source(spec: Spec, destination: str) -> str:
    """The node's path behind the bind mount at `destination`, or "" when there is no such bind mount."""
    mount = bind_at(spec, destination)
    return "" if mount is None else str(mount.get("source", ""))


def bind_at(spec: Spec, destination: str) -> dict[str, Any] | None:
    """The bind mount at `destination`."""
    for mount in spec.get("mounts") or []:
        if is_bind(mount) and os.path.normpath(str(mount.get("destination", ""))) == destination:
            return dict(mount)
    return None


def is_read_only(mount: dict[str, Any]) -> bool:
    return any(option in ("ro", "rro") for option in mount.get("options") or [])


def has_users(spec: Spec) -> bool:
    """Whether it runs in a user namespace."""
    linux = spec.get("linux") or {}
    kinds = [namespace.get("type") for namespace in linux.get("namespaces") or []]
    return "user" in kinds or bool(linux.get("uidMappings"))


def joined(spec: Spec, kind: str) -> str:
    """The file of the namespace of this kind that it shares with others; "" where it has one of its own, or none."""
    for namespace in (spec.get("linux") or {}).get("namespaces") or []:
        if namespace.get("type") == kind and namespace.get("path"):
            return str(namespace["path"])
    return ""


def prepared(spec: Spec, control: str | None, library: str | None = None, hooks: str | None = None) -> Spec:
    """A copy of the spec that a capturable container runs with.

    `control` is the node's directory for the control mount, `library` the node's file for the device memory
    library, `hooks` the node's directory with the Python hook, or None to add no such mount. Preparing a prepared spec
    changes nothing more.
    """
    spec = copy.deepcopy(spec)
    if isinstance(spec.get("annotations"), dict):
        spec["annotations"] = {key: value for key, value in spec["annotations"].items() if not _is_unsafe(key)}
    linux = spec.setdefault("linux", {})
    linux["seccomp"] = without_io_uring(linux.get("seccomp"))
    others = [m for m in spec.get("mounts") or [] if m.get("destination") not in OWN_DESTINATIONS]
    for destination, source, options in (
        (CONTROL_DESTINATION, control, ["rw", "nosuid", "nodev", "noexec"]),
        # It may come from a file system with noexec.
        (LIBRARY_DESTINATION, library, ["ro", "nosuid", "nodev", "exec"]),
        (HOOKS_DESTINATION, hooks, ["ro", "nosuid", "nodev", "noexec"]),
    ):
        if source is not None:
            mount = {"destination": destination, "type": "bind", "source": source, "options": ["bind", *options]}
            others.append(mount)
    spec["mounts"] = others
    process = spec.get("process")
    if isinstance(process, dict) and (isinstance(process.get("env"), list) or library is not None or hooks is not None):
        process["env"] = _environment(process.get("env") or [], library is not None, hooks is not None)
    return spec


def _environment(env: list[Any], library: bool, hooks: bool) -> list[Any]:
    """With the library in front of what LD_PRELOAD names already, and the hook behind what PYTHONPATH does, or without
    them."""
    own = {_PRELOAD: "", _PYTHON: ""}
    found = []
    for word in env:
        key, _, value = str(word).partition("=")
        if key in own:
            own[key] = value
        else:
            found.append(word)
    own = without_own(own)
    for key, values in (
        (_PRELOAD, (LIBRARY_DESTINATION * library, own.get(_PRELOAD))),
        (_PYTHON, (own.get(_PYTHON), HOOKS_DESTINATION * hooks)),
    ):
        if value := ":".join(filter(None, values)):
            found.append(f"{key}={value}")
    return found


def without_own(environment: dict[str, str]) -> dict[str, str]:
    """An environment as it was before rewarm added to it. An empty LD_PRELOAD or PYTHONPATH is the same as none."""
    values = {
        _PRELOAD: f"{environment.get(_PRELOAD, '')}:".removeprefix(f"{LIBRARY_DESTINATION}:")[:-1],
        _PYTHON: f":{environment.get(_PYTHON, '')}".removesuffix(f":{HOOKS_DESTINATION}")[1:],
    }
    others = {key: value for key, value in environment.items() if key not in values}
    return {**others, **{key: value for key, value in values.items() if value}}


def without_io_uring(seccomp: Spec | None) -> Spec:
    """The seccomp profile with `io_uring_*` denied by EPERM, on top of what it says already.

    CRIU cannot dump an io_uring, and event loops fall back to epoll when they may not have one.
    libseccomp refuses two actions for one system call, so the names are taken out of the other rules.
    """
    if not seccomp:
        seccomp = {
            "defaultAction": "SCMP_ACT_ALLOW",
            "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"]
            if os.uname().machine == "x86_64"
            else ["SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"],
        }
    result = dict(seccomp)
    rules = []
    for rule in seccomp.get("syscalls") or []:
        names = [name for name in rule.get("names") or [] if name not in _IO_URING]
        if names:
            rules.append({**rule, "names": names})
    denial = {"names": list(_IO_URING), "action": "SCMP_ACT_ERRNO", "errnoRet": _EPERM}
    same_as_default = seccomp.get("defaultAction") == "SCMP_ACT_ERRNO" and seccomp.get("defaultErrnoRet", 1) == _EPERM
    # libseccomp rejects a rule whose action is the default one.
    result["syscalls"] = rules if same_as_default else [*rules, denial]
    return result


def with_hook(spec: Spec, argv: list[str], timeout: int) -> Spec:
    """A copy of the spec with a `createRuntime` hook in front of its own (runc runs these on restore too)."""
    spec = copy.deepcopy(spec)
    hooks = spec.setdefault("hooks", {})
    hook = {"path": argv[0], "args": argv, "timeout": timeout}
    hooks["createRuntime"] = [hook, *(hooks.get("createRuntime") or [])]
    return spec


def _is_unsafe(annotation: str) -> bool:
    return annotation in _UNSAFE or (annotation.startswith(_UNIT) and annotation not in _UNIT_KEPT)


def digest(value: object) -> str:
    """A short name for a part of a spec, to compare it with the same part of another."""
    if not value:
        return ""
    return digest_of(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())[:32]


def memory_limit(spec: Spec) -> int | None:
    """The container's memory limit in bytes, None without one."""
    limit = (((spec.get("linux") or {}).get("resources") or {}).get("memory") or {}).get("limit")
    return int(limit) if isinstance(limit, int) and limit > 0 else None
