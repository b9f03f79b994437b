"""A restore that fails leaves nothing behind; the container starts cold in the same create, or fails in one line."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

from rewarm.oci import record
from support import cgroups, faults
from support.node import Node
from support.outcomes import annotate, bound, fails, falls_back, said, starts_cold
from support.proc import command


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, prefix: Path) -> Iterator[Path]:
    """A store with the counter's snapshot. Not to be changed."""
    with Node(tmp_path_factory.mktemp("captured"), prefix) as node:
        faults.captured(node)
        yield node.store


@pytest.fixture
def other(nothing_left_behind: None, store: Path, tmp_path: Path, prefix: Path) -> Iterator[Node]:
    """A second node with a copy of the store."""
    with Node(tmp_path / "node", prefix, store=faults.copied(store, tmp_path / "store")) as node:
        yield node


def test_the_copy_of_the_store_is_a_good_one(other: Node) -> None:
    """So that what follows fails for its own reason."""
    other.runtime.create("copy", faults.bundle(other.directory / "copy"))
    assert other.outcome("copy")["outcome"] == "warm"


def test_no_such_snapshot(other: Node) -> None:
    made = faults.bundle(other.directory / "copy", snapshot="nothing")
    falls_back(other, "find snapshot default/nothing", "there is none in the store", "capture one", made=made)


def test_unfit_snapshot(other: Node) -> None:
    made = faults.bundle(other.directory / "copy", env={**faults.SMALL, "MODE": "new"})
    falls_back(other, "environment variable MODE", "the snapshot was taken without it", made=made)


@pytest.mark.parametrize(
    "name",
    [
        "rootfs.undo",
        "record.started.json",
        "start",
        "criu.conf",
        "config.json.orig",
        "control/x",
        "checkpoint/a/b",
        "x",
    ],
)
def test_a_file_that_no_capture_makes(other: Node, name: str) -> None:
    """Some of these names are rewarm's own in the container directory: a layer that undoes, a plan for `start`."""

    def add(document: dict[str, Any]) -> None:
        data = b"hostile"
        digest = blake3(data).hexdigest()
        path = other.store / "v1/packs" / digest[:2] / digest
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        document["files"].append({"name": name, "size": len(data), "digest": digest, "pack": digest, "offset": 0})

    faults.rewritten(other.store, add)
    falls_back(other, repr(name), "which no capture makes", "rewarm rm")


