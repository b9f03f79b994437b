"""Files on volumes: which may begin empty, what is made of them, and that nothing else is touched."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
import subprocess
import threading
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from rewarm import blanks, volumes
from rewarm.criu import images, opened
from rewarm.errors import SnapshotDamaged
from rewarm.oci.record import Undo
from rewarm.oci.users import User
from rewarm.store.manifest import MAX_BLANK
from support import criu_images
from support.opens import Planted
from support.share import Share

READ, WRITE, BOTH, APPEND = os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_APPEND
FILE, DIRECTORY = stat.S_IFREG | 0o640, stat.S_IFDIR | 0o750
USER = {"user": {"uid": 1000, "gid": 1000, "additionalGids": [2000]}}


@dataclass
class Pod:
    """A container's root, one volume at /cache, and its dump."""

    directory: Path
    spec: dict[str, Any] = field(default_factory=dict)
    over: threading.Event = field(default_factory=threading.Event)
    _ids: int = 0
    _entries: list[bytes] = field(default_factory=list)
    _changes: list[Undo] = field(default_factory=list)

    def __post_init__(self) -> None:
        for path in (self.volume, self.root / "var/run", self.checkpoint, self.kept):
            path.mkdir(parents=True, exist_ok=True)
        self.volume.chmod(0o777)
        self.spec = {
            "process": USER,
            "mounts": [mount("/cache", self.volume), {"destination": "/proc", "type": "proc"}],
        }

    @property
    def volume(self) -> Path:
        return self.directory / "volume"

    @property
    def root(self) -> Path:
        return self.directory / "root"

    @property
    def checkpoint(self) -> Path:
        return self.directory / "checkpoint"

    @property
    def kept(self) -> Path:
        return self.directory / "kept"

    def open(self, name: str, flags: int, *, size: int | None = 0, at: int = 0, mode: int = FILE) -> int:
        self._ids += 1
        one = criu_images.field
        entry = one(1, self._ids) + one(2, flags) + one(3, at) + one(5, b"") + one(6, os.fsencode(name.lstrip("/")))
        entry += one(10, mode) + (b"" if size is None else one(8, size))
        self._entries.append(one(1, 1) + one(2, self._ids) + one(3, entry))
        (self.checkpoint / "files.img").write_bytes(criu_images.image(*self._entries))
        return self._ids

    def look(self) -> tuple[tuple[str, ...], list[str]]:
        return volumes.look(self.checkpoint, str(self.root), self.spec)

    def make(self, *blank: str) -> None:
        self._changes = volumes.lay_out(blank, self.checkpoint, str(self.kept), str(self.root), self.spec)
        volumes.make_blank(self._changes, self.checkpoint, self.over)

    def undo(self) -> None:
        for change in self._changes:
            blanks.take_away(change.root, change.layer)

    def entry(self, number: int) -> images.Message:
        records = list(images.records(self.checkpoint / "files.img"))
        return next(one for record in records for one in images.messages(record, 3) if images.number(one, 1) == number)


def mount(destination: str, source: Path, *options: str) -> dict[str, Any]:
    return {"destination": destination, "type": "bind", "source": str(source), "options": ["rbind", *options]}


@pytest.fixture
def pod(tmp_path: Path) -> Iterator[Pod]:
    yield Pod(tmp_path)


def test_what_may_begin_empty(pod: Pod) -> None:
    pod.open("/cache/app.log", APPEND, size=None)
    pod.open("/cache/out.log", WRITE, size=70, at=70)
    pod.open("/cache/locks/model.lock", BOTH)
    pod.open("/cache", READ, size=None, mode=DIRECTORY)
    pod.open("/cache/work", READ, size=None, mode=DIRECTORY)
    pod.open("/usr/lib/libc.so", READ, size=5)
    pod.open("/proc/self/stat", READ)
    (pod.volume / "app.log").touch()
    (pod.volume / "app.log.1.gz").write_text("rotated")
    (pod.volume / "more").mkdir()
    blank = ("/cache/app.log", "/cache/locks/model.lock", "/cache/out.log", "/cache/work")
    assert pod.look() == (blank, [])


