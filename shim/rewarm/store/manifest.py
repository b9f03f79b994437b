"""The manifest: what one snapshot holds and needs. Its canonical bytes, and a parser that believes nothing.

A manifest comes out of a store that other nodes write, so the parser takes it for hostile: every field must be
there, have its type and lie in its range, and nothing else may be there. What fails is a `SnapshotDamaged`
that names the field.
"""

from __future__ import annotations

import json
import re
import time
from typing import NamedTuple

from blake3 import blake3

from rewarm.annotation import ENGINES
from rewarm.errors import SnapshotDamaged
from rewarm.naming import is_name
from rewarm.plain import plain

from . import fields
from .carved import HugeMapping, Memory, read_memory
from .entries import (
    LARGE,
    MAX_SHARED,
    ChunkPack,
    FileEntry,
    check_file_name,
    check_files,
    check_packs,
    is_digest,
    read_chunk_pack,
    read_file_entry,
)
from .fields import Bad, Reader
from .gpus import Cuda, GpuDevice, read_cuda, read_gpus
from .signals import Wanted, read_signals

__all__ = [
    "LARGE",
    "MAX_BYTES",
    "MAX_SHARED",
    "ChunkPack",
    "Cuda",
    "FileEntry",
    "GpuDevice",
    "HugeMapping",
    "Manifest",
    "Memory",
    "MemoryPolicy",
    "Mount",
    "Process",
    "Requires",
    "Thread",
    "Wanted",
    "check_file_name",
    "digest_of",
    "is_digest",
    "load",
    "parse",
    "timestamp",
]

VERSION = 1
MAX_ADDRESSES = 1024
MAX_BLANK = 256
MAX_BYTES = 64 << 20
"""No manifest is longer. A real one has some 100 KB."""
MAX_VALUES = 4_000_000
"""No manifest has more JSON values: 64 MiB of `[],[],…` would need gigabytes once parsed."""

_CREATED = re.compile(
    r"\d{4}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])T([01]\d|2[0-3]):[0-5]\d:([0-5]\d|60)(\.\d{1,9})?Z\Z"
)
_NEXT_STEP = "remove it with `rewarm rm` and capture again"


class Mount(NamedTuple):
    """A mount of the container: where, and the type that its config.json gave."""

    destination: str
    type: str


class Requires(NamedTuple):
    """What the container and the node must be like for the snapshot to run there."""

    arch: str
    cpu_features: tuple[str, ...]
    kernel: str
    criu: str
    runc: str
    image: str
    args: tuple[str, ...]
    env_keys: tuple[str, ...]
    mounts: tuple[Mount, ...]
    user: tuple[int, int]
    capabilities: tuple[str, ...]
    seccomp: str
    lsm: str
    namespaces: tuple[str, ...]
    gpus: tuple[GpuDevice, ...]
    driver: str
    """Version of the NVIDIA driver, "" if there are no GPUs."""
    cgroup_version: int
    engine: str = "none"
    """The engine (rewarm.dev/engine) that was told to be quiet, and has to be told to go on."""
    image_id: str = ""
    """What `image.identity` tells of the image's content, "" if nothing."""


class Thread(NamedTuple):
    """A thread by its id in its innermost pid namespace, its CPUs, and its default NUMA policy ("" = none)."""

    tid: int
    affinity: tuple[int, ...]
    policy: str = ""
    nodes: tuple[int, ...] = ()


class MemoryPolicy(NamedTuple):
    """The NUMA policy of the addresses [start, end)."""

    start: int
    end: int
    mode: str
    nodes: tuple[int, ...]


class Process(NamedTuple):
    """What CRIU does not keep of a process; `pid` is that of its innermost pid namespace."""

    pid: int
    threads: tuple[Thread, ...]
    stopped: bool
    memory_policies: tuple[MemoryPolicy, ...] = ()