def test_bit_flipped_in_memory(other: Node) -> None:
    """Wrong bytes of a chunk are written nowhere; the tree that CRIU has made by then is killed."""
    found, pack = faults.memory_pack(other.store)
    assert found.raw_size > 1 << 20
    faults.flip(pack, found.size // 2)
    falls_back(other, "read memory", found.digest[:12], "its bytes are not what its digest says", "capture it again")


def test_bit_flipped_in_memory_that_was_left_to_criu(other: Node) -> None:
    """CRIU restores the wrong memory; the verification sees it before anything runs."""
    pages, pack = faults.entry(other.store, "checkpoint/pages-1.img")
    faults.flip(pack, pages.offset + pages.size // 2)
    falls_back(other, "read snapshot file checkpoint/pages-1.img", "bytes", "changed", "capture")


def test_bit_flipped_in_a_small_image(other: Node) -> None:
    core, pack = faults.entry(other.store, "checkpoint/core-1.img")
    faults.flip(pack, core.offset + core.size - 1)
    falls_back(other, "read snapshot file checkpoint/core-1.img", "bytes", "changed", "capture")


def test_bit_flipped_in_the_rootfs_diff(other: Node) -> None:
    diff, pack = faults.entry(other.store, "rootfs-diff.tar")
    faults.flip(pack, diff.offset + 600)
    falls_back(other, "read snapshot file rootfs-diff.tar", "bytes", "changed", "capture")


@pytest.mark.parametrize("state", ["missing", "short", "long", "link", "directory"])
def test_pack_of_the_memory(other: Node, state: str) -> None:
    found, pack = faults.memory_pack(other.store)
    faults.spoil(pack, state)
    size = {"short": found.size - 4096, "long": found.size + 1}.get(state)
    cause = {"missing": "is missing"}.get(state, "is not a regular file")
    if size is not None:
        cause = f"has {size} bytes, and the manifest says {found.size}"
    falls_back(other, "open pack", found.digest, cause, "capture it again")


@pytest.mark.parametrize("state", ["missing", "short", "long", "link", "directory"])
def test_pack_of_the_files(other: Node, state: str) -> None:
    pages, pack = faults.entry(other.store, "checkpoint/pages-1.img")
    assert not pages.whole_pack
    expected = faults.spoil(pack, state)
    # What is read first of them is the table of chunks; it lies at the pack's end.
    falls_back(other, *(expected if state not in ("short", "long") else [expected[0], "capture it again"]))


def test_manifest_that_the_disk_cannot_read(other: Node) -> None:
    """A file that gives EIO: the memory of a process at address 0."""
    (manifest,) = other.store.glob("v1/snapshots/default/counter/*.json")
    with bound(Path(f"/proc/{os.getpid()}/mem"), manifest):
        falls_back(other, "read manifest", str(manifest), "input/output error")


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("missing", ["open store", "does not exist", "create it or mount it"]),
        ("file", ["open store", "is not a directory"]),
        ("broken link", ["open store", "is a broken symbolic link"]),
        ("loop", ["open store", "symbolic link"]),
        ("empty", ["find snapshot default/counter", "there is none in the store"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_store(other: Node, tmp_path: Path, kind: str, expected: list[str]) -> None:
    place = tmp_path / "elsewhere"
    if kind == "file":
        place.write_text("no store")
    elif kind == "broken link":
        place.symlink_to(tmp_path / "nowhere")
    elif kind == "loop":
        place.symlink_to(place)
    elif kind == "empty":
        place.mkdir()
    other.configure(store=str(place))
    falls_back(other, *expected)


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("inventory.img", lambda data: data[:9], ["read images of snapshot counter", "inventory.img"]),
        ("files.img", lambda data: data[: len(data) // 2], ["read images of snapshot counter", "files.img"]),
        ("pagemap-1.img", lambda data: data[:8] + b"\xff" * (len(data) - 8), ["restore container copy"]),
        ("core-1.img", lambda data: data[: len(data) // 2], ["read images of snapshot counter", "core-1.img"]),
        ("mountpoints-12.img", lambda data: b"", ["read images of snapshot counter", "mountpoints-"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_image_that_criu_cannot_read(
    other: Node, tmp_path: Path, name: str, change: Callable[[bytes], bytes], expected: list[str]
) -> None:
    """Every digest is right: whoever made this snapshot made it so."""

    def rewrite(directory: Path) -> None:
        path = next(directory.glob(f"checkpoint/{name.replace('-12', '-*')}"))
        path.write_bytes(change(path.read_bytes()))

    faults.altered(other.store, tmp_path / "altered", rewrite)
    falls_back(other, *expected)


@pytest.mark.parametrize(
    ("member", "expected"),
    [
        ("../../evil", "evil"),
        ("etc/passwd/evil", "etc/passwd"),
    ],
)
def test_rootfs_diff_that_its_hook_refuses(other: Node, tmp_path: Path, member: str, expected: str) -> None:
    def replace(directory: Path) -> None:
        with tarfile.open(directory / "rootfs-diff.tar", "w") as layer:
            first = tarfile.TarInfo("etc/issue")
            first.size = 4
            layer.addfile(first, io.BytesIO(b"evil"))
            layer.addfile(tarfile.TarInfo(member))

    faults.altered(other.store, tmp_path / "altered", replace)
    falls_back(other, "restore container copy: rootfs-diff:", expected)
    assert not (tmp_path / "evil").exists()


def test_rootfs_diff_hook_that_fails_halfway(other: Node, tmp_path: Path) -> None:
    """The last change meets a mount of the container's: what was changed before it is put back."""

    def add(directory: Path) -> None:
        with tarfile.open(directory / "rootfs-diff.tar", "a") as layer:
            layer.addfile(tarfile.TarInfo("etc/hostname.d"))

    faults.altered(other.store, tmp_path / "altered", add)
    made = faults.bundle(other.directory / "copy")
    (made.rootfs / "etc/hostname.d/below").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    below = made.rootfs / "etc/hostname.d/below"
    with bound(tmp_path / "empty", below):
        fails(other, made, "restore container copy: rootfs-diff:", "etc/hostname.d", own=str(below))
        starts_cold(other, made, "restore container copy: rootfs-diff:", "etc/hostname.d", own=str(below))


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("exit 1", "restore container copy"),
        ("kill -9 $$", "restore container copy"),
        ("echo nonsense; exec sleep 0", "restore container copy"),
        # In the middle: some of the processes are there already, others not.
        ("(sleep 0.12; kill -9 $$) & exec $REAL --log-level=4 $*", "copy"),
    ],
    ids=["exits", "killed", "says nothing", "killed in the middle"],
)
def test_criu_fails(other: Node, script: str, expected: str) -> None:
    other.configure(criu=str(faults.criu(other, script)))
    falls_back(other, expected)


def test_no_criu(other: Node) -> None:
    other.configure(criu="/nowhere/criu")
    falls_back(other, "find CRIU /nowhere/criu", "found none", "rewarm doctor")


def test_criu_too_old(other: Node) -> None:
    old = other.directory / "criu"
    old.write_text("#!/bin/sh\necho Version: 3.17\n")
    old.chmod(0o755)
    other.configure(criu=str(old))
    falls_back(other, "find CRIU", "or newer, found 3.17", "rewarm doctor")


@pytest.mark.parametrize(
    "script",
    ["exec sleep 100", "$REAL $* & wait; sleep 100", "trap '' TERM INT HUP; while :; do sleep 1; done"],
    ids=["before", "with the tree restored", "deaf"],
)
def test_deadline_while_criu_hangs(other: Node, script: str) -> None:
    other.configure(criu=str(faults.criu(other, script)), deadline=1.5)
    began = time.monotonic()
    falls_back(other, "restore container copy: the deadline of 1.5 s passed during restore.runc", "`deadline`")
    assert time.monotonic() - began < 20


def test_deadline_while_a_hook_hangs(other: Node) -> None:
    """By then the root filesystem is changed, and runc and CRIU have mounts of their own in the node's namespace."""
    made = faults.bundle(other.directory / "copy")
    flag = other.directory / "flag"
    made.spec["hooks"] = {"createRuntime": [hook(other, f"[ -e {flag} ] || exec sleep 100")]}
    other.configure(deadline=1.5)
    fails(other, made, "the deadline of 1.5 s passed during restore.runc")
    flag.touch()
    made.spec["hooks"]["createRuntime"] = [hook(other, f"[ -e {flag}2 ] || {{ touch {flag}2; exec sleep 100; }}")]
    starts_cold(other, made, "the deadline of 1.5 s passed during restore.runc")


def hook(node: Node, script: str) -> dict[str, object]:
    path = node.directory / f"hook-{abs(hash(script))}"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return {"path": str(path)}


def test_deadline_before_anything(other: Node) -> None:
    other.configure(deadline=0.001)
    falls_back(other, "restore container copy: the deadline of 0.001 s passed during", "`deadline`")


def test_what_runc_restore_cannot_do(other: Node) -> None:
    """`--preserve-fds` is a flag of create alone."""
    made = faults.bundle(other.directory / "copy")
    container = other.runtime.create("copy", made, "--preserve-fds", "0")
    assert other.outcome("copy")["outcome"] == "warm"
    other.runtime.delete("copy", force=True)
    shutil.copyfile(made.directory / "config.json", other.directory / "config.json")
    reading, writing = os.pipe()
    os.close(writing)
    process = subprocess.run(
        other.runtime.argv("create", "--bundle", made.directory, "--preserve-fds", "1", "copy"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=(3,),
        preexec_fn=lambda: os.dup2(reading, 3),
        env=other.runtime.env,
        check=True,
        timeout=60,
    )
    os.close(reading)
    assert process.returncode == 0 and container.id == "copy"
    assert "--preserve-fds" in other.outcome("copy")["reason"]


def test_settings_that_cannot_be_read(other: Node) -> None:
    other.configure(stoer="/typo")
    made = faults.bundle(other.directory / "copy")
    annotate(made, "fail")
    before = faults.Before(made)
    assert other.runtime.create("copy", made, check=False).status == 1
    said(other.runtime.last_error(), "read settings", str(other.config), "unknown key 'stoer'", "allowed keys")
    before.check_config()
    before.check_files()
    assert not Path("/run/rewarm").exists() or faults.remains(other, "copy", made) == []


def test_settings_that_cannot_be_read_capture_nothing(other: Node) -> None:
    """What they say of the pod's namespace is not known."""
    other.configure(stoer="/typo")
    made = faults.bundle(other.directory / "copy")
    made.spec["annotations"]["rewarm.dev/capture"] = "on-ready"
    annotate(made, "cold-start")
    other.runtime.create("copy", made)
    try:
        kept = record.load(str(other.container_directory("copy")))
        assert kept is not None and kept.phase == record.COLD and kept.request["capture"] == "never"
    finally:
        other.runtime.delete("copy", force=True)


def test_state_directory_that_cannot_be_made(other: Node) -> None:
    blocked = other.directory / "blocked"
    blocked.write_text("a file")
    other.configure(state_dir=str(blocked / "state"))
    made = faults.bundle(other.directory / "copy")
    annotate(made, "fail")
    assert other.runtime.create("copy", made, check=False).status == 1
    said(other.runtime.last_error(), "make container directory", "Not a directory", "`state_dir`")
    annotate(made, "cold-start")
    container = other.runtime.create("copy", made)
    other.runtime.start("copy")
    assert container.stdout.wait_text("\n2 ").startswith("ready\n1 ")


def test_full_state_directory(other: Node) -> None:
    """/run is a tmpfs, and restores write their small images there."""
    state = other.directory / "state"
    state.mkdir()
    command("mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", state)
    try:
        made = faults.bundle(other.directory / "copy")
        fails(other, made, "half of what is free")
        annotate(made, "cold-start")
        container = other.runtime.create("copy", made)
        other.runtime.start("copy")
        assert container.stdout.wait_text("\n2 ").startswith("ready\n1 ")
        other.runtime.delete("copy", force=True)
    finally:
        command("umount", state)


def test_undo_that_fails_starts_nothing(other: Node) -> None:
    """A root filesystem that cannot be put back is no place for a cold start; the next create has another try."""
    made = faults.bundle(other.directory / "copy")
    undo = other.container_directory("copy") / "rootfs.undo"
    # The diff is applied by now; what is to undo it becomes a file that cannot be removed.
    made.spec["hooks"] = {"createRuntime": [hook(other, f"chattr +i '{undo}'; exit 1")]}
    made.write()
    container = other.runtime.create("copy", made, check=False)
    try:
        assert container.status == 1
        why = "removing the undo file: Operation not permitted"
        said(other.runtime.last_error(), "undo restore copy", why, "delete")
        assert cgroups.processes(made.cgroup) == set()
        assert container.stdout.text() == ""
        assert other.runtime.run("delete", "--force", "copy", check=False).returncode != 0
        assert undo.exists(), "what is left of the original files is not thrown away"
    finally:
        command("chattr", "-i", undo)
    made.spec["hooks"] = {}
    made.write()
    again = other.runtime.create("copy", made)
    assert other.outcome("copy")["outcome"] == "warm"
    other.runtime.start("copy")
    again.stdout.wait_text("\n")
    assert other.runtime.exec("copy", "cat", "/etc/issue").count("changed by the program") == 1
    other.runtime.delete("copy", force=True)
