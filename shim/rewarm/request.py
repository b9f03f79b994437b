"""What a container asks for: its `rewarm.dev/…` annotations and its spec, as one request."""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass

from rewarm.errors import RequestError
from rewarm.oci.spec import OWN_DESTINATIONS, Spec, digest, mounts, spec_annotations, without_library
from rewarm.settings import ENGINES, Settings
from rewarm.store.names import ALLOWED, is_name

PREFIX = "rewarm.dev/"
_SANDBOX_NAMESPACE = "io.kubernetes.cri.sandbox-namespace"
_CONTAINER_TYPE = "io.kubernetes.cri.container-type"
_CONTAINER_NAME = "io.kubernetes.cri.container-name"
_IMAGE_NAMES = ("io.kubernetes.cri.image-name", "org.opencontainers.image.ref.name", "io.containerd.image.name")

_CHOICES = {
    "capture": ("never", "on-ready"),
    "on-miss": ("cold-start", "fail"),
    "device-memory": ("auto", "off"),
    "engine": ENGINES,
}
_FREE = ("snapshot", "container", "ready")
_HTTP = re.compile(r"http://:(\d{1,5})(/[!-~]{0,512})")
_LONGEST_SHOWN = 80


@dataclass(frozen=True)
class Request:
    """A container's opt-in. `snapshot` is the name to look for, already derived when the annotation says `auto`."""

    snapshot: str
    namespace: str
    capture: str = "never"
    ready: str = "file"
    on_miss: str = "cold-start"
    device_memory: str = "auto"
    engine: str = "none"


def parse(spec: Spec, settings: Settings) -> Request | None:
    """The request in a spec; None when the container has not opted in, is another of its pod, or is a pod's sandbox.

    Raises RequestError for an unknown key under the prefix or a value that is not allowed; the message
    names the key, the value and what is allowed.
    """
    found = spec_annotations(spec)
    ours = {key[len(PREFIX) :]: value for key, value in found.items() if key.startswith(PREFIX)}
    if "snapshot" not in ours or found.get(_CONTAINER_TYPE) == "sandbox":
        return None
    for key, value in ours.items():
        _check(key, value)
    if "container" in ours and found.get(_CONTAINER_NAME, ours["container"]) != ours["container"]:
        return None
    namespace = found.get(_SANDBOX_NAMESPACE, "default")
    if not is_name(namespace):
        raise RequestError("read annotation", _SANDBOX_NAMESPACE, f"{_shown(namespace)} is not a namespace")
    snapshot = ours["snapshot"]
    return Request(
        snapshot=derived_name(spec, settings) if snapshot == "auto" else snapshot,
        namespace=namespace,
        capture=ours.get("capture", "never"),
        ready=ours.get("ready", "file"),
        on_miss=ours.get("on-miss", settings.on_miss),
        device_memory=ours.get("device-memory", "auto"),
        engine=ours.get("engine", "none"),
    )


def without_effect(spec: Spec) -> list[str]:
    """A line for each annotation under the prefix of a container that has not opted in: a typing error, as a rule."""
    found = spec_annotations(spec)
    if f"{PREFIX}snapshot" in found or found.get(_CONTAINER_TYPE) == "sandbox":
        return []
    ours = sorted(key for key in found if key.startswith(PREFIX))
    return [f"annotation {_shown(key)} has no effect without {PREFIX}snapshot" for key in ours[:8]]


def _check(key: str, value: str) -> None:
    name = PREFIX + _shown(key)[1:-1]
    if key in _CHOICES:
        if value not in _CHOICES[key]:
            raise RequestError("read annotation", name, f"{_shown(value)} is not one of {', '.join(_CHOICES[key])}")
    elif key not in _FREE:
        known = ", ".join(sorted((*_CHOICES, *_FREE)))
        raise RequestError(
            "read annotation", name, f"there is no such key (value {_shown(value)})", f"known are {known}"
        )
    elif key == "ready":
        if not (value == "file" or _valid_http(value) or (value.startswith("exec:") and value[5:].strip())):
            raise RequestError(
                "read annotation", name, f"{_shown(value)} is not one of file, http://:PORT/PATH, exec:CMD"
            )
    elif not is_name(value):
        raise RequestError("read annotation", name, f"{_shown(value)} is not a name", ALLOWED)


def _valid_http(value: str) -> bool:
    found = _HTTP.fullmatch(value)
    return found is not None and 0 < int(found[1]) < 65536


def http_target(ready: str) -> tuple[int, str]:
    """Port and path of a `ready` value that starts with http:// (already checked by `parse`)."""
    found = _HTTP.fullmatch(ready)
    assert found is not None
    return int(found[1]), found[2]


def _shown(value: str) -> str:
    """A value fit for one log line: control characters escaped, never longer than a line should be."""
    text = repr(value[:_LONGEST_SHOWN])
    return text if len(value) <= _LONGEST_SHOWN else f"{text[:-1]}…'"


def image_name(spec: Spec) -> str:
    """The image as the engine annotates it, or "" where no engine did."""
    found = spec_annotations(spec)
    return next((found[key] for key in _IMAGE_NAMES if found.get(key)), "")


def environment(spec: Spec) -> dict[str, str]:
    """The container's own, without what rewarm has added."""
    words = (spec.get("process") or {}).get("env") or []
    found = dict(word.partition("=")[::2] for word in map(str, words))
    if "LD_PRELOAD" in found:
        found["LD_PRELOAD"] = without_library(found["LD_PRELOAD"])
        if not found["LD_PRELOAD"]:  # which is the same as none
            del found["LD_PRELOAD"]
    return found


def environment_keys(spec: Spec, settings: Settings) -> tuple[str, ...]:
    """The keys that matter for fitting: without those that differ from pod to pod (`ignore_env`)."""
    keys = environment(spec)
    return tuple(sorted(k for k in keys if not any(fnmatch.fnmatchcase(k, glob) for glob in settings.ignore_env)))


def derived_name(spec: Spec, settings: Settings) -> str:
    """The name that `auto` stands for: equal for containers that one snapshot can serve."""
    identity = {
        "image": image_name(spec),
        "args": list((spec.get("process") or {}).get("args") or []),
        "env": sorted((key, environment(spec)[key]) for key in environment_keys(spec, settings)),
        "mounts": sorted(m for m in mounts(spec) if m[0] not in OWN_DESTINATIONS),
    }
    return "auto-" + digest(identity)[:20]
