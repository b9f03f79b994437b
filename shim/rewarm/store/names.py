"""Names of snapshots and namespaces: what may become a path component of the store."""

from __future__ import annotations

import re

from rewarm.errors import StoreError

LONGEST = 128
_NAME = re.compile(rf"[A-Za-z0-9_][A-Za-z0-9._-]{{0,{LONGEST - 1}}}\Z")
ALLOWED = f"use 1 to {LONGEST} of A-Z a-z 0-9 . _ - and do not begin with . or -"


def is_name(text: str) -> bool:
    """Whether `text` may be a snapshot's name or a namespace; then it is also a safe file name and no option."""
    return _NAME.match(text) is not None and ".." not in text


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
