"""What a container asks for: its `rewarm.dev/…` annotations and its spec, as one request."""

from __future__ import annotations

import fnmatch
from typing import NamedTuple

from rewarm import annotation, policy
from rewarm.annotation import PREFIX, shown
from rewarm.errors import RequestError
from rewarm.oci import pod
from rewarm.oci.spec import OWN_DESTINATIONS, Spec, digest, mounts, spec_annotations, without_own
from rewarm.settings import Settings


class Request(NamedTuple):
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
    given = _given(spec)
    if "snapshot" not in given or pod.is_sandbox(spec):
        return None
    namespace = _namespace(spec)
    ours = policy.of(settings.namespaces, namespace).apply(given)
    if not ours:
        return None
    for key, value in ours.items():
        if (wrong := annotation.problem(key, value)) is not None:
            raise RequestError("read annotation", PREFIX + shown(key)[1:-1], *wrong)
    if "container" in ours and pod.container(spec) not in ("", ours["container"]):
        return None
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


def why_none(spec: Spec, settings: Settings) -> str:
    """Why a container of runc's alone is that: what `parse` found, and else nobody asked it."""
    if pod.is_sandbox(spec):
        return "it is a pod's sandbox"
    given = _given(spec)
    if "snapshot" not in given:
        return f"it has no annotation {PREFIX}snapshot"
    try:
        ours = policy.of(settings.namespaces, pod.namespace(spec)).apply(given)
    except ValueError:
        ours = given
    if not ours:
        return "its annotations do not count: the node's settings say otherwise for its namespace"
    if "container" in ours and pod.container(spec) not in ("", ours["container"]):
        return f"{PREFIX}container is {shown(ours['container'])}"
    return "it was not started by rewarm"


def without_effect(spec: Spec, settings: Settings) -> list[str]:
    """A line for each annotation under the prefix that has none: a typing error as a rule, or the node's settings."""
    given = _given(spec)
    if not given or pod.is_sandbox(spec):
        return []
    if "snapshot" not in given:
        return [f"annotation {shown(PREFIX + key)} has no effect without {PREFIX}snapshot" for key in sorted(given)[:8]]
    namespace = _namespace(spec)
    keys = policy.of(settings.namespaces, namespace).without_effect(given)
    why = f"the node's settings say otherwise for namespace {namespace}"
    return [f"annotation {shown(PREFIX + key)} has no effect: {why}" for key in keys[:8]]


def _given(spec: Spec) -> dict[str, str]:
    found = spec_annotations(spec)
    return {key[len(PREFIX) :]: value for key, value in found.items() if key.startswith(PREFIX)}


def _namespace(spec: Spec) -> str:
    try:
        return pod.namespace(spec)
    except ValueError as error:
        raise RequestError("read annotation", *error.args) from None


def environment(spec: Spec) -> dict[str, str]:
    """The container's own, without what rewarm has added."""
    words = (spec.get("process") or {}).get("env") or []
    return without_own(dict(word.partition("=")[::2] for word in map(str, words)))


def environment_keys(spec: Spec, settings: Settings) -> tuple[str, ...]:
    """The keys that matter for fitting: without those that differ from pod to pod (`ignore_env`)."""
    keys = environment(spec)
    return tuple(sorted(k for k in keys if not any(fnmatch.fnmatchcase(k, glob) for glob in settings.ignore_env)))


def derived_name(spec: Spec, settings: Settings) -> str:
    """The name that `auto` stands for: equal for containers that one snapshot can serve."""
    identity = {
        "image": pod.image(spec),
        "args": list((spec.get("process") or {}).get("args") or []),
        "env": sorted((key, environment(spec)[key]) for key in environment_keys(spec, settings)),
        "mounts": sorted(m for m in mounts(spec) if m[0] not in OWN_DESTINATIONS),
    }
    return "auto-" + digest(identity)[:20]
