"""What tests of failing restores need: damaged snapshots, a criu that misbehaves, a look at what is left behind."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from blake3 import blake3

from rewarm.store.chunks import CHUNK, CHUNKS, decode
from rewarm.store.directory import DirectoryStore, SnapshotRef
from rewarm.store.manifest import ChunkPack, FileEntry, Manifest
from rewarm.store.materialise import materialise
from support import cgroups, counter
from support.bundle import Bundle
from support.chunked import read_chunks
from support.node import Node
from support.proc import state_of
from support.runtime import Container

SMALL = {"PYTHONHASHSEED": "0", "MIB": "4"}
"""The counter's environment where the size of its memory does not matter."""


def captured(node: Node) -> Container:
    """A small counter, captured as `counter` and stopped; `node.store` holds the snapshot."""
    source = counter.captured(node, env=SMALL)
    node.runtime.stop("source")
    return source


def bundle(directory: Path, env: dict[str, str] | None = None, **annotations: str) -> Bundle:
    """A bundle that the snapshot of `captured` fits; `on_miss="fail"` becomes rewarm.dev/on-miss: fail."""
    found = {"snapshot": "counter", **{key.replace("_", "-"): value for key, value in annotations.items()}}
    return counter.bundle(directory, {f"rewarm.dev/{key}": value for key, value in found.items()}, env=env or SMALL)


def copied(store: Path, target: Path) -> Path:
    """A store of its own for a test that damages it."""
    shutil.copytree(store, target, symlinks=True)
    return target


def only(store: Path) -> tuple[DirectoryStore, SnapshotRef, Manifest]:
    """The one snapshot of a store."""
    opened = DirectoryStore(str(store))
    (ref,) = opened.list()
    return opened, ref, opened.load(ref)


def entry(store: Path, name: str) -> tuple[FileEntry, Path]:
    """A file of the one snapshot, and the pack in which it lies."""
    opened, _, manifest = only(store)
    found = manifest.file(name)
    assert found is not None, name
    return found, opened.pack_path(found.pack)


def memory_pack(store: Path) -> tuple[ChunkPack, Path]:
    """The largest pack of chunks of the one snapshot, and where it lies."""
    opened, _, manifest = only(store)
    found = max(manifest.packs, key=lambda pack: pack.size)
    return found, opened.pack_path(found.digest)


def device_pack(store: Path) -> Path:
    """A pack of the one snapshot that begins with device memory, whose chunks are the first."""
    opened, ref, manifest = only(store)
    table = decode(opened.read_file(manifest, CHUNKS), manifest.packs, str(ref))
    first = next(chunk for chunk in table if chunk.offset == 0)
    assert first.size == CHUNK and manifest.cuda.served_bytes
    return opened.pack_path(manifest.packs[first.pack].digest)


def flip(path: Path, offset: int) -> None:
    """Turn over one bit, the file's times kept: nothing but its content tells."""
    status = path.stat()
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 1]))
    path.chmod(stat.S_IMODE(status.st_mode))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def spoil(pack: Path, state: str) -> list[str]:
    """Bring a pack into a bad state; returns what is to be said about it."""
    data = pack.read_bytes()
    pack.chmod(0o600)
    if state == "short":
        os.truncate(pack, len(data) - 4096)
        return [f"pack {pack.name} is short: {len(data) - 4096} of {len(data)} bytes", "capture it again"]
    if state == "long":
        pack.write_bytes(data + b"x")
        return [f"pack {pack.name} has {len(data) + 1} bytes instead of {len(data)}", "capture it again"]
    pack.unlink()
    if state == "missing":
        return [pack.name, "is missing", "capture it again"]
    if state == "link":
        pack.with_name("elsewhere").write_bytes(data)
        pack.symlink_to("elsewhere")
    else:
        pack.mkdir()
    return [pack.name, "is not a regular file", "capture it again"]


def altered(store: Path, scratch: Path, change: Callable[[Path], None], **fields: object) -> None:
    """Replace the one snapshot by another whose files `change` has altered: every digest in it is right.

    `change` gets a directory with the snapshot's files but the table of chunks; `fields` are fields of its manifest.
    """
    opened, ref, manifest = only(store)
    chunks = read_chunks(opened, manifest) if manifest.packs else []
    scratch.mkdir()
    materialise(opened, manifest, scratch, without=(CHUNKS,))
    change(scratch)
    opened.remove(ref)
    with opened.writer(ref.namespace, ref.name) as writer:
        for chunk in chunks:
            writer.add_chunk(chunk)
        for path in sorted(path for path in scratch.rglob("*") if path.is_file()):
            writer.add_file(path.relative_to(scratch).as_posix(), path)
        writer.publish(manifest._replace(files=(), packs=(), **fields))  # type: ignore[arg-type]


def criu(node: Node, script: str) -> Path:
    """A criu for `node` that answers `--version` as the real one ($REAL), and else runs the shell `script`."""
    real = node.prefix / "criu" / "bin" / "criu"
    path = node.directory / "criu-fault" / "criu"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f'#!/bin/sh\nREAL={real}\n[ "$1" = --version ] && exec $REAL "$@"\n{script}\n')
    path.chmod(0o755)
    return path


