"""The pod that a container belongs to, as its engine writes it into the spec."""

from __future__ import annotations

from rewarm.oci.spec import Spec, spec_annotations

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


def pod(spec: Spec) -> dict[str, str] | None:
    """`namespace`, `name`, `uid` (empty where it is not told) and `container`, the container's name in the pod. None
    outside of Kubernetes."""
    found = spec_annotations(spec)
    for names in _ANNOTATIONS:
        values = dict(zip(_KEYS, (found.get(name, "") for name in names), strict=True))
        if all(value or key == "uid" for key, value in values.items()):
            return values
    return None
