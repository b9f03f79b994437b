"""The marks around what rewarm writes into a text that others write to, too. Standard library only."""

from __future__ import annotations

import re
from collections.abc import Callable

BEGIN = "# BEGIN rewarm runtime (written by rewarm's install.sh, removed by its uninstall.sh)"
END = "# END rewarm runtime"
_BLOCK = re.compile(
    r"^(?P<begin># BEGIN rewarm runtime[^\n]*\n)(?P<inside>.*?)^(?P<end># END rewarm runtime[^\n]*(?:\n|\Z))",
    re.MULTILINE | re.DOTALL,
)


def block(lines: list[str]) -> str:
    return "\n".join([BEGIN, *lines, END]) + "\n"


def blocks(text: str) -> list[str]:
    """Every block, its marks with it."""
    return [match[0] for match in _BLOCK.finditer(text)]


def torn(text: str) -> bool:
    """Whether a part of a block is there: where it ends would be a guess."""
    return text.count("# BEGIN rewarm runtime") != len(blocks(text))


def cut(text: str, keep: Callable[[str, str], str]) -> str:
    """The text with each block replaced by what `keep` makes of the block, and of what is between its marks."""
    return _BLOCK.sub(lambda match: keep(match[0], match["inside"]), text)
