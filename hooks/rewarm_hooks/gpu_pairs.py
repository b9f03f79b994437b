"""Which GPU of a container stands in for which GPU of a snapshot.

Pure: nothing here looks at the node. Memory moves only between GPUs of the same model and memory size, so that is what
pairs are made of: a GPU that both sides have is its own partner, and the others of a kind are paired in the order of
their minor numbers. Position in a list says nothing. A snapshot's list is hostile input: everything is bounded and
checked before it is used.
"""

from __future__ import annotations

from collections import namedtuple

from .errors import shown

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import NamedTuple

    class Gpu(NamedTuple):
        """A GPU. uuid: as NVML writes it, "GPU-…";  model: NVML's name of it;  memory_bytes: NVML's total;  minor: of
        its device node, /dev/nvidia<minor>.
        """

        uuid: str
        model: str
        memory_bytes: int
        minor: int

else:
    Gpu = namedtuple("Gpu", "uuid model memory_bytes minor")  # a hook does without typing

MOST = 64
"""GPUs on one side; the driver itself knows at most 32 (NV_MAX_DEVICES of its kernel modules)."""
MINORS = 254
"""Minor numbers below this are GPUs; 254 is nvidia-modeset, 255 nvidiactl (nvidia-modprobe-utils.h)."""
_TEXT_MOST = 96  # NVML_DEVICE_UUID_V2_BUFFER_SIZE and NVML_DEVICE_NAME_V2_BUFFER_SIZE of nvml.h
_UUID = frozenset("-0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")


class CannotPair(Exception):
    """The GPUs of the two sides do not go together; `str` names both sides' values on one line."""


def pair(sources: Sequence[Gpu], targets: Sequence[Gpu]) -> list[tuple[Gpu, Gpu]]:
    """(source, target) for every GPU of the snapshot, in the order of `sources`; every target is used once.

    Raises CannotPair when one side has what the other has not, or holds what is no list of GPUs.
    """
    sources = checked(sources, "snapshot")
    targets = checked(targets, "container")
    _same_kinds(sources, targets)
    here = {gpu.uuid: gpu for gpu in targets}
    partners: dict[str, Gpu] = {}
    for gpu in sources:
        own = here.get(gpu.uuid)
        if own is None:
            continue
        if _kind(own) != _kind(gpu):
            raise CannotPair(f"{gpu.uuid} is {_named(gpu)} in the snapshot, here it is {_named(own)}")
        partners[gpu.uuid] = own
    free = sorted((gpu for gpu in targets if gpu.uuid not in partners), key=_minor)
    for gpu in sorted((gpu for gpu in sources if gpu.uuid not in partners), key=_minor):
        # There is one: of every kind both sides have the same number, and own partners are of one kind.
        partner = next(other for other in free if _kind(other) == _kind(gpu))
        free.remove(partner)
        partners[gpu.uuid] = partner
    return [(gpu, partners[gpu.uuid]) for gpu in sources]


def device_map(pairs: Iterable[tuple[Gpu, Gpu]]) -> list[tuple[str, str]]:
    """(source UUID, target UUID) of all pairs, or [] if every GPU stands for itself.

    Once one is named, the driver wants every checkpointed GPU named (cuda.h, cuCheckpointProcessRestore); a map that
    changes nothing only costs time (facts.md).
    """
    found = [(source.uuid, target.uuid) for source, target in pairs]
    return found if any(source != target for source, target in found) else []


def as_objects(gpus: Iterable[Gpu]) -> list[dict[str, str | int]]:
    """The GPUs as JSON holds them; `from_objects` takes them back."""
    return [
        {"uuid": gpu.uuid, "model": gpu.model, "memory_bytes": gpu.memory_bytes, "minor": gpu.minor} for gpu in gpus
    ]


def from_objects(value: object, side: str) -> list[Gpu]:
    """The GPUs in JSON; keys that are not known are ignored. Raises CannotPair, naming `side`."""
    if not isinstance(value, list):
        raise CannotPair(f"{side}: not a list of GPUs")
    if len(value) > MOST:
        raise CannotPair(f"{side}: {len(value)} GPUs are listed, at most {MOST} are understood")
    gpus = []
    for item in value:
        if not isinstance(item, dict):
            raise CannotPair(f"{side}: an entry that is not an object")
        gpus.append(Gpu(item.get("uuid"), item.get("model"), item.get("memory_bytes"), item.get("minor")))  # type: ignore[arg-type]  # `checked` looks
    return checked(gpus, side)


