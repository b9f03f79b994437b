"""The changes of a container's root filesystem as an OCI image layer: what the rest of rewarm uses.

A layer is a tar archive with `.wh.NAME` for a deletion and `.wh..wh..opq` for an opaque directory (OCI image
specification, layer.md), with xattrs as SCHILY.xattr.* pax records and sparse files in GNU's format 1.0.
"""

from __future__ import annotations

from .apply import apply_layer, undo_layer
from .capture import write_layer
from .errors import LayerError
from .member import LayerStats

__all__ = ["LayerError", "LayerStats", "apply_layer", "undo_layer", "write_layer"]
