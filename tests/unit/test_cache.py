"""The node's cache of packs: many processes at once, damage, full and deleted directories, killed processes."""

from __future__ import annotations

import mmap
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from rewarm.store import cache as module
from rewarm.store.cache import Busy, CacheSettings, PackCache, cache_for
from rewarm.store.chunks import CHUNK
from rewarm.store.reader import ChunkReader
from support.packs import Snapshot, read_all
from support.snapshots import tmpfs

MIB = 1 << 20
ROOT = Path(__file__).parents[2]


@pytest.fixture(params=[False, True], ids=["raw", "zstd"])
def snapshot(request: pytest.FixtureRequest, tmp_path: Path) -> Snapshot:
    return Snapshot.make(tmp_path / "store", 4, compress=request.param)


@pytest.fixture
def cache(tmp_path: Path) -> PackCache:
    return PackCache(tmp_path / "cache", 1 << 30)


def entries(cache: PackCache) -> list[Path]:
    return sorted(cache.directory.glob("v1/??/*"))


def litter(cache: PackCache) -> list[Path]:
    return [*cache.directory.glob("v1/tmp/*"), *cache.directory.glob("v1/locks/*")]


def buffer() -> memoryview:
    return memoryview(mmap.mmap(-1, CHUNK))


def stored(snapshot: Snapshot) -> int:
    return sum(chunk.stored for chunk in snapshot.chunks)


@pytest.mark.parametrize("threads", [1, 3])
def test_second_restore_does_not_touch_the_store(snapshot: Snapshot, cache: PackCache, threads: int) -> None:
    first = read_all(snapshot, threads, cache)
    assert first.counters.store_bytes == stored(snapshot)
    assert len(entries(cache)) == len(snapshot.packs)
    assert not litter(cache)
    for pack in snapshot.packs:
        snapshot.store.pack_path(pack.digest).unlink()
    second = read_all(snapshot, threads, cache)
    assert (second.counters.store_bytes, second.counters.cache_fault) == (0, "")
    assert second.counters.cache_bytes == sum(chunk.size for chunk in snapshot.chunks)


def test_entries_are_the_raw_layout(snapshot: Snapshot, cache: PackCache) -> None:
    read_all(snapshot, 2, cache)
    for number, chunk in enumerate(snapshot.chunks):
        content = cache.path(snapshot.packs[chunk.pack].digest).read_bytes()
        assert len(content) == snapshot.packs[chunk.pack].raw_size
        assert content[chunk.raw_offset :][: chunk.size] == snapshot.data[number]
        assert cache.path(snapshot.packs[chunk.pack].digest).stat().st_mode & 0o077 == 0


def test_whole_pack_is_fetched_for_a_snapshot_that_wants_one_chunk(snapshot: Snapshot, cache: PackCache) -> None:
    few = snapshot._replace(chunks=snapshot.chunks[3:4] * 2, data=snapshot.data[3:4] * 2)
    read_all(few, 2, cache)
    assert len(entries(cache)) == 1
    whole = snapshot._replace(chunks=snapshot.chunks[:8], data=snapshot.data[:8])
    assert read_all(whole, 2, cache).counters.store_bytes == 0


def test_damage_of_a_chunk_that_nobody_wants_only_costs_the_entry(snapshot: Snapshot, cache: PackCache) -> None:
    few = snapshot._replace(
        chunks=snapshot.chunks[:3] + snapshot.chunks[5:8], data=snapshot.data[:3] + snapshot.data[5:8]
    )
    flip(snapshot.store.pack_path(snapshot.packs[0].digest), snapshot.chunks[4].offset)
    read_all(few, 2, cache)
    assert not entries(cache) and not litter(cache)


def test_a_pack_with_a_damaged_index_is_read_but_not_kept(snapshot: Snapshot, cache: PackCache) -> None:
    path = snapshot.store.pack_path(snapshot.packs[1].digest)
    flip(path, path.stat().st_size - 60)
    read_all(snapshot, 2, cache)
    assert len(entries(cache)) == len(snapshot.packs) - 1


def flip(path: Path, offset: int = 5000) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 16]))


def shorten(path: Path) -> None:
    os.truncate(path, 100)


def grow(path: Path) -> None:
    os.truncate(path, path.stat().st_size + 4096)


def zeros(path: Path) -> None:
    os.truncate(path, 0)
    os.truncate(path, 10 << 30)


def same_size_zeros(path: Path) -> None:
    size = path.stat().st_size
    os.truncate(path, 0)
    os.truncate(path, size)


