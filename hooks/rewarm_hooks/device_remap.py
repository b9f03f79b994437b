"""The hook that records which GPU of this container stands in for which GPU of the snapshot.

    python3 -I -m rewarm_hooks.device_remap --sources FILE --node FILE --record FILE [--low-level RUNTIME]

An OCI createRuntime hook: reads the container's state (runtime-spec, runtime.md, "State") on stdin, then config.json
of its bundle as it is now, after the prestart hooks.

--sources: JSON list of the snapshot's GPUs;  --node: JSON list of this node's GPUs by NVML, in PCI order, each with
"mig": true if it is in MIG mode (both as `gpu_pairs.as_objects` writes them);  --low-level: the runtime below rewarm.
--record gets {"version": 1, "devices": [{"source", "target", "source_minor", "target_minor"}, ...]}, complete or not
at all: one entry for each GPU in the order of --sources, none at all if every GPU stands for itself.

That the container's GPUs are still those of --node is checked with /proc/driver/nvidia/gpus, which needs no library.
Exit status 0, or 1 with one line "device-remap: <object>: <cause>" on stderr.
"""

from __future__ import annotations

import json
import os
import sys

from .errors import shown
from .gpu_pairs import CannotPair, device_map, from_objects, pair
from .gpu_visible import Unresolved, visible

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, BinaryIO

    from .gpu_pairs import Gpu

_STATE_MAX = 16 << 20  # annotations travel in the state; more than this is no container's state
_SPEC_MAX = 64 << 20
_GPUS_MAX = 1 << 20
_STRINGS = ("ociVersion", "id", "bundle")
_NEEDED = ("--sources", "--node", "--record")
_OPTIONAL = ("--low-level",)


class RemapError(Exception):
    """The hook cannot do its work; `str` is "<object>: <cause>", made one line by `main`."""


def main(arguments: list[str], stdin: BinaryIO, proc: str = "/proc") -> int:
    """Run the hook with `arguments` (without the program's name) and the state on `stdin`; returns the exit status."""
    try:
        options = _parse(arguments)
        bundle = check_state(stdin.read(_STATE_MAX + 1))
        write_record(options["--record"], remap(options, bundle, proc))
    except RemapError as error:
        print(f"device-remap: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def check_state(text: bytes) -> str:
    """The bundle's path; RemapError for anything that is not the state of a container."""
    if len(text) > _STATE_MAX:
        raise RemapError(f"container state: more than {_STATE_MAX} bytes")
    state = _object(text, "container state")
    for key in _STRINGS:
        value = state.get(key)
        if not isinstance(value, str) or not value:
            raise RemapError(f"container state: no text under {key!r}")
    return str(state["bundle"])


def remap(options: dict[str, str], bundle: str, proc: str = "/proc") -> list[dict[str, str | int]]:
    """The record's devices, for the container in `bundle`. Raises RemapError."""
    spec = _object(_read(os.path.join(bundle, "config.json"), _SPEC_MAX), "config.json")
    raw = _json(_read(options["--node"], _GPUS_MAX), options["--node"])
    try:
        sources = from_objects(_json(_read(options["--sources"], _GPUS_MAX), options["--sources"]), "snapshot")
        node = from_objects(raw, "node")
        own = visible(
            spec,
            node,
            mig_minors=_mig(raw),
            proc_devices=_text(os.path.join(proc, "devices")),
            low_level=options.get("--low-level", "runc"),
        )
        _check_node(own, os.path.join(proc, "driver/nvidia/gpus"))
        pairs = pair(sources, own)
    except (CannotPair, Unresolved) as error:
        raise RemapError(f"GPUs: {error}") from error
    if not device_map(pairs):
        return []
    return [
        {"source": source.uuid, "target": target.uuid, "source_minor": source.minor, "target_minor": target.minor}
        for source, target in pairs
    ]


def write_record(path: str, devices: list[dict[str, str | int]]) -> None:
    """Write the record to `path` by way of `path`.tmp, so that a reader sees all of it or nothing.

    Raises RemapError.
    """
    partial = path + ".tmp"
    try:
        fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as out:
            out.write(json.dumps({"version": 1, "devices": devices}, separators=(",", ":")).encode() + b"\n")
            out.flush()
            os.fsync(out.fileno())
        os.rename(partial, path)
    except OSError as error:
        if os.path.isfile(partial):
            os.unlink(partial)
        raise RemapError(f"{path}: writing the record: {error.strerror or error}") from error


def _parse(arguments: list[str]) -> dict[str, str]:
    options = dict(zip(arguments[::2], arguments[1::2], strict=False))
    known = set(options) <= {*_NEEDED, *_OPTIONAL} and len(arguments) == 2 * len(options)
    if not known or not set(_NEEDED) <= set(options) or not all(options.values()):
        raise RemapError(f"arguments: {', '.join(_NEEDED)} are needed, {_OPTIONAL[0]} may be, each once with a value")
    return options


def _check_node(gpus: tuple[Gpu, ...], directory: str) -> None:
    """RemapError unless the running driver has these GPUs under these minor numbers."""
    if not gpus:
        return
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return  # NVML has said what there is; the kernel's own list is a second look
    except OSError as error:
        raise RemapError(f"{directory}: reading the driver's GPUs: {error.strerror or error}") from error
    there: dict[str, str] = {}
    for name in names:
        lines = _text(os.path.join(directory, name, "information")).splitlines()
        facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        there[facts.get("Device Minor", "")] = facts.get("GPU UUID", "")
    for gpu in gpus:
        uuid = there.get(str(gpu.minor))
        if uuid is None:
            raise RemapError(f"GPUs: the driver has no GPU with minor number {gpu.minor}, NVML said {gpu.uuid}")
        # The driver shows question marks until somebody has used the GPU.
        if "?" not in uuid and uuid != gpu.uuid:
            raise RemapError(f"GPUs: minor number {gpu.minor} is {shown(uuid)}, NVML said {gpu.uuid}")


def _mig(value: object) -> set[int]:
    entries = value if isinstance(value, list) else []
    return {item["minor"] for item in entries if isinstance(item, dict) and item.get("mig")}


def _object(text: bytes, name: str) -> dict[str, Any]:
    value = _json(text, name)
    if not isinstance(value, dict):
        raise RemapError(f"{name}: not a JSON object")
    return value


def _json(text: bytes, name: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RemapError(f"{name}: not JSON: {error}") from error


def _read(path: str, most: int) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # O_NONBLOCK: a FIFO must not block the hook
        with os.fdopen(fd, "rb") as file:
            text = file.read(most + 1)
    except (OSError, ValueError) as error:
        raise RemapError(f"{shown(path)}: {getattr(error, 'strerror', None) or error}") from error
    if not text or len(text) > most:
        raise RemapError(f"{shown(path)}: {'empty' if not text else f'more than {most} bytes'}")
    return text


def _text(path: str) -> str:
    """A file of /proc, "" if it is not there."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(_GPUS_MAX)
    except OSError:
        return ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], sys.stdin.buffer))
