"""Several hooks in one process, one after the other: starting Python takes longer than any of them.

    python3 -I -m rewarm_hooks.series HOOK ARGUMENT… [-- HOOK ARGUMENT…]…

HOOK is device-remap or rootfs-diff; its arguments are those of its own module. The first that fails ends the series
with its exit status, after its own line on stderr. The container's state on stdin is for the one that reads it.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import BinaryIO

SEPARATOR = "--"


def main(arguments: list[str], stdin: BinaryIO) -> int:
    """Run the hooks of `arguments` (without the program's name); returns the exit status."""
    for name, *words in split(arguments):
        status = _run(name, words, stdin)
        if status:
            return status
    return 0


def split(arguments: list[str]) -> list[list[str]]:
    """The words of each hook; one empty text in the place of a hook without words."""
    hooks: list[list[str]] = [[]]
    for word in arguments:
        if word == SEPARATOR:
            hooks.append([])
        else:
            hooks[-1].append(word)
    return [hook or [""] for hook in hooks]


def _run(name: str, words: list[str], stdin: BinaryIO) -> int:
    # Each imports what it needs only where it is asked for.
    if name == "device-remap":
        from .device_remap import main as device_remap

        return device_remap(words, stdin)
    if name == "rootfs-diff":
        from .rootfs_diff import main as rootfs_diff

        return rootfs_diff(words)
    print(f"series: no hook {name[:80]!r}; device-remap and rootfs-diff are known", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], sys.stdin.buffer))
