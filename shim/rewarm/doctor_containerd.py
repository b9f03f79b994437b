"""Check that containerd knows the runtime; Kubernetes uses it by a RuntimeClass with the handler `rewarm`."""

from __future__ import annotations

import os
import shutil
import tomllib
from dataclasses import replace
from typing import Any

from rewarm.checks import OK, WARNING, Check, Node, ask_apart, last_line

# Configuration version 2, and 3 and later.
_PLUGINS = ("io.containerd.grpc.v1.cri", "io.containerd.cri.v1.runtime")
_REGISTER = "run install/install.sh again, or see config/containerd-v2.toml and config/containerd-v3.toml"
_RUNTIME = "rewarm"
_ANNOTATIONS = "rewarm.dev/"
# What a pod's cgroups and files depend on, beside the options.
_COPIED = ("base_runtime_spec", "snapshotter", "sandboxer")


def containerd(node: Node) -> Check:
    """Never a failure: containers of other engines, and of `ctr --runc-binary`, do without."""
    program = shutil.which("containerd") or ""
    if not program and not os.path.exists(node.containerd_config):
        return Check("containerd", OK, "not on this node")
    return registered(node, program)


def registered(node: Node, program: str, copied: str = "") -> Check:
    """What `program` ("": nobody) makes of the node's containerd_config: a warning where the runtime is not in it.

    `copied` is the runtime whose options install.sh has given to rewarm's ("": none), which may have others by now.
    """
    if not os.path.exists(node.containerd_config):
        return Check("containerd", WARNING, f"there is no {node.containerd_config}, so no runtime rewarm", _REGISTER)
    try:
        text, warning = _text(program, node.containerd_config)
        config = tomllib.loads(text)
    except ValueError as error:
        return Check(
            "containerd", WARNING, f"{node.containerd_config} cannot be understood: {error}", "correct the file"
        )
    if {"cri", *_PLUGINS} & set(config.get("disabled_plugins") or []):
        found = f"its CRI plugin is disabled; ctr takes the runtime by its path, {node.launcher}"
        return Check("containerd", OK, found)
    check = _judge(node, _runtimes(config), copied if program else "")
    if check.status != OK and warning:  # such as the key or table that it ignores
        return replace(check, found=f"{check.found}; containerd warns: {last_line(warning)}")
    return check


def _text(program: str, path: str) -> tuple[str, str]:
    """The configuration as containerd itself understands it, imports included; the file alone where it cannot say.

    And its warnings, which are no part of that: of a file that an older containerd wrote a newer one has many.
    """
    if program:
        status, said, warnings = ask_apart([program, "--config", path, "config", "dump"])
        if status == 0:
            return said, warnings
        raise ValueError(last_line(warnings or said))
    with open(path, encoding="utf-8") as file:
        return file.read(), ""


def _runtimes(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    plugins = config.get("plugins") or {}
    found: dict[str, dict[str, Any]] = {}
    for plugin in _PLUGINS:
        found.update(((plugins.get(plugin) or {}).get("containerd") or {}).get("runtimes") or {})
    return found


def _options(runtime: dict[str, Any]) -> dict[str, Any]:
    """What install.sh copies of a runtime, without values that say nothing; its program is its own."""
    found = {**(runtime.get("options") or {}), **{key: runtime.get(key) for key in _COPIED}, "BinaryName": ""}
    return {key: value for key, value in found.items() if value and (key, value) != ("sandboxer", "podsandbox")}


def _differing(runtimes: dict[str, dict[str, Any]], copied: str) -> str:
    """An option in which rewarm's runtime differs from the one that it was copied from; "" if there is none."""
    if not {copied, _RUNTIME} <= runtimes.keys():
        return ""
    ours, theirs = _options(runtimes[_RUNTIME]), _options(runtimes[copied])
    return next((key for key in sorted({**ours, **theirs}) if ours.get(key) != theirs.get(key)), "")


def _judge(node: Node, runtimes: dict[str, dict[str, Any]], copied: str) -> Check:
    binaries = {name: str((table.get("options") or {}).get("BinaryName") or "") for name, table in runtimes.items()}
    ours = [name for name, binary in binaries.items() if os.path.basename(binary) == "rewarm-runc"]
    if not ours:
        found = f"no runtime of {node.containerd_config} is rewarm-runc (it has {', '.join(runtimes) or 'none'})"
        return Check("containerd", WARNING, found, _REGISTER)
    for name in ours:
        if os.path.realpath(binaries[name]) != os.path.realpath(node.launcher):
            found = f"runtime {name} is {binaries[name]}, this installation's is {node.launcher}"
            return Check("containerd", WARNING, found, _REGISTER)
        if not any(glob.startswith(_ANNOTATIONS) for glob in runtimes[name].get("pod_annotations") or []):
            found = f"runtime {name} does not pass on the annotations of pods"
            return Check("containerd", WARNING, found, 'add: pod_annotations = ["rewarm.dev/*"]')
    differs = _differing(runtimes, copied)
    if differs:  # such as the cgroup driver, of which the kubelet has one
        found = f"runtime {_RUNTIME} has another {differs} than runtime {copied}, which was changed since"
        return Check("containerd", WARNING, found, _REGISTER)
    return Check("containerd", OK, f"runtime {', '.join(ours)} of {node.containerd_config} is {node.launcher}")
