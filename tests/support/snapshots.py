"""Snapshots for tests of the store: real files, written by the real writer, and file systems that fail for real."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from rewarm.store.directory import DirectoryStore, SnapshotRef
from rewarm.store.manifest import Manifest, MemoryPolicy, Mount, Process, Requires, Thread, timestamp

MIB = 1 << 20

REQUIRES = Requires(
    arch="x86_64",
    cpu_features=("avx2", "sse4_2"),
    kernel="6.18.0",
    criu="4.1.1",
    runc="1.1.5",
    image="docker.io/library/model:1",
    args=("python3", "serve.py", "--größe=1"),
    env_keys=("PATH", "MODEL"),
    mounts=(Mount("/proc", "proc"), Mount("/models", "bind")),
    user=(0, 0),
    capabilities=("CAP_KILL",),
    seccomp="",
    lsm="",
    namespaces=("pid", "mount"),
    gpus=(),
    driver="",
    cgroup_version=2,
)
PROCESS = Process(
    pid=1,
    threads=(Thread(tid=1, affinity=(0, 1)), Thread(tid=7, affinity=(1,), policy="bind", nodes=(0,))),
    stopped=False,
    memory_policies=(MemoryPolicy(start=0x7F0000000000, end=0x7F0000200000, mode="interleave", nodes=(0, 1)),),
)


def manifest(name: str = "model", namespace: str = "default", created: str | None = None) -> Manifest:
    """A manifest without files, as a capture hands it to the writer."""
    return Manifest(
        name=name,
        namespace=namespace,
        created=created or timestamp(),
        rewarm="0.1.0",
        source={"container": "c1", "runtime_root": "/run/runc", "node": "node-1"},
        requires=REQUIRES,
        processes=(PROCESS,),
        memory_bytes=3 * MIB,
    )


def pattern(size: int, seed: int = 1) -> bytes:
    """`size` bytes that differ from offset to offset and from seed to seed."""
    block = b"".join(((index * 2654435761 + seed * 97) & 0xFFFFFFFF).to_bytes(4, "little") for index in range(4099))
    return (block * (size // len(block) + 1))[:size]


FILES: dict[str, bytes] = {
    "checkpoint/core-1.img": pattern(900, 2),
    "checkpoint/inventory.img": pattern(40, 3),
    "checkpoint/empty.img": b"",
    "checkpoint/pages-1.img": pattern(3 * MIB + 17, 4),
    "rootfs-diff.tar": pattern(10240, 5),
}


def write_snapshot(
    store: DirectoryStore,
    work: Path,
    contents: Mapping[str, bytes] = FILES,
    name: str = "model",
    namespace: str = "default",
    created: str | None = None,
) -> tuple[SnapshotRef, Manifest]:
    """Publish a snapshot of these files by way of files in the new directory `work`."""
    work.mkdir(parents=True)
    with store.writer(namespace, name) as writer:
        for number, (file, data) in enumerate(contents.items()):
            source = work / str(number)
            source.write_bytes(data)
            writer.add_file(file, source)
        return writer.publish(manifest(name, namespace, created))


def tree(root: Path) -> set[str]:
    """Every file below `root` but the lock files, which stay on purpose."""
    paths = (path.relative_to(root) for path in root.rglob("*") if not path.is_dir() or path.is_symlink())
    return {str(path) for path in paths if path.parts[:2] != ("v1", "locks")}


@contextmanager
def tmpfs(path: Path, options: str) -> Iterator[Path]:
    """A real small file system at `path`, unmounted afterwards."""
    path.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)
