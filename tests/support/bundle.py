"""OCI bundles whose root filesystem is an overlay mount, as containerd hands them to a runtime."""

from __future__ import annotations

import copy
import json
import os
import shutil
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from support.proc import command

ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}
CAPABILITIES = [  # containerd's default set
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
]


def cgroup_parent() -> str:
    """The cgroup above those of all bundles of this test process."""
    return f"/rewarm-test-{os.getpid()}"


def device(path: Path) -> dict[str, Any]:
    """A device node of this machine, for `Bundle(devices=…)`. Raises OSError, ValueError if it is none."""
    status = path.stat()
    kind = {stat.S_IFCHR: "c", stat.S_IFBLK: "b"}.get(stat.S_IFMT(status.st_mode))
    if kind is None:
        raise ValueError(f"{path} is no device node")
    major, minor = os.major(status.st_rdev), os.minor(status.st_rdev)
    mode = stat.S_IMODE(status.st_mode)
    return {"path": str(path), "type": kind, "major": major, "minor": minor, "fileMode": mode, "uid": 0, "gid": 0}


def bind(source: Path, destination: str, *options: str) -> dict[str, Any]:
    """A bind mount for `Bundle(mounts=…)`; `options` are added to rbind, "ro" for example."""
    return {"destination": destination, "type": "bind", "source": str(source), "options": ["rbind", *options]}


class Bundle:
    """A bundle in `directory`: config.json, and rootfs/, an overlay of `layers` (lowest first) with its own upper.

    The specification is `runc spec`'s, without a terminal and rlimits, writable, with containerd's capabilities, the
    cgroup /rewarm-test-PID/NAME, and the network namespace at `network` (a new empty one when None). A mount with a
    default mount's destination replaces it: a bind mount on /dev/shm is what Kubernetes makes. `devices` are nodes
    (entries of linux.devices) that its cgroup allows too, after the default denial of everything. `name` is the
    directory's last component. `close` unmounts and removes all.
    """

    def __init__(
        self,
        directory: Path,
        layers: Sequence[Path],
        args: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        annotations: Mapping[str, str] | None = None,
        network: Path | None = None,
        mounts: Sequence[Mapping[str, Any]] = (),
        seccomp: Mapping[str, Any] | None = None,
        hostname: str = "rewarm-test",
        cwd: str = "/",
        user: tuple[int, int] = (0, 0),
        extra_capabilities: Sequence[str] = (),
        devices: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self.directory = directory
        self.name = directory.name
        self.rootfs = directory / "rootfs"
        self.upper = directory / "upper"
        self.cgroup = f"{cgroup_parent()}/{self.name}"
        work = directory / "work"
        for item in (self.rootfs, self.upper, work):
            item.mkdir(parents=True)
        self.spec = _default_spec(directory)
        process = self.spec["process"]
        process["args"] = list(args)
        process["env"] = [f"{key}={value}" for key, value in {**ENVIRONMENT, **(env or {})}.items()]
        process["cwd"] = cwd
        process["user"] = {"uid": user[0], "gid": user[1]}
        capabilities = [*CAPABILITIES, *extra_capabilities]
        process["capabilities"] = dict.fromkeys(("bounding", "effective", "permitted"), capabilities)
        self.spec["hostname"] = hostname
        self.spec["annotations"] = dict(annotations or {})
        for mount in mounts:
            self.spec["mounts"] = [m for m in self.spec["mounts"] if m["destination"] != mount["destination"]]
            self.spec["mounts"].append(dict(mount))
        linux = self.spec["linux"]
        linux["cgroupsPath"] = self.cgroup
        linux["namespaces"] = [n for n in linux["namespaces"] if n["type"] != "network"]
        linux["namespaces"].append({"type": "network"} if network is None else _network(network))
        for entry in devices:
            linux.setdefault("devices", []).append(dict(entry))
            rule = {key: entry[key] for key in ("type", "major", "minor")}
            linux["resources"]["devices"].append({"allow": True, **rule, "access": "rwm"})
        if seccomp is not None:
            linux["seccomp"] = dict(seccomp)
        self.write()
        lower = ":".join(str(layer) for layer in reversed(layers))
        command(
            *("mount", "-t", "overlay", "overlay", "-o", f"lowerdir={lower},upperdir={self.upper},workdir={work}"),
            self.rootfs,
        )

    def write(self) -> None:
        """Writes `spec`, which a test may have changed, to config.json."""
        (self.directory / "config.json").write_text(json.dumps(self.spec, indent=1))

    def __enter__(self) -> Bundle:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Unmounts everything below the bundle, removes its directory; a second call does nothing."""
        unmount_below(self.directory)
        if self.directory.exists():
            shutil.rmtree(self.directory)


def unmount_below(directory: Path) -> None:
    """Unmounts every mount at or below `directory`, the newest first. Raises CommandFailed for one that is busy."""
    below = f"{directory}/"
    targets = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        target = line.split(" ")[4].encode().decode("unicode_escape")
        if target == str(directory) or target.startswith(below):
            targets.append(target)
    for target in reversed(targets):
        command("umount", target)


_spec: dict[str, Any] = {}


def _default_spec(directory: Path) -> dict[str, Any]:
    """What `runc spec` writes, less terminal, rlimits and the read-only root; a deep copy, made once a process."""
    if not _spec:
        command("runc", "spec", "--bundle", directory)
        _spec.update(json.loads((directory / "config.json").read_text()))
        _spec["process"]["terminal"] = False
        del _spec["process"]["rlimits"]  # raising one needs CAP_SYS_RESOURCE, which a test machine may lack
        _spec["root"]["readonly"] = False
    return copy.deepcopy(_spec)


def _network(path: Path) -> dict[str, str]:
    return {"type": "network", "path": str(path)}