def swap(path: Path) -> None:
    other = next(each for each in path.parents[1].glob("??/*") if each != path)
    path.write_bytes(other.read_bytes())


def link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGE = [flip, shorten, grow, zeros, same_size_zeros, swap, link, fifo, Path.unlink]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_replaced(snapshot: Snapshot, cache: PackCache, damage: Callable[[Path], None]) -> None:
    read_all(snapshot, 2, cache)
    path = cache.path(snapshot.packs[2].digest)
    damage(path)
    again = read_all(snapshot, 2, cache)
    assert 0 < again.counters.store_bytes <= stored(snapshot) // 2
    read_all(snapshot, 2, cache)
    assert read_all(snapshot, 2, cache).counters.store_bytes == 0
    assert not litter(cache)


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_while_it_is_read(snapshot: Snapshot, cache: PackCache, damage: Callable[[Path], None]) -> None:
    read_all(snapshot, 2, cache)
    with ChunkReader(
        snapshot.store, snapshot.packs, snapshot.chunks, cache=cache, stop=threading.Event(), threads=1
    ) as reader:
        stream, buffer = reader.stream(), memoryview(mmap.mmap(-1, CHUNK))
        got = []
        while (item := stream.next(buffer)) is not None:
            assert item[1] == snapshot.data[item[0]]
            got.append(item[0])
            if len(got) == 1:
                for path in entries(cache):
                    if path.exists():
                        damage(path)
    assert sorted(got) == list(range(len(snapshot.chunks)))


@pytest.mark.parametrize("when", [1, 9, 20])
def test_directory_deleted_under_a_restore(snapshot: Snapshot, cache: PackCache, when: int) -> None:
    import shutil

    with ChunkReader(
        snapshot.store, snapshot.packs, snapshot.chunks, cache=cache, stop=threading.Event(), threads=1
    ) as reader:
        stream, buffer = reader.stream(), memoryview(mmap.mmap(-1, CHUNK))
        got = []
        while (item := stream.next(buffer)) is not None:
            assert item[1] == snapshot.data[item[0]]
            got.append(item[0])
            if len(got) == when:
                shutil.rmtree(cache.directory)
    assert sorted(got) == list(range(len(snapshot.chunks)))


@pytest.mark.parametrize("size", ["size=1m", "size=5m", "size=12m", "nr_inodes=3,size=100m"])
def test_file_system_full(snapshot: Snapshot, tmp_path: Path, size: str) -> None:
    with tmpfs(tmp_path / "small", size) as mount:
        for _ in range(2):
            read_all(snapshot, 2, PackCache(mount / "cache", 1 << 30))
        assert not list(mount.glob("cache/v1/tmp/*"))


def test_no_space_while_writing(snapshot: Snapshot, cache: PackCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: memoryview, offset: int) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rewarm.store.cache.os.pwrite", full)
    reader = read_all(snapshot, 2, cache)
    assert "No space left" in reader.counters.cache_fault
    assert not entries(cache) and not litter(cache)


def test_read_only_directory_serves(snapshot: Snapshot, tmp_path: Path) -> None:
    with tmpfs(tmp_path / "mount", "size=100m,mode=700") as mount:
        few = snapshot._replace(chunks=snapshot.chunks[:8], data=snapshot.data[:8])
        read_all(few, 2, PackCache(mount, 1 << 30))
        subprocess.run(["mount", "-o", "remount,ro", mount], check=True)
        assert read_all(few, 2, PackCache(mount, 1 << 30)).counters.store_bytes == 0
        assert "Read-only" in read_all(snapshot, 2, PackCache(mount, 1 << 30)).counters.cache_fault


def test_nobody_else_may_write_to_it(snapshot: Snapshot, tmp_path: Path) -> None:
    """Whatever umask the engine has; and one to which others may write is not used."""
    before = os.umask(0)
    try:
        read_all(snapshot, 2, PackCache(tmp_path / "new" / "cache", 1 << 30))
    finally:
        os.umask(before)
    made = [tmp_path / "new", *(path for path in (tmp_path / "new").rglob("*") if path.is_dir())]
    assert len(made) > 5 and {stat.S_IMODE(path.stat().st_mode) for path in made} == {0o700}
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    reader = read_all(snapshot, 2, PackCache(tmp_path / "open", 1 << 30))
    assert "others may write to it" in reader.counters.cache_fault
    assert list((tmp_path / "open").iterdir()) == []


