"""The pod that a container belongs to, as its engine writes it into the spec."""

from __future__ import annotations

from rewarm.naming import is_name
from rewarm.oci.spec import Spec, spec_annotations

DEFAULT = "default"
"""The namespace outside of Kubernetes."""
_KEYS = ("namespace", "name", "uid", "container")
_ANNOTATIONS = (
    (
        "io.kubernetes.cri.sandbox-namespace",
        "io.kubernetes.cri.sandbox-name",
        "io.kubernetes.cri.sandbox-uid",
        "io.kubernetes.cri.container-name",
    ),
    (
        "io.kubernetes.pod.namespace",
        "io.kubernetes.pod.name",
        "io.kubernetes.pod.uid",
        "io.kubernetes.container.name",
    ),
)
"""Of containerd (whose older versions write no uid), and of CRI-O."""
_TYPES = ("io.kubernetes.cri.container-type", "io.kubernetes.cri-o.ContainerType")


def pod(spec: Spec) -> dict[str, str] | None:
    """`namespace`, `name`, `uid` (empty where it is not told) and `container`, the container's name in the pod. None
    outside of Kubernetes."""
    found = spec_annotations(spec)
    for names in _ANNOTATIONS:
        values = dict(zip(_KEYS, (found.get(name, "") for name in names), strict=True))
        if all(value or key == "uid" for key, value in values.items()):
            return values
    return None


def namespace(spec: Spec) -> str:
    """The pod's namespace, DEFAULT outside of Kubernetes.

    An engine writes its own annotation over a pod's of that name, but lets that of another engine through where it is
    told to: a pod that has both has made one of them up. Raises ValueError, whose arguments are the annotation's key
    and what is wrong.
    """
    found = spec_annotations(spec)
    said = {names[0]: found[names[0]] for names in _ANNOTATIONS if names[0] in found}
    for key, value in said.items():
        if not is_name(value):
            raise ValueError(key, f"{value[:80]!r} is not a namespace")
    if len(set(said.values())) > 1:
        raise ValueError(next(iter(said)), f"another says {list(said.values())[1]!r}: no engine writes both")
    return next(iter(said.values()), DEFAULT)


def container(spec: Spec) -> str:
    """The container's name in the pod, "" where it is not told."""
    found = spec_annotations(spec)
    return next((found[names[3]] for names in _ANNOTATIONS if found.get(names[3])), "")


def is_sandbox(spec: Spec) -> bool:
    """Whether it is a pod's own container, which holds its namespaces."""
    found = spec_annotations(spec)
    return any(found.get(key) == "sandbox" for key in _TYPES)
