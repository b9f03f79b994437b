"""Which image a container is made of, by its content: a tag may be moved to another.

CRI-O says it in the spec. Other engines name the tag at most: there it is what the layers of the container's root
filesystem hold. Each is walked once on a node (layer_digest.py); its digest is kept in the state directory.
"""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from typing import Any

from blake3 import blake3

from rewarm import overlay, private
from rewarm.layer_digest import layer_digest
from rewarm.oci import pod
from rewarm.oci.spec import Spec, scratches, write_atomically

_KNOWN = "layers.json"
_MOST = 1024
"""Layers that are kept. An image of NVIDIA's has 60."""
_LARGEST = 1 << 20
_FEW = 64
"""Names of a layer that is as soon walked as looked up, such as the one that Docker makes for each container."""
_OF_DOCKER = re.compile(r"/[0-9a-f]{64}-init/diff\Z")
_DIGEST = re.compile(r"[0-9a-f]{64}\Z")


def identity(spec: Spec, state_dir: str, pid: int, root: str) -> str:
    """Equal for containers of one image, as far as can be told; "" where nothing tells.

    `root` is where the container's root filesystem is mounted in the mount namespace of process `pid`.
    """
    if digest := pod.image_digest(spec):
        return f"image:{digest}"
    try:
        layers = [os.path.realpath(layer) for layer in overlay.lower_directories(pid, root)]
        digests = _digests([layer for layer in layers if not _OF_DOCKER.search(layer)], state_dir)
    except OSError:
        return ""
    return f"layers:{blake3(':'.join(digests).encode()).hexdigest()[:32]}" if digests else ""


def _digests(layers: list[str], state_dir: str) -> list[str]:
    """Raises OSError."""
    kept = os.path.join(state_dir, _KNOWN)
    known = _load(kept)
    digests, new = [], False
    for layer in layers:
        status = os.stat(layer)
        key = [status.st_dev, status.st_ino, status.st_ctime_ns]
        match known.get(layer):
            case [*found, str(digest)] if found == key and _DIGEST.match(digest):
                pass
            case _:
                digest, names = layer_digest(layer)
                if names >= _FEW:
                    known.pop(layer, None)
                    known[layer] = [*key, digest]
                    new = True
        digests.append(digest)
    if new:
        _save(kept, dict(list(known.items())[-_MOST:]))
    return digests


def _load(path: str) -> dict[str, Any]:
    """Nothing where it is damaged: the layers are walked once more."""
    try:
        with open(path, "rb") as file:
            known = json.loads(file.read(_LARGEST))
    except (OSError, ValueError, RecursionError):
        return {}
    return known if isinstance(known, dict) else {}


def _save(path: str, known: dict[str, Any]) -> None:
    """Of two that do it at once, one's are walked once more."""
    with suppress(OSError):
        private.make(os.path.dirname(path))
        for scratch in scratches(path):
            os.unlink(scratch)
        write_atomically(path, json.dumps(known).encode())
