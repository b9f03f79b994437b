"""The hook that records which device of this node stands in for which device of the snapshot.

    python3 -I -m rewarm_hooks.device_remap --record FILE

An OCI createRuntime hook: reads the container's state (runtime-spec, runtime.md, "State") on stdin and writes
{"version": 1, "devices": []} to FILE, complete or not at all. A CPU-only container has no devices to map, so the map
is empty. Exit status 0, or 1 with one line "device-remap: <object>: <cause>" on stderr.
"""

from __future__ import annotations

import json
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import BinaryIO

_STATE_MAX = 16 << 20  # annotations travel in the state; more than this is no container's state
_STRINGS = ("ociVersion", "id", "bundle")
_RECORD = {"version": 1, "devices": []}


class RemapError(Exception):
    """The state or the record is no good; `str` is "<object>: <cause>" on one line."""


def main(arguments: list[str], stdin: BinaryIO) -> int:
    """Run the hook with `arguments` (without the program's name) and the state on `stdin`; returns the exit status."""
    try:
        if len(arguments) != 2 or arguments[0] != "--record" or not arguments[1]:
            raise RemapError("arguments: --record FILE is needed, and nothing else")
        check_state(stdin.read(_STATE_MAX + 1))
        write_record(arguments[1])
    except RemapError as error:
        print(f"device-remap: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def check_state(text: bytes) -> None:
    """Refuse, with RemapError, anything that is not the state of a container."""
    if len(text) > _STATE_MAX:
        raise RemapError(f"container state: more than {_STATE_MAX} bytes")
    try:
        state = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RemapError(f"container state: not JSON: {error}") from error
    if not isinstance(state, dict):
        raise RemapError("container state: not a JSON object")
    for key in _STRINGS:
        value = state.get(key)
        if not isinstance(value, str) or not value:
            raise RemapError(f"container state: no text under {key!r}")


def write_record(path: str) -> None:
    """Write the empty map to `path` by way of `path`.tmp, so that a reader sees all of it or nothing. Raises
    RemapError.
    """
    partial = path + ".tmp"
    try:
        fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as out:
            out.write(json.dumps(_RECORD, separators=(",", ":")).encode() + b"\n")
            out.flush()
            os.fsync(out.fileno())
        os.rename(partial, path)
    except OSError as error:
        if os.path.isfile(partial):
            os.unlink(partial)
        raise RemapError(f"{path}: writing the record: {error.strerror or error}") from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], sys.stdin.buffer))