def checked(gpus: Sequence[Gpu], side: str) -> list[Gpu]:
    """The same GPUs; CannotPair, naming `side`, unless they are at most MOST, whole, and each there once."""
    if len(gpus) > MOST:
        raise CannotPair(f"{side}: {len(gpus)} GPUs are listed, at most {MOST} are understood")
    uuids: set[str] = set()
    minors: set[int] = set()
    for gpu in gpus:
        if not _is_uuid(gpu.uuid):
            raise CannotPair(f"{side}: {_value(gpu.uuid)} is no GPU's UUID (GPU-…)")
        if not isinstance(gpu.model, str) or not 0 < len(gpu.model) <= _TEXT_MOST or not gpu.model.isprintable():
            raise CannotPair(f"{side}: {gpu.uuid} has no usable model name: {_value(gpu.model)}")
        if type(gpu.memory_bytes) is not int or not 0 < gpu.memory_bytes < 1 << 63:
            raise CannotPair(f"{side}: {gpu.uuid} has no usable memory size: {_value(gpu.memory_bytes)}")
        if type(gpu.minor) is not int or not 0 <= gpu.minor < MINORS:
            raise CannotPair(f"{side}: {gpu.uuid} has no usable minor number: {_value(gpu.minor)}")
        if gpu.uuid in uuids:
            raise CannotPair(f"{side}: {gpu.uuid} is listed twice")
        if gpu.minor in minors:
            raise CannotPair(f"{side}: two GPUs have minor number {gpu.minor}, the second is {gpu.uuid}")
        uuids.add(gpu.uuid)
        minors.add(gpu.minor)
    return list(gpus)


def described(gpus: Iterable[Gpu]) -> str:
    """`2 x MODEL (N bytes), 1 x …`, or `none`."""
    return ", ".join(f"{number} x {_text(*kind)}" for kind, number in _counts(gpus).items()) or "none"


def _same_kinds(sources: list[Gpu], targets: list[Gpu]) -> None:
    there, here = _counts(sources), _counts(targets)
    if not there and here:
        raise CannotPair(f"snapshot needs no GPU, this container has {described(targets)}")
    for kind, number in there.items():
        found = here.get(kind, 0)
        if found == number:
            continue
        others = [gpu for gpu in targets if _kind(gpu) != kind]
        also = f", and {described(others)}" if others and found else ""
        has = f"{found}{also}" if found or not others else described(others)
        raise CannotPair(f"snapshot needs {number} x {_text(*kind)}, this container has {has}")
    if there != here:
        raise CannotPair(f"snapshot needs {described(sources)}, this container has {described(targets)}")


def _counts(gpus: Iterable[Gpu]) -> dict[tuple[str, int], int]:
    found: dict[tuple[str, int], int] = {}
    for gpu in gpus:
        found[_kind(gpu)] = found.get(_kind(gpu), 0) + 1
    return found


def _kind(gpu: Gpu) -> tuple[str, int]:
    return gpu.model, gpu.memory_bytes


def _minor(gpu: Gpu) -> int:
    return gpu.minor


def _named(gpu: Gpu) -> str:
    return _text(gpu.model, gpu.memory_bytes)


def _text(model: str, memory_bytes: int) -> str:
    return f"{model} ({memory_bytes} bytes)"


def _is_uuid(value: object) -> bool:
    return (
        isinstance(value, str)
        and len("GPU-") < len(value) <= _TEXT_MOST
        and value.startswith("GPU-")
        and _UUID.issuperset(value)
    )


def _value(value: object) -> str:
    """What is in the place of a value, bounded: a list as long as the file, or a number too long to print, is not."""
    if isinstance(value, str):
        return shown(value)
    if value is None or (isinstance(value, int) and abs(value) < 1 << 64):
        return str(value)
    return f"a {type(value).__name__}"