def test_only_copies_are_evicted(snapshot: Snapshot, tmp_path: Path) -> None:
    cache = PackCache(tmp_path / "cache", snapshot.packs[0].raw_size)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for name in ("precious", "ab" * 32):
        (foreign / name).write_text("data")
        os.utime(foreign / name, (0, 0))
    (tmp_path / "cache").mkdir(mode=0o700)
    (tmp_path / "cache" / "v1").mkdir(mode=0o700)
    (tmp_path / "cache" / "v1" / "zz").symlink_to(foreign)
    (tmp_path / "cache" / "v1" / "yy").mkdir()
    (tmp_path / "cache" / "v1" / "yy" / "precious").write_text("data")
    read_all(snapshot, 1, cache)
    assert len(list(foreign.iterdir())) == 2 and (tmp_path / "cache" / "v1" / "yy" / "precious").exists()


def test_who_waits_with_chunks_has_brought_the_pack(snapshot: Snapshot, cache: PackCache) -> None:
    """A thread that waits for CRIU must not have others wait for its pack: at its last chunk, and in its middle."""
    for count in (1, len([chunk for chunk in snapshot.chunks if chunk.pack == 0]) - 1):
        with ChunkReader(
            snapshot.store, snapshot.packs, snapshot.chunks, cache=cache, stop=threading.Event(), threads=1
        ) as reader:
            stream = reader.stream()
            seen = []
            for _ in range(count):
                item = stream.next(buffer())
                assert item is not None
                seen.append(item[0])
            pack = snapshot.packs[snapshot.chunks[seen[0]].pack]
            stream.finish()
            assert cache.holds(pack.digest, pack.raw_size) and not litter(cache)
            while (item := stream.next(buffer())) is not None:
                assert item[1] == snapshot.data[item[0]]
                seen.append(item[0])
            assert sorted(seen) == list(range(len(snapshot.chunks)))
        shutil.rmtree(cache.directory)


