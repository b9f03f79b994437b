"""Named tuples as JSON knows them.

What a restore works with are named tuples: the standard library's dataclasses would import a tenth of all that it
imports, and make each of their methods out of text (docs/decisions/0022).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def plain(value: Any) -> Any:
    """`value` with a dict in the place of each named tuple in it, and a list in that of each other tuple."""
    if isinstance(value, tuple):
        names = getattr(value, "_fields", None)
        if names is not None:
            return {name: plain(one) for name, one in zip(names, value, strict=True)}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    if isinstance(value, Mapping):
        return {key: plain(one) for key, one in value.items()}
    return value