@pytest.mark.parametrize(
    "file",
    [
        {"flags": READ, "size": 8},
        {"flags": READ, "size": 0},
        {"flags": BOTH, "size": 8, "at": 8},
        {"flags": BOTH | os.O_APPEND, "size": 8, "at": 8},
        {"flags": WRITE, "size": 8, "at": 4},
        {"flags": APPEND | os.O_PATH, "size": None},
        {"flags": APPEND, "size": None, "mode": stat.S_IFREG | 0o4755},
        {"flags": BOTH, "size": None, "mode": stat.S_IFIFO | 0o600},
    ],
)
def test_what_may_not(pod: Pod, file: dict[str, Any]) -> None:
    pod.open("/cache/data", **file)
    blank, notes = pod.look()
    assert blank == ()
    assert len(notes) == 1 and notes[0].startswith("volume /cache: data must be on a new container's as now, else it")


def test_one_that_is_read_as_well(pod: Pod) -> None:
    pod.open("/cache/app.log", APPEND, size=None)
    pod.open("/cache/app.log", READ, size=70)
    assert pod.look()[0] == ()


def test_a_journal_is_no_log(pod: Pod) -> None:
    """Redis' append-only file, beside which lies what it continues."""
    (pod.volume / "appendonlydir").mkdir()
    (pod.volume / "appendonlydir/base.rdb").write_text("data")
    pod.open("/cache/appendonlydir/incr.aof", APPEND, size=None)
    blank, notes = pod.look()
    assert blank == () and "appendonlydir/incr.aof" in notes[0]


def test_many_logs_in_one_directory(pod: Pod, monkeypatch: pytest.MonkeyPatch) -> None:
    """The container stands still meanwhile: its directory is read once."""
    for number in range(500):
        (pod.volume / f"{number}.log").write_text("line")
        pod.open(f"/cache/{number}.log", APPEND, size=None)
    scandir = Mock(wraps=os.scandir)
    monkeypatch.setattr(os, "scandir", scandir)
    blank, notes = pod.look()
    assert len(blank) == MAX_BLANK and len(notes) == 1
    assert scandir.call_count == 1


@pytest.mark.parametrize("change", ["read-only", "users"])
def test_volumes_on_which_nothing_is_made(pod: Pod, change: str) -> None:
    pod.open("/cache/app.log", APPEND, size=None)
    if change == "users":
        pod.spec["linux"] = {"namespaces": [{"type": "user"}]}
    else:
        pod.spec["mounts"][0]["options"].append("ro")
    assert pod.look()[0] == () and bool(pod.look()[1]) == (change != "read-only")
    pod.make("/cache/app.log")
    assert os.listdir(pod.volume) == []


def test_many_are_not_all_named(pod: Pod) -> None:
    for number in range(9):
        pod.open(f"/cache/{number}\n", READ, size=8)
    _, (note,) = pod.look()
    assert "'0\\n', '1\\n', '2\\n', '3\\n' and 5 more" in note


def test_mounts_in_volumes_and_links_to_them(pod: Pod) -> None:
    """The innermost counts: the control directory and files of other kinds of mounts are none of a volume's."""
    (pod.root / "run").symlink_to("var/run")
    pod.spec["mounts"] += [
        mount("/run/app", pod.volume),
        {"destination": "/cache/tmp", "type": "tmpfs"},
        mount("/run/rewarm", pod.volume),
        mount("/dev/shm", pod.volume),
        mount("/etc/hosts", Path("/etc/hosts")),
    ]
    for name in ("/cache/tmp/x", "/var/run/rewarm/x", "/dev/shm/x", "/etc/hosts", "/var/run/app/x"):
        pod.open(name, APPEND, size=None)
    assert pod.look() == (("/var/run/app/x",), [])


