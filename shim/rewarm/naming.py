"""Which texts may be a name: of a snapshot, of a namespace."""

from __future__ import annotations

import re

LONGEST = 128
_NAME = re.compile(rf"[A-Za-z0-9_][A-Za-z0-9._-]{{0,{LONGEST - 1}}}\Z")
ALLOWED = f"use 1 to {LONGEST} of A-Z a-z 0-9 . _ - and do not begin with . or -"


def is_name(text: str) -> bool:
    """Whether `text` may be a snapshot's name or a namespace; then it is also a safe file name and no option."""
    return _NAME.match(text) is not None and ".." not in text
