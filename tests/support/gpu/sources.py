"""The containers that the tests capture, by name: programs of workloads/gpu with their settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Change = Callable[[dict[str, Any]], None]
GIB = 1 << 30


@dataclass(frozen=True)
class Source:
    """`early`: started with all others at the beginning, since importing PyTorch takes seconds; `served`: opted in, and
    so with the device memory library."""

    case: str
    env: Mapping[str, str] = field(default_factory=dict)
    change: Change | None = None
    early: bool = True
    served: bool = False


def probe_device() -> Path | None:
    """A device of this machine that no container may open by default, and whose opening does nothing."""
    found = (path for path in map(Path, ("/dev/fuse", "/dev/loop-control", "/dev/hpet")) if path.is_char_device())
    return next(found, None)


def limited(spec: dict[str, Any]) -> None:
    """A memory limit and a device of its own: what a restored container must not inherit."""
    import os

    resources = spec["linux"]["resources"]
    resources["memory"] = {"limit": 48 * GIB}
    path = probe_device()
    if path is not None:
        number = path.stat().st_rdev
        rule = {"type": "c", "major": os.major(number), "minor": os.minor(number)}
        resources["devices"].append({"allow": True, **rule, "access": "rwm"})


def gpu_nodes() -> list[Path]:
    """The nodes of the GPUs themselves, in the order of their minor numbers."""
    found = [path for path in Path("/dev").glob("nvidia*") if path.name.removeprefix("nvidia").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("nvidia")))


def only_gpu(index: int) -> Change:
    """Leaves a container one of `gpu_nodes`."""

    def change(spec: dict[str, Any]) -> None:
        others = {str(path) for at, path in enumerate(gpu_nodes()) if at != index}
        linux = spec["linux"]
        nodes = linux.get("devices", [])
        gone = [(node["major"], node["minor"]) for node in nodes if node["path"] in others]
        linux["devices"] = [node for node in nodes if node["path"] not in others]
        rules = linux["resources"]["devices"]
        linux["resources"]["devices"] = [r for r in rules if (r.get("major"), r.get("minor")) not in gone]

    return change


SOURCES: dict[str, Source] = {
    # What the driver can do: results compared bit for bit.
    "server": Source("server", {"GIB": "1"}),
    "float32": Source("server", {"GIB": "0.5", "DTYPE": "float32"}),
    "spawn": Source("spawn"),
    "child": Source("child"),
    "pinned": Source("pinned"),
    "streams": Source("streams"),
    "libraries": Source("libraries"),
    # The pool of compile workers holds the GPU open, and is refused by name; vLLM does without it as well.
    "compiled": Source("compiled", {"TORCHINDUCTOR_COMPILE_THREADS": "1"}),
    # These keep the GPU busy from their start on.
    "threads": Source("threads", early=False),
    "llm": Source("llm", {"LAYERS": "4", "KV_TOKENS": "2048"}, early=False),
    # The same with device memory taken out of its hands.
    "served-server": Source("server", {"GIB": "2"}, served=True),
    "served-child": Source("child", served=True),
    "served-pinned": Source("pinned", served=True),
    "served-streams": Source("streams", served=True),
    "served-threads": Source("threads", early=False, served=True),
    "served-expandable": Source(
        "server", {"GIB": "2", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}, served=True
    ),
    "served-pooled": Source("pooled", {"GIB": "2.5", "KV_GIB": "2"}, served=True),
    "served-killed": Source("server", {"GIB": "1"}, served=True),
    "served-copied": Source("server", {"GIB": "4", "KV_GIB": "4", "KV_USED_MIB": "64"}, served=True),
    "served-damaged": Source("server", {"GIB": "0.5"}, served=True),
    # What it cannot.
    "managed": Source("managed", early=False),
    "exported": Source("exported", early=False),
    "ipc": Source("ipc"),
    # Of the other tests.
    "stopped": Source("server", {"GIB": "0.25"}),
    "twice": Source("server", {"GIB": "0.5"}),
    "remapped": Source("server", {"GIB": "0.5"}, only_gpu(0), early=False),
    "limited": Source("server", {"GIB": "0.5"}, limited),
    "large": Source("server", {"GIB": "2"}),
    "busy": Source("server", {"GIB": "0.25"}),
    "killed-locked": Source("server", {"GIB": "4"}),
    "killed-checkpointed": Source("server", {"GIB": "4"}),
}