def test_what_is_made(pod: Pod) -> None:
    log = pod.open("/cache/logs/app.log", WRITE, size=70, at=70)
    pod.open("/cache/work", READ, size=None, mode=DIRECTORY)
    pod.open("/cache/work/.lock", BOTH)
    there = pod.open("/cache/there", WRITE, size=70, at=70)
    (pod.volume / "there").write_text("x" * 70)
    before = pod.entry(there)
    pod.make("/cache/logs/app.log", "/cache/work", "/cache/work/.lock", "/cache/there")
    found = {path.relative_to(pod.volume).as_posix(): path.stat() for path in pod.volume.rglob("*")}
    modes = {name: stat.S_IMODE(status.st_mode) for name, status in found.items() if name != "there"}
    assert modes == {"logs": 0o755, "logs/app.log": 0o640, "work": 0o750, "work/.lock": 0o640}
    assert {(status.st_uid, status.st_gid) for name, status in found.items() if name != "there"} == {(1000, 1000)}
    assert found["logs/app.log"].st_size == 0 and found["there"].st_size == 70
    # CRIU takes the new one as it is, and the old one as it was.
    assert 8 not in pod.entry(log) and images.number(pod.entry(log), 3, 9) == 0
    assert pod.entry(there) == before
    assert opened.files(pod.checkpoint)[0].name == b"/cache/logs/app.log"
    pod.undo()
    assert os.listdir(pod.volume) == ["there"]


def test_the_group_of_the_volume(pod: Pod) -> None:
    """Kubernetes' fsGroup."""
    os.chown(pod.volume, 0, 2000)
    pod.volume.chmod(0o2770)
    pod.open("/cache/logs/app.log", APPEND, size=None)
    pod.make("/cache/logs/app.log")
    assert (pod.volume / "logs").stat().st_mode & 0o7777 == 0o2755
    assert {(one.stat().st_uid, one.stat().st_gid) for one in pod.volume.rglob("*")} == {(1000, 2000)}


@pytest.mark.parametrize(
    ("owner", "mode", "capabilities", "made"),
    [
        ((0, 0), 0o755, [], False),
        ((0, 0), 0o755, ["CAP_DAC_OVERRIDE"], True),
        ((1000, 0), 0o700, [], True),
        ((1000, 0), 0o077, [], False),
        ((0, 2000), 0o730, [], True),
        ((0, 2000), 0o702, [], False),
    ],
)
def test_only_what_its_user_may_make(
    pod: Pod, owner: tuple[int, int], mode: int, capabilities: list[str], made: bool
) -> None:
    os.chown(pod.volume, *owner)
    pod.volume.chmod(mode)
    pod.spec["process"] = {**USER, "capabilities": {"ambient": capabilities}}
    pod.open("/cache/app.log", APPEND, size=None)
    pod.make("/cache/app.log")
    assert (pod.volume / "app.log").exists() == made


def test_only_what_the_manifest_names(pod: Pod) -> None:
    pod.open("/cache/app.log", APPEND, size=None)
    pod.make("/cache/other")
    pod.make()
    assert os.listdir(pod.volume) == []


def test_a_hostile_volume(pod: Pod) -> None:
    """Links out of it are not followed, and mounts in it not entered."""
    outside = pod.directory / "outside"
    outside.mkdir()
    (pod.volume / "link").symlink_to(outside)
    (pod.volume / "dangling").symlink_to(outside / "new")
    (pod.volume / "file").touch()
    (pod.volume / "mount").mkdir()
    names = ["/cache/link/x", "/cache/dangling", "/cache/file/x", "/cache/mount/x"]
    for name in names:
        pod.open(name, APPEND, size=None)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", pod.volume / "mount"], check=True)
    try:
        pod.make(*names)
        assert os.listdir(pod.volume / "mount") == [] == os.listdir(outside)
    finally:
        subprocess.run(["umount", pod.volume / "mount"], check=True)
    assert sorted(os.listdir(pod.volume)) == ["dangling", "file", "link", "mount"]


def test_hostile_images(pod: Pod) -> None:
    """Names that lead out of the volume, or into the container directory."""
    names = ["/cache/../../x", "/cache/a/../../../x", "/cache//x", "/cache/./x", "/cache/" + "n" * 300]
    for name in names:
        pod.open(name, APPEND, size=None)
    before = sorted(path.relative_to(pod.directory) for path in pod.directory.rglob("*"))
    pod.make(*names)
    assert sorted(path.relative_to(pod.directory) for path in pod.directory.rglob("*")) == before


def test_images_that_are_none(pod: Pod) -> None:
    pod.open("/cache/app.log", APPEND, size=None)
    path = pod.checkpoint / "files.img"
    path.write_bytes(path.read_bytes()[:-1])
    assert pod.look() == ((), [])
    with pytest.raises(SnapshotDamaged, match=r"files\.img"):
        pod.make("/cache/app.log")