def test_who_waits_keeps_every_number_of_a_chunk(snapshot: Snapshot, cache: PackCache) -> None:
    """Equal chunks are one in the pack, and several in the process."""
    few = snapshot._replace(chunks=[chunk for chunk in snapshot.chunks[:3] for _ in range(3)])
    with ChunkReader(few.store, few.packs, few.chunks, cache=cache, stop=threading.Event(), threads=1) as reader:
        stream = reader.stream()
        item = stream.next(buffer())
        assert item is not None
        seen = [item[0]]
        stream.finish()
        while (item := stream.next(buffer())) is not None:
            assert item[1] == snapshot.data[item[0] // 3]
            seen.append(item[0])
    assert sorted(seen) == list(range(9))


def test_least_recently_used_goes_first(tmp_path: Path) -> None:
    one, two, three = (Snapshot.make(tmp_path / "store", 1, seed=seed) for seed in (1, 2, 3))
    size = max(snapshot.packs[0].raw_size for snapshot in (one, two, three))
    cache = PackCache(tmp_path / "cache", 2 * size)
    for snapshot in (one, two, one):
        read_all(snapshot, 1, cache)
        time.sleep(0.02)
    read_all(three, 1, cache)
    assert [cache.holds(each.packs[0].digest, each.packs[0].raw_size) for each in (one, two, three)] == [
        True,
        False,
        True,
    ]


def test_a_snapshot_larger_than_the_cache_keeps_a_part_of_itself(snapshot: Snapshot, tmp_path: Path) -> None:
    cache = PackCache(tmp_path / "cache", sum(pack.raw_size for pack in snapshot.packs[:2]) + MIB)
    read_all(snapshot, 2, cache)
    held = entries(cache)
    assert 1 <= len(held) <= 3
    assert sum(path.stat().st_size for path in held) <= cache.limit
    read_all(snapshot, 2, cache)
    assert entries(cache) == held


def test_a_pack_larger_than_the_cache_is_not_kept(snapshot: Snapshot, tmp_path: Path) -> None:
    cache = PackCache(tmp_path / "cache", MIB)
    assert read_all(snapshot, 2, cache).counters.store_bytes == stored(snapshot)
    assert not cache.directory.exists()


def test_a_pack_being_fetched_is_busy(cache: PackCache) -> None:
    fetch = cache.begin("a" * 64, MIB)
    assert fetch is not None
    with pytest.raises(Busy):
        cache.begin("a" * 64, MIB)
    fetch.write(memoryview(bytes(MIB)), 0)
    fetch.commit()
    assert cache.begin("a" * 64, MIB) is None
    assert cache.holds("a" * 64, MIB)
    assert not litter(cache)


def test_what_others_fetch_counts(tmp_path: Path) -> None:
    cache = PackCache(tmp_path / "cache", 5 * MIB)
    first = cache.begin("a" * 64, 3 * MIB)
    assert first is not None
    assert cache.begin("b" * 64, 3 * MIB) is None
    first.abandon()
    second = cache.begin("b" * 64, 3 * MIB)
    assert second is not None
    second.abandon()
    assert not litter(cache)


def test_a_fetcher_that_hangs_is_not_waited_for(snapshot: Snapshot, cache: PackCache) -> None:
    fetches = [cache.begin(pack.digest, pack.raw_size) for pack in snapshot.packs]
    began = time.monotonic()
    read_all(snapshot, 2, cache)
    assert 1.5 < time.monotonic() - began < 6
    for fetch in fetches:
        assert fetch is not None
        fetch.abandon()


def test_stop_leaves_nothing_behind(snapshot: Snapshot, cache: PackCache) -> None:
    stop = threading.Event()
    with ChunkReader(snapshot.store, snapshot.packs, snapshot.chunks, cache=cache, stop=stop, threads=1) as reader:
        stream, buffer = reader.stream(), memoryview(mmap.mmap(-1, CHUNK))
        stream.next(buffer)
        assert litter(cache)
        stop.set()
        assert stream.next(buffer) is None
    assert not litter(cache)


CHILD = """
import json, sys
from pathlib import Path
from rewarm.store.cache import PackCache
from support.packs import Snapshot, read_all

root, packs, threads = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
snapshot = Snapshot.make(root / "store", packs, compress=True)
print("ready", flush=True)
sys.stdin.readline()
reader = read_all(snapshot, threads, PackCache(root / "cache", 1 << 30))
print(json.dumps([reader.counters.store_bytes, reader.counters.cache_bytes]), flush=True)
"""


def child(root: Path, packs: int, threads: int) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(ROOT / "shim"), str(ROOT / "tests"), *sys.path])
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(root), str(packs), str(threads)],
        env=os.environ | {"PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_ten_restores_at_once_read_each_pack_once(tmp_path: Path, cache: PackCache) -> None:
    import json

    snapshot = Snapshot.make(tmp_path / "store", 6, compress=True)
    children = [child(tmp_path, 6, 2) for _ in range(10)]
    for each in children:
        assert each.stdout is not None and each.stdout.readline() == "ready\n"
    # Each child has written the same packs anew, before any of them reads.
    for each in children:
        assert each.stdin is not None
        each.stdin.write("go\n")
        each.stdin.flush()
    totals = []
    for each in children:
        output, _ = each.communicate(timeout=60)
        assert each.returncode == 0
        totals.append(json.loads(output))
    assert sum(total[0] for total in totals) == stored(snapshot)
    assert not litter(cache)


def test_killed_at_any_moment(tmp_path: Path, cache: PackCache) -> None:
    import shutil

    snapshot = Snapshot.make(tmp_path / "store", 6, compress=True)
    source = random.Random(7)
    for _ in range(30):
        process = child(tmp_path, 6, 3)
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == "ready\n"
        process.stdin.write("go\n")
        process.stdin.flush()
        time.sleep(source.uniform(0, 0.06))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if source.random() < 0.5:
            for path in entries(cache):  # or the later ones would have nothing to fetch
                path.unlink()
        if source.random() < 0.3:
            shutil.rmtree(tmp_path / "cache" / "v1" / "aa", ignore_errors=True)
    read_all(snapshot, 2, cache)
    for path in entries(cache):
        path.unlink()
    read_all(snapshot, 2, cache)
    assert read_all(snapshot, 2, cache).counters.store_bytes == 0
    assert not list(cache.directory.glob("v1/tmp/*"))


@dataclass(frozen=True)
class Settings:
    cache: str = "auto"
    cache_size: int = 1 << 30


def test_cache_of_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: CacheSettings = Settings()
    store = SimpleNamespace(root=tmp_path)
    assert cache_for(settings, store) is None
    assert cache_for(Settings("off"), object()) is None
    assert cache_for(Settings("auto", 0), object()) is None
    named = cache_for(Settings("/somewhere"), store)
    assert named is not None and named.directory == Path("/somewhere")
    remote = cache_for(settings, object())
    assert remote is not None and remote.directory == module.DEFAULT
    monkeypatch.setattr(module, "file_system", lambda device: "nfs4")
    shared = cache_for(settings, store)
    assert shared is not None and shared.limit == 1 << 30
    assert cache_for(settings, SimpleNamespace(root=tmp_path / "absent")) is None
