"""The hook that applies a rootfs diff to a container's root filesystem, and the command that takes it back.

    python3 -I -m rewarm_hooks.rootfs_diff apply --layer FILE --root DIR --undo FILE
    python3 -I -m rewarm_hooks.rootfs_diff undo --root DIR --undo FILE

As an OCI createRuntime hook it gets the container's state on stdin and does not need it (runc does not mind that
nobody reads it). Exit status 0, or 1 with one line "rootfs-diff: <entry>: <cause>" on stderr. `undo` without an undo
file is a success: `apply` writes that file before its first change, so nothing was changed.
"""

from __future__ import annotations

import os
import stat
import sys

from .apply import apply_layer, undo_layer
from .errors import LayerError, failed, shown

_OPTIONS = {"apply": ("--layer", "--root", "--undo"), "undo": ("--root", "--undo")}


def main(arguments: list[str]) -> int:
    """Run the command with `arguments` (without the program's name); returns the exit status."""
    try:
        _run(arguments)
    except LayerError as error:
        print(f"rootfs-diff: {_line(str(error))}", file=sys.stderr)
        return 1
    except (OSError, MemoryError) as error:
        print(
            f"rootfs-diff: {_line(arguments[0] if arguments else 'arguments')}: {_line(repr(error))}", file=sys.stderr
        )
        return 1
    return 0


def _run(arguments: list[str]) -> None:
    command, options = _parse(arguments)
    try:
        root = os.open(options["--root"], os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise failed(options["--root"], "opening the root filesystem", error) from error
    try:
        if command == "undo":
            undo_layer(options["--undo"], root)
            return
        with os.fdopen(_open_layer(options["--layer"]), "rb", 1 << 16) as layer:
            apply_layer(layer, root, options["--undo"])
    finally:
        os.close(root)


def _open_layer(path: str) -> int:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # O_NONBLOCK: a FIFO must not block the hook
    except OSError as error:
        raise failed(path, "opening the layer", error) from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise LayerError(path, "opening the layer: not a regular file")
    return fd


def _parse(arguments: list[str]) -> tuple[str, dict[str, str]]:
    command = arguments[0] if arguments else ""
    if command not in _OPTIONS:
        raise LayerError("arguments", f"no command {shown(command)}; apply and undo are known")
    names = arguments[1::2]
    if sorted(names) != list(_OPTIONS[command]) or len(arguments) != 1 + 2 * len(names):
        raise LayerError("arguments", f"{command} needs {', '.join(_OPTIONS[command])}, each once and with a value")
    return command, dict(zip(names, arguments[2::2], strict=True))


def _line(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
