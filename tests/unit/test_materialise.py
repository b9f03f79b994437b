"""Putting a snapshot's files into place, and never taking damaged bytes for good ones."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from rewarm.errors import SnapshotDamaged, StoreError
from rewarm.store import files
from rewarm.store.directory import DirectoryStore
from rewarm.store.manifest import FileEntry, Manifest, digest_of
from rewarm.store.materialise import materialise
from support.snapshots import FILES, MIB, pattern, tmpfs, write_snapshot

PAGES = "checkpoint/pages-1.img"
CORE = "checkpoint/core-1.img"


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(str(tmp_path / "store"))


@pytest.fixture
def written(store: DirectoryStore, tmp_path: Path) -> Manifest:
    return write_snapshot(store, tmp_path / "work")[1]


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "target"
    path.mkdir()
    return path


def pack_of(store: DirectoryStore, written: Manifest, name: str) -> Path:
    entry = written.file(name)
    assert entry is not None
    return store.pack_path(entry.pack)


def test_every_file_is_where_its_name_says(store: DirectoryStore, written: Manifest, target: Path) -> None:
    materialise(store, written, target)
    found = {str(path.relative_to(target)): path.read_bytes() for path in target.rglob("*") if path.is_file()}
    assert found == FILES
    assert not [path for path in target.rglob("*") if path.is_symlink()], "the store could still change it"


def test_files_can_be_left_out(store: DirectoryStore, written: Manifest, target: Path) -> None:
    materialise(store, written, target, without=(PAGES,))
    assert not (target / PAGES).exists() and (target / CORE).exists()


def test_reading_past_the_end_is_never_taken_for_reading_it_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    with path.open("rb") as file:
        assert files.hash_range(file.fileno(), 1, 4) == digest_of(b"2345")
        assert files.hash_range(file.fileno(), 5, 0) == digest_of(b"")
        for offset, size in ((0, 6), (5, 1), (1 << 40, 1)):
            with pytest.raises(files.Short):
                files.hash_range(file.fileno(), offset, size)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


def drain(path: Path) -> None:
    path.write_bytes(b"")


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def link(path: Path) -> None:
    path.rename(path.with_suffix(".moved"))
    path.symlink_to(path.with_suffix(".moved"))


@pytest.mark.parametrize("file", [PAGES, CORE])
@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        (flip, "were changed: digest"),
        (shorten, "is short"),
        (drain, "is short: 0 of"),
        (lengthen, "bytes instead of"),
        (Path.unlink, "is missing"),
        (fifo, "is not a regular file"),
        (link, "is not a regular file"),
    ],
)
def test_a_damaged_pack_is_refused_and_named(
    store: DirectoryStore, written: Manifest, target: Path, damage: Callable[[Path], None], cause: str, file: str
) -> None:
    pack = pack_of(store, written, file)
    damage(pack)
    with pytest.raises(SnapshotDamaged, match=cause) as caught:
        materialise(store, written, target)
    assert pack.name in str(caught.value)


def test_a_pack_that_shrinks_while_it_is_read_raises_and_does_not_kill(
    store: DirectoryStore, tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, written = write_snapshot(store, tmp_path / "work", {PAGES: pattern(12 * MIB)})
    pack = pack_of(store, written, PAGES)

    class Cut:
        """Cuts the pack when the reader asks for the second time whether to go on."""

        asked = 0

        def is_set(self) -> bool:
            self.asked += 1
            if self.asked == 2:
                os.truncate(pack, 5 * MIB)
            return False

    with pytest.raises(SnapshotDamaged, match=rf"{PAGES}: pack .* is short: {5 * MIB} of {12 * MIB} bytes"):
        materialise(store, written, target, stop=Cut())


def test_swapped_packs_are_refused(store: DirectoryStore, tmp_path: Path, target: Path) -> None:
    _, written = write_snapshot(store, tmp_path / "work", {"a": pattern(MIB, 1), "b": pattern(MIB, 2)})
    first, second = (store.pack_path(entry.pack) for entry in written.files)
    first.rename(tmp_path / "x")
    second.rename(first)
    (tmp_path / "x").rename(second)
    with pytest.raises(SnapshotDamaged, match="were changed"):
        materialise(store, written, target)


def test_a_stopped_one_is_an_error(store: DirectoryStore, written: Manifest, target: Path) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(StoreError):
        materialise(store, written, target, stop=stop)


def test_more_than_half_of_the_room_is_refused_before_anything_is_written(
    store: DirectoryStore, tmp_path: Path
) -> None:
    """Many names for one pack take little room in the store and much where they are copied to."""
    contents = {f"f{number}": pattern(MIB, 1) for number in range(40)}
    _, written = write_snapshot(store, tmp_path / "work", contents)
    with (
        tmpfs(tmp_path / "small", "size=64m") as small,
        pytest.raises(StoreError, match="40 MiB, half of what is free"),
    ):
        try:
            materialise(store, written, small)
        finally:
            assert not list(small.iterdir())


@pytest.mark.parametrize(
    ("entry", "cause"),
    [
        ({"offset": 1 << 40}, "is short"),
        ({"size": 10}, "instead of"),
        ({"digest": "a" * 64}, "were changed"),
        ({"pack": "b" * 64}, "is missing"),
        ({"pack": "../" * 20 + "etc"}, "is not a digest"),
    ],
)
def test_a_manifest_that_lies_is_refused(
    store: DirectoryStore, tmp_path: Path, target: Path, entry: dict[str, object], cause: str
) -> None:
    _, written = write_snapshot(store, tmp_path / "work", {"a": b"x" * 100, "b": b"y" * 100})
    lying: FileEntry = written.files[1]._replace(**entry)  # type: ignore[arg-type]
    with pytest.raises(SnapshotDamaged, match=cause):
        materialise(store, written._replace(files=(lying, written.files[0])), target)


def test_nothing_is_written_through_what_lies_in_the_target(
    store: DirectoryStore, written: Manifest, target: Path, tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (target / "checkpoint").mkdir()
    with pytest.raises(StoreError, match=r"materialise .*checkpoint: File exists"):
        materialise(store, written, target)
    (target / "checkpoint").rmdir()
    for path in target.iterdir():
        path.unlink()
    (target / "rootfs-diff.tar").symlink_to(victim)
    with pytest.raises(StoreError, match="File exists"):
        materialise(store, written, target)
    assert victim.read_text() == "precious"


def test_a_full_target_names_the_file_and_the_setting(
    store: DirectoryStore, written: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rewarm.store.materialise._ROOM", 1e6)  # others fill it up after it was looked at
    with (
        tmpfs(tmp_path / "mount", "size=4k") as mount,
        pytest.raises(StoreError, match=rf"materialise {mount}/.*No space left .*state_dir"),
    ):
        materialise(store, written, mount)
    with pytest.raises(StoreError, match="No such file"):
        materialise(store, written, tmp_path / "missing")


def test_many_packs_do_not_use_up_descriptors(store: DirectoryStore, tmp_path: Path, target: Path) -> None:
    """In a process of its own: the threads of this one open files, too."""
    write_snapshot(store, tmp_path / "work", {f"f{number}": pattern(MIB, number) for number in range(40)})
    program = """
import resource, sys
from pathlib import Path
from rewarm.store.directory import DirectoryStore
from rewarm.store.materialise import materialise
store = DirectoryStore(sys.argv[1])
manifest = store.load(store.resolve("model"))
resource.setrlimit(resource.RLIMIT_NOFILE, (12, 12))
materialise(store, manifest, Path(sys.argv[2]))
"""
    words = [sys.executable, "-c", program, str(store.root), str(target)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(list(target.iterdir())) == 40


def test_a_disk_error_is_an_error_of_the_store(
    store: DirectoryStore, written: Manifest, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unreadable block: device-mapper, which could make one, is not in every kernel."""

    def broken(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(StoreError, match=r"read pack .*input/output error"):
        materialise(store, written, target)


def test_reading_imports_nothing_heavy() -> None:
    script = (
        "import sys; import rewarm.store.directory, rewarm.store.materialise; "
        "heavy = {'yaml', 'click', 'rich', 'shutil', 'subprocess', 'rewarm.store.writer', 'socket'}; "
        "print(*heavy & set(sys.modules)); sys.exit(bool(heavy & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)
