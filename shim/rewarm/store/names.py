"""Names of snapshots and namespaces: what may become a path component of the store."""

from __future__ import annotations

import re

from rewarm.errors import StoreError
from rewarm.naming import ALLOWED, LONGEST, is_name


def check_name(name: str) -> str:
    """`name` itself, if it may be the name of a snapshot. Raises StoreError."""
    return _check("snapshot name", name)


def check_namespace(namespace: str) -> str:
    """`namespace` itself, if it may be a namespace. Raises StoreError."""
    return _check("namespace", namespace)


def _check(kind: str, text: str) -> str:
    if is_name(text):
        return text
    shown = repr(text if len(text) <= 64 else text[:61] + "...")
    if not text:
        cause = "is empty"
    elif len(text) > LONGEST:
        cause = f"has {len(text)} characters"
    elif text[0] in ".-":
        cause = f"begins with {text[0]!r}"
    elif ".." in text:
        cause = "holds '..'"
    else:
        bad = next((character for character in text if not re.match(r"[A-Za-z0-9._-]\Z", character)), "\n")
        cause = f"holds {bad!r}"
    raise StoreError(f"use {kind}", shown, cause, ALLOWED)
