"""rewarm: an OCI runtime around runc that restores a snapshot of a container inside `create`."""

from __future__ import annotations

__version__ = "0.1.0"