def blocking(node: Node, kind: str, made: Bundle) -> Path:
    """Add a hook that hangs the first time it runs; returns the file that says that it does."""
    flag = node.directory / f"{made.name}-hangs"
    script = node.directory / f"{made.name}-hook"
    script.write_text(f"#!/bin/sh\n[ -e {flag} ] && exit 0\ntouch {flag}\nexec sleep 100\n")
    script.chmod(0o755)
    made.spec["hooks"] = {kind: [{"path": str(script)}]}
    made.write()
    return flag


def files(rootfs: Path, upper: Path) -> dict[str, tuple[object, ...]]:
    """Everything in a root filesystem with what `ls -l` tells, and the content's digest of what is not the image's.

    Times of directories are left out: runc makes mount points in them.
    """
    found: dict[str, tuple[object, ...]] = {}
    for directory, names, others in os.walk(rootfs):
        for name in names + others:
            path = Path(directory, name)
            status = path.lstat()
            place = str(path.relative_to(rootfs))
            facts: list[object] = [oct(status.st_mode), status.st_uid, status.st_gid]
            if not stat.S_ISDIR(status.st_mode):
                facts += [status.st_size, status.st_mtime_ns]
            if stat.S_ISLNK(status.st_mode):
                facts.append(os.readlink(path))
            if stat.S_ISREG(status.st_mode) and (upper / place).exists():
                facts.append(hashlib.sha256(path.read_bytes()).hexdigest())
            found[place] = tuple(facts)
    return found


def rewritten(store: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Replace the one manifest by one that `change` has altered, with a right id; returns its path."""
    (path,) = store.glob("v1/snapshots/*/*/*.json")
    document = json.loads(path.read_bytes())
    change(document)
    return with_manifest(store, json.dumps(document).encode())


def with_manifest(store: Path, data: bytes) -> Path:
    """Replace the one manifest by these bytes, under the id that they have; returns its path."""
    (path,) = store.glob("v1/snapshots/*/*/*.json")
    path.unlink()
    made = path.with_name(f"{blake3(data).hexdigest()}.json")
    made.write_bytes(data)
    return made


class Before:
    """A bundle as it was before a restore, to compare it with."""

    def __init__(self, made: Bundle) -> None:
        self._made = made
        self._files = files(made.rootfs, made.upper)
        self._config = self._config_now()

    def _config_now(self) -> tuple[bytes, int]:
        path = self._made.directory / "config.json"
        return path.read_bytes(), path.stat().st_mode

    def check_files(self, *, mount_points: bool = False) -> None:
        """AssertionError if the root filesystem is another; `mount_points` allows empty ones that are new."""
        now = files(self._made.rootfs, self._made.upper)
        if mount_points:
            places = [place for place in now if place not in self._files]
            paths = {place: self._made.rootfs / place for place in places}
            new = [place for place, path in paths.items() if path.is_dir() or path.lstat().st_size == 0]
            now = {place: facts for place, facts in now.items() if place not in new}
        different = {
            place: (self._files.get(place), now.get(place))
            for place in self._files.keys() | now.keys()
            if self._hashed(place, now) != now.get(place)
        }
        assert not different, different

    def _hashed(self, place: str, now: dict[str, tuple[object, ...]]) -> tuple[object, ...] | None:
        """What was, with the digest that is only taken of files in the upper directory, where they now are."""
        was = self._files.get(place)
        if was is None or len(now.get(place, was)) == len(was):
            return was
        lower = [Path(layer, place) for layer in _layers(self._made)]
        original = next(path for path in lower if path.exists())
        return (*was, hashlib.sha256(original.read_bytes()).hexdigest())

    def check_config(self) -> None:
        assert self._config_now() == self._config, self._config_now()

    def check_names(self) -> None:
        """AssertionError if something new lies in the bundle's directory."""
        assert {item.name for item in self._made.directory.iterdir()} == {"config.json", "rootfs", "upper", "work"}


def _layers(made: Bundle) -> list[str]:
    """Lower directories of a bundle's overlay, highest first."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        if line.split(" ")[4] == str(made.rootfs):
            options = line.rpartition(" ")[2].split(",")
            return next(option for option in options if option.startswith("lowerdir=")).partition("=")[2].split(":")
    raise AssertionError(f"{made.rootfs} is not mounted")


def remains(node: Node, container_id: str, made: Bundle) -> list[str]:
    """What is left of a container, one line each: processes, mounts, cgroups, runc's and rewarm's directories."""
    found = [f"process {pid} {state_of(pid)}" for pid in cgroups.processes(made.cgroup)]
    found += [f"cgroup {path}" for path in cgroups.directories(made.cgroup)]
    places = (made.rootfs, node.runtime.root / container_id, node.container_directory(container_id))
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        target = line.split(" ")[4]
        if any(target.startswith(f"{place}/") for place in places):
            found.append(f"mount {target}")
    parent = node.container_directory(container_id).parent
    known = sorted(parent.glob(f"{container_id}*")) if parent.exists() else []
    return found + [str(path) for path in (places[1], *known) if os.path.lexists(path)]


def mount_yard(node: Node, container_id: str) -> Path:
    """The directory in /tmp where the CRIU of a restore that goes on mounts the container's tree."""
    log = (node.container_directory(container_id) / "work/restore.log").read_text(errors="replace")
    found = re.search(r"/tmp/\.criu\.mntns\.\w{6}", log)
    assert found is not None, log
    assert Path(found[0]).is_dir()
    return Path(found[0])