def test_what_others_use_by_then_stays(pod: Pod) -> None:
    """On a shared volume: a log that others write to, one that they have open, a directory in which they work."""
    names = ["/cache/logs/written", "/cache/logs/open", "/cache/work/lock", "/cache/work", "/cache/other"]
    for name in names:
        pod.open(
            name, *((READ,) if name == "/cache/work" else (WRITE,)), mode=DIRECTORY if name == "/cache/work" else FILE
        )
    pod.make(*names)
    (pod.volume / "logs/written").write_text("theirs")
    (pod.volume / "other").rename(pod.volume / "mine")
    (pod.volume / "other").touch()
    with (pod.volume / "logs/open").open():
        pod.undo()
    left = sorted(path.relative_to(pod.volume).as_posix() for path in pod.volume.rglob("*"))
    assert left == ["logs", "logs/open", "logs/written", "mine", "other"]
    pod.undo()


def test_others_are_faster(pod: Pod) -> None:
    number = pod.open("/cache/logs/app.log", WRITE, size=70, at=70)
    before = pod.entry(number)
    changes = volumes.lay_out(["/cache/logs/app.log"], pod.checkpoint, str(pod.kept), str(pod.root), pod.spec)
    (pod.volume / "logs").mkdir()
    (pod.volume / "logs/app.log").touch()
    volumes.make_blank(changes, pod.checkpoint, threading.Event())
    assert pod.entry(number) == before
    blanks.take_away(changes[0].root, changes[0].layer)
    assert (pod.volume / "logs/app.log").exists()


def test_a_killed_restore_is_undone(pod: Pod, monkeypatch: pytest.MonkeyPatch) -> None:
    """It had no time to write down what it has made."""
    pod.open("/cache/logs/app.log", APPEND, size=None)
    changes = volumes.lay_out(["/cache/logs/app.log"], pod.checkpoint, str(pod.kept), str(pod.root), pod.spec)
    with monkeypatch.context() as patched:
        save = blanks.save
        patched.setattr(blanks, "save", lambda *plan, begun: None if plan[-1][0].inode else save(*plan, begun=begun))
        volumes.make_blank(changes, pod.checkpoint, threading.Event())
    assert (pod.volume / "logs/app.log").exists()
    blanks.take_away(changes[0].root, changes[0].layer)
    assert os.listdir(pod.volume) == []


def test_deleted_files_are_left_to_criu(pod: Pod) -> None:
    number = pod.open("/cache/app.log", APPEND, size=None)
    remap = criu_images.field(1, number) + criu_images.field(2, 99) + criu_images.field(3, 1)
    (pod.checkpoint / "remap-fpath.img").write_bytes(criu_images.image(remap))
    assert pod.look() == ((), [])


def test_what_was_not_begun_is_not_undone(pod: Pod) -> None:
    """A restore that was killed before has made nothing: what lies there by now is others', as an empty lock is."""
    pod.open("/cache/app.lock", BOTH)
    pod.open("/cache/work", READ, size=None, mode=DIRECTORY)
    pod.open("/cache/app.log", APPEND, size=None)
    names = ("/cache/app.lock", "/cache/app.log", "/cache/work")
    (change,) = volumes.lay_out(names, pod.checkpoint, str(pod.kept), str(pod.root), pod.spec)
    (pod.volume / "app.lock").touch()
    (pod.volume / "work").mkdir()
    blanks.take_away(change.root, change.layer)
    assert sorted(os.listdir(pod.volume)) == ["app.lock", "work"]


def test_a_directory_in_the_place_of_the_one_that_was_made_stays(pod: Pod) -> None:
    pod.open("/cache/work", READ, size=None, mode=DIRECTORY)
    pod.make("/cache/work")
    (pod.volume / "work").rename(pod.volume / "moved")
    (pod.volume / "work").mkdir()
    pod.undo()
    assert (pod.volume / "work").is_dir()