class Manifest(NamedTuple):
    """One snapshot. `created` is RFC 3339 in UTC (`timestamp()` makes one), `memory_bytes` what CRIU dumped."""

    name: str
    namespace: str
    created: str
    rewarm: str
    source: dict[str, str]
    requires: Requires
    processes: tuple[Process, ...]
    memory_bytes: int
    files: tuple[FileEntry, ...] = ()
    packs: tuple[ChunkPack, ...] = ()
    memory: Memory = Memory()
    cuda: Cuda = Cuda()
    signals: tuple[Wanted, ...] = ()
    addresses: tuple[str, ...] = ()
    """Of the source's network namespace, as `addresses.addresses` tells them."""
    blank: tuple[str, ...] = ()
    """Names of open files and directories on volumes that may begin empty (volumes.py)."""
    version: int = VERSION

    def to_bytes(self) -> bytes:
        """Canonical JSON: sorted keys, no spaces, UTF-8. The snapshot's id is the digest of these bytes."""
        text = json.dumps(plain(self), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        return text.encode()

    @property
    def id(self) -> str:
        """The snapshot's id, computed anew at each call."""
        return digest_of(self.to_bytes())

    @property
    def created_key(self) -> tuple[str, str]:
        """Sorts by time of creation, however many digits the fraction of a second has."""
        return self.created[:19], self.created[19:].strip(".Z").ljust(9, "0")

    @property
    def stored_bytes(self) -> int:
        """Bytes of all files and of the packs of chunks, also where other snapshots share them."""
        return sum(entry.size for entry in self.files) + sum(pack.size for pack in self.packs)

    def file(self, name: str) -> FileEntry | None:
        """The entry of that name."""
        return next((entry for entry in self.files if entry.name == name), None)


def digest_of(data: bytes) -> str:
    """BLAKE3-256 in hex."""
    return blake3(data).hexdigest()


def timestamp() -> str:
    """Now, for `Manifest.created`."""
    now = time.time_ns()
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(now // 10**9))}.{now // 1000 % 10**6:06d}Z"


def load(data: bytes, id: str, where: str) -> Manifest:
    """Parse bytes that must hash to `id`; a truncated or changed manifest never reaches the parser.

    `where` names the snapshot in errors. Raises SnapshotDamaged.
    """
    if len(data) > MAX_BYTES:
        raise _damaged(where, f"is longer than {MAX_BYTES >> 20} MiB")
    found = digest_of(data)
    if found != id:
        raise _damaged(where, f"is truncated or was changed: its {len(data)} bytes have digest {found[:12]}…")
    return parse(data, where)


def parse(data: bytes, where: str = "manifest") -> Manifest:
    """Parse and check a manifest. Raises SnapshotDamaged that names the first bad field."""
    if len(data) > MAX_BYTES:
        raise _damaged(where, f"is longer than {MAX_BYTES >> 20} MiB")
    if data.count(b",") + data.count(b"[") + data.count(b"{") > MAX_VALUES:
        raise _damaged(where, f"has more than {MAX_VALUES} values")
    try:
        return _manifest(Reader(fields.decode(data), ""))
    except Bad as bad:
        raise _damaged(where, str(bad)) from None


def _damaged(where: str, cause: str) -> SnapshotDamaged:
    return SnapshotDamaged("read manifest", where, cause, _NEXT_STEP)


def _addresses(top: Reader) -> tuple[str, ...]:
    found = top.texts_or_none("addresses")
    if len(found) > MAX_ADDRESSES:
        raise Bad(f"field addresses has more than {MAX_ADDRESSES} entries")
    if found:
        import socket  # who only lists a store does without
    for index, one in enumerate(found):
        try:
            socket.inet_pton(socket.AF_INET6 if ":" in one else socket.AF_INET, one)
        except OSError:
            raise Bad(f"field addresses[{index}] is no address") from None
    return found


def _blank(top: Reader) -> tuple[str, ...]:
    found = top.texts_or_none("blank")
    if len(found) > MAX_BLANK:
        raise Bad(f"field blank has more than {MAX_BLANK} entries")
    return found


def _manifest(top: Reader) -> Manifest:
    # The version comes first: the other fields mean what it says they mean.
    version = top.integer("version")
    if version != VERSION:
        raise Bad(f"version {version} is unknown, this rewarm reads version {VERSION}")
    created = top.text("created", 64)
    if not _CREATED.match(created):
        raise Bad(f"field created is not a time in UTC like 2026-01-31T12:00:00Z: {created!r}")
    requires = _requires(top.object("requires"))
    manifest = Manifest(
        version=version,
        name=_name(top, "name"),
        namespace=_name(top, "namespace"),
        created=created,
        rewarm=top.text("rewarm", 128),
        source=top.mapping("source"),
        requires=requires,
        files=tuple(read_file_entry(reader) for reader in top.objects("files")),
        packs=tuple(read_chunk_pack(reader) for reader in top.objects("packs")),
        processes=tuple(_process(reader) for reader in top.objects("processes")),
        memory_bytes=top.integer("memory_bytes"),
        memory=read_memory(top.object("memory")),
        cuda=read_cuda(top.object("cuda"), len(requires.gpus)),
        signals=read_signals(top, "signals"),
        addresses=_addresses(top),
        blank=_blank(top),
    )
    top.done()
    check_files(manifest.files)
    check_packs(manifest.packs, manifest.files)
    return manifest


def _name(reader: Reader, key: str) -> str:
    name = reader.text(key)
    if not is_name(name):
        raise Bad(f"field {reader.path(key)} is not a name that a store may hold: {name[:80]!r}")
    return name


def _requires(reader: Reader) -> Requires:
    user = reader.integers("user", fields.MAX_U32)
    if len(user) != 2:
        raise Bad(f"field {reader.path('user')} must be [uid, gid]")
    requires = Requires(
        arch=reader.text("arch", 64),
        cpu_features=reader.texts("cpu_features"),
        kernel=reader.text("kernel"),
        criu=reader.text("criu"),
        runc=reader.text("runc"),
        image=reader.text("image"),
        args=reader.texts("args"),
        env_keys=reader.texts("env_keys"),
        mounts=tuple(_mount(mount) for mount in reader.objects("mounts")),
        user=(user[0], user[1]),
        capabilities=reader.texts("capabilities"),
        seccomp=reader.text("seccomp"),
        lsm=reader.text("lsm"),
        namespaces=reader.texts("namespaces"),
        gpus=read_gpus(reader, "gpus"),
        driver=reader.text("driver", 64),
        cgroup_version=reader.integer("cgroup_version", 2),
        engine=reader.text_or("engine", "none", 64),
        image_id=reader.text_or("image_id", "", 128),
    )
    if requires.engine not in ENGINES:
        raise Bad(f"field {reader.path('engine')} must be one of {', '.join(ENGINES)}")
    reader.done()
    return requires


def _mount(reader: Reader) -> Mount:
    mount = Mount(destination=reader.text("destination"), type=reader.text("type"))
    reader.done()
    return mount


def _process(reader: Reader) -> Process:
    process = Process(
        pid=reader.integer("pid", fields.MAX_PID),
        threads=tuple(_thread(thread) for thread in reader.objects("threads")),
        stopped=reader.boolean("stopped"),
        memory_policies=tuple(_policy(policy) for policy in reader.objects("memory_policies")),
    )
    reader.done()
    return process


def _thread(reader: Reader) -> Thread:
    thread = Thread(
        tid=reader.integer("tid", fields.MAX_PID),
        affinity=reader.integers("affinity", fields.MAX_INDEX),
        policy=reader.text("policy", 64),
        nodes=reader.integers("nodes", fields.MAX_INDEX),
    )
    reader.done()
    return thread


def _policy(reader: Reader) -> MemoryPolicy:
    policy = MemoryPolicy(
        start=reader.integer("start", fields.MAX_U64),
        end=reader.integer("end", fields.MAX_U64),
        mode=reader.text("mode", 64),
        nodes=reader.integers("nodes", fields.MAX_INDEX),
    )
    reader.done()
    if policy.start >= policy.end:
        raise Bad(f"field {reader.path('end')} must be above start")
    return policy
