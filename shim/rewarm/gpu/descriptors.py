"""Pieces of device memory behind descriptors: one for each of thousands."""

from __future__ import annotations

import os
import resource
from collections.abc import Mapping, Sequence
from contextlib import suppress

from .pieces import Span

Places = Mapping[int, Sequence[tuple[Span, int]]]
"""By the process's pid: pieces and the descriptors of their memory."""


def allow() -> None:
    """As many as this process may have. Programs that it starts from then on may have as many."""
    with suppress(OSError, ValueError):
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def close(places: Places) -> None:
    """Let go of the memory; where it is mapped it stays."""
    for found in places.values():
        for _, fd in found:
            with suppress(OSError):
                os.close(fd)
