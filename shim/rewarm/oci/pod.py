"""The pod that a container belongs to, as its engine writes it into the spec."""

from __future__ import annotations

import re
from typing import NamedTuple

from rewarm.naming import is_name
from rewarm.oci.spec import Spec, spec_annotations

DEFAULT = "default"
"""The namespace outside of Kubernetes."""
_KEYS = ("namespace", "name", "uid", "container")


class _Engine(NamedTuple):
    """Annotations that an engine writes: `kind` tells sandboxes from containers."""

    kind: str
    image: str
    sandbox: str
    names: tuple[str, ...]


_CONTAINERD = _Engine(
    "io.kubernetes.cri.container-type",
    "io.kubernetes.cri.image-name",
    "io.kubernetes.cri.sandbox-id",
    (
        "io.kubernetes.cri.sandbox-namespace",
        "io.kubernetes.cri.sandbox-name",
        "io.kubernetes.cri.sandbox-uid",  # not of older versions
        "io.kubernetes.cri.container-name",
    ),
)
_CRIO = _Engine(
    "io.kubernetes.cri-o.ContainerType",
    "io.kubernetes.cri-o.ImageName",
    "io.kubernetes.cri-o.SandboxID",
    (
        "io.kubernetes.pod.namespace",
        "io.kubernetes.pod.name",
        "io.kubernetes.pod.uid",
        "io.kubernetes.container.name",
    ),
)
_CRIO_IMAGE = "io.kubernetes.cri-o.ImageRef"
_OTHER_IMAGES = ("org.opencontainers.image.ref.name", "io.containerd.image.name")
"""Of tools outside of Kubernetes."""


def _engine(annotations: dict[str, str]) -> _Engine:
    """Whose annotations count: an engine writes its own over a pod's of that name, but may let another's through. A pod
    cannot take the one's away, so with both it has made the other's up (`namespace`)."""
    return _CRIO if _CRIO.kind in annotations and _CONTAINERD.kind not in annotations else _CONTAINERD


def pod(spec: Spec) -> dict[str, str] | None:
    """`namespace`, `name`, `uid` (empty where it is not told) and `container`, the container's name in the pod. None
    outside of Kubernetes."""
    found = spec_annotations(spec)
    values = dict(zip(_KEYS, (found.get(name, "") for name in _engine(found).names), strict=True))
    return values if all(value or key == "uid" for key, value in values.items()) else None


def namespace(spec: Spec) -> str:
    """The pod's namespace, DEFAULT outside of Kubernetes. Raises ValueError, whose arguments are the annotation's key
    and what is wrong."""
    found = spec_annotations(spec)
    if _CRIO.kind in found and _CONTAINERD.kind in found:
        raise ValueError(_CRIO.kind, f"it is there beside {_CONTAINERD.kind}, and no engine writes both")
    key = _engine(found).names[0]
    value = found.get(key, DEFAULT)
    if not is_name(value):
        raise ValueError(key, f"{value[:80]!r} is not a namespace")
    return value


def container(spec: Spec) -> str:
    """The container's name in the pod, "" where it is not told."""
    found = spec_annotations(spec)
    return found.get(_engine(found).names[3], "")


def image(spec: Spec) -> str:
    """The image as the engine names it, "" where none does."""
    found = spec_annotations(spec)
    engine = _engine(found)
    others = () if engine.kind in found else _OTHER_IMAGES
    return next((found[key] for key in (engine.image, *others) if found.get(key)), "")


def image_digest(spec: Spec) -> str:
    """The digest of the image's configuration, "" where the engine does not tell it: CRI-O alone does."""
    found = spec_annotations(spec)
    digest = re.search(r"(?:^|sha256:)([0-9a-f]{64})\Z", found.get(_CRIO_IMAGE, ""))
    return digest[1] if digest and _engine(found) is _CRIO else ""


def is_sandbox(spec: Spec) -> bool:
    """Whether it is a pod's own container, which holds its namespaces."""
    found = spec_annotations(spec)
    return any(found.get(engine.kind) == "sandbox" for engine in (_CONTAINERD, _CRIO))


def sandbox(spec: Spec) -> str:
    """The id of the pod's own container, "" outside of Kubernetes."""
    found = spec_annotations(spec)
    return found.get(_engine(found).sandbox, "")