@pytest.mark.parametrize("killed", [False, True])
def test_a_device_in_the_place_of_what_was_made_is_not_opened(
    pod: Pod, monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    """A container makes it by mknod: with root's rights the watchdog would be opened, and the node reboot."""
    pod.open("/cache/app.log", APPEND, size=None)
    with monkeypatch.context() as patched:
        save = blanks.save
        if killed:  # before it wrote down what it has made
            patched.setattr(blanks, "save", lambda *plan, begun=False: plan[2][0].inode or save(*plan, begun=begun))
        pod.make("/cache/app.log")
    with Planted(pod.volume / "app.log") as device:
        pod.undo()
        assert device.opens() == 0 and device.path.exists()


def test_names_that_are_too_deep(pod: Pod) -> None:
    """Of each directory on the way the whole name is kept: a thousand levels of one name took 70 MB."""
    names = [f"/cache/{number}" + "/ab" * 1360 for number in range(3)]
    for name in [*names, "/cache/app.lock", "/cache/" + "/".join(["n" * 250] * 17)]:
        pod.open(name, BOTH)
    tracemalloc.start()
    try:
        (change,) = volumes.lay_out(["/cache/app.lock", *names], pod.checkpoint, str(pod.kept), str(pod.root), pod.spec)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    assert [one["name"] for one in json.loads(Path(change.layer).read_bytes())["files"]] == [["app.lock"]]
    blank, (note,) = pod.look()
    assert blank == ("/cache/app.lock",) and "32 levels deep" in note and len(note) < 1500


@pytest.mark.parametrize("volumes_", [1, 2])
def test_many_directories_on_the_way(pod: Pod, volumes_: int) -> None:
    if volumes_ == 2:
        (pod.directory / "other").mkdir(mode=0o777)
        pod.spec["mounts"].append(mount("/other", pod.directory / "other"))
    names = ["/{}/{}/{}x".format(("cache", "other")[n % volumes_], n, "d/" * 30) for n in range(40)]
    for name in names:
        pod.open(name, BOTH)
    blank, notes = pod.look()
    assert set(blank) < set(names) and len(blank) == 32 and len(notes) == 1
    changes = volumes.lay_out(names, pod.checkpoint, str(pod.kept), str(pod.root), pod.spec)
    plans = [json.loads(Path(change.layer).read_bytes())["files"] for change in changes]
    assert len(plans) == volumes_ and sum(map(len, plans)) == 1024


@pytest.mark.parametrize("at", [0, 1, 2])
def test_nothing_is_made_after_the_end(pod: Pod, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """A volume that answers after the deadline, when the restore was undone: what is there then stays for ever."""
    if at == 0:
        pod.over.set()
    making = blanks._make
    asked: list[str] = []

    def make(source: str, one: blanks.Blank, user: User) -> int:
        asked.append(one.name[-1])
        if len(asked) == at:
            pod.over.set()
            pod.undo()
        return making(source, one, user)

    monkeypatch.setattr(blanks, "_make", make)
    number = pod.open("/cache/app.log", WRITE, size=70, at=70)
    pod.open("/cache/more", BOTH)
    pod.open("/cache/work", READ, size=None, mode=DIRECTORY)
    before = pod.entry(number)
    pod.make("/cache/app.log", "/cache/more", "/cache/work")
    assert len(asked) == at and os.listdir(pod.volume) == [] and pod.entry(number) == before
    assert os.listdir(pod.kept) == ([] if at else ["0.volume"])


def test_on_a_share_a_file_may_be_open_on_another_node(pod: Pod) -> None:
    share = pod.directory / "share"
    with Share(pod.volume, share):
        pod.spec["mounts"][0] = mount("/cache", share)
        pod.open("/cache/app.lock", BOTH)
        pod.open("/cache/work", READ, size=None, mode=DIRECTORY)
        pod.make("/cache/app.lock", "/cache/work")
        assert sorted(os.listdir(share)) == ["app.lock", "work"]
        with (pod.volume / "app.lock").open():
            pod.undo()
    assert os.listdir(pod.volume) == ["app.lock"] and os.listdir(pod.kept) == []


@pytest.mark.parametrize("refused", [errno.EAGAIN, errno.EINVAL, errno.EACCES, errno.ENOLCK])
def test_what_has_no_lease_stays(pod: Pod, monkeypatch: pytest.MonkeyPatch, refused: int) -> None:
    pod.open("/cache/app.lock", BOTH)
    pod.make("/cache/app.lock")
    monkeypatch.setattr(fcntl, "fcntl", Mock(side_effect=OSError(refused, os.strerror(refused))))
    pod.undo()
    assert os.listdir(pod.volume) == ["app.lock"]
