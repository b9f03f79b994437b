"""The way back from a restore: by the record, by whoever walks it, as often as it takes, and nothing but its own."""

from __future__ import annotations

import io
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rewarm import processes, recover, resume, sweep, sysv
from rewarm.errors import OciError
from rewarm.oci import mounts, record, runc, spec
from rewarm.oci.record import Record, Undo
from rewarm_hooks.layer import apply_layer
from support import tars
from support.proc import command, wait_for

SOURCES = os.pathsep.join(str(Path(__file__).parents[2] / name) for name in ("shim", "hooks"))
DEAD = 2**22 + 1  # above the largest pid that Linux gives


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    made = tmp_path / "bundle"
    (made / "rootfs/etc").mkdir(parents=True)
    (made / "rootfs/etc/issue").write_text("the image's\n")
    (made / "config.json").write_text('{"as": "it was"}')
    return made


@pytest.fixture
def path(tmp_path: Path, bundle: Path) -> Path:
    """A container directory whose rewarm was killed before it changed anything."""
    made = Path(record.directory(str(tmp_path / "state"), str(tmp_path / "root"), "c1"))
    record.make_directory(str(made), of(tmp_path, bundle))
    return made


def of(tmp_path: Path, bundle: Path, owner: int = DEAD) -> Record:
    kept = Record("c1", str(tmp_path / "root"), str(bundle), record.RESTORING, owner_pid=owner, owner_start=1)
    return kept.owned() if owner == os.getpid() else kept


def changed(path: Path, bundle: Path) -> Record:
    """Change what a restore changes, as far as it gets before runc; returns the record, which is saved."""
    kept = record.load(str(path))
    assert kept is not None
    backup = path / "config.json.orig"
    backup.write_bytes((bundle / "config.json").read_bytes())
    (bundle / "config.json").write_text('{"prepared": true}')
    (bundle / "rootfs/run/rewarm").mkdir(parents=True)
    pid_file = bundle / "init.pid"
    pid_file.write_text("12345")
    (bundle / ".init.pid").touch()  # of a runc that was killed before it gave it its name
    (bundle / f"config.json.rewarm-{DEAD}").touch()
    kept = kept._replace(
        config_backup=str(backup),
        config_written=(spec.digest_of(b'{"prepared": true}'),),
        rootfs=str(bundle / "rootfs"),
        undo=(Undo(str(bundle / "rootfs"), str(path / "rootfs.undo")),),
        places=(str(bundle / "rootfs/run"), str(bundle / "rootfs/run/rewarm")),
        pid_file=str(pid_file),
    )
    record.save(str(path), kept)
    fd = os.open(bundle / "rootfs", os.O_RDONLY)
    try:
        diff = tars.file(b"etc/issue", b"the snapshot's\n") + tars.file(b"etc/new") + tars.END
        apply_layer(io.BytesIO(diff), fd, path / "rootfs.undo")
    finally:
        os.close(fd)
    return kept


def is_as_it_was(bundle: Path) -> bool:
    files = {str(item.relative_to(bundle)) for item in bundle.rglob("*")}
    return (
        files == {"config.json", "rootfs", "rootfs/etc", "rootfs/etc/issue"}
        and (bundle / "rootfs/etc/issue").read_text() == "the image's\n"
        and (bundle / "config.json").read_text() == '{"as": "it was"}'
    )


def test_everything_is_put_back(path: Path, bundle: Path) -> None:
    changed(path, bundle)
    assert recover.recover(str(path), "/no/runc", wait=True)
    assert is_as_it_was(bundle)
    assert not path.exists() and list(path.parent.iterdir()) == []
    assert not recover.recover(str(path), "/no/runc", wait=True)


def test_undoing_twice_does_no_harm(path: Path, bundle: Path) -> None:
    kept = changed(path, bundle)
    for _ in range(2):
        recover.undo(str(path), kept, runc.Runc("/no/runc", kept.root))
        assert is_as_it_was(bundle)


def test_objects_of_a_pods_ipc_namespace_are_taken_back(path: Path, bundle: Path) -> None:
    program = """
import ctypes, os, time
libc = ctypes.CDLL(None)
made, others = (libc.semget(key, 1, 0o1600) for key in (7, 8))
if os.fork() == 0:
    os._exit(libc.semctl(made, 0, 16, 1))
os.wait()
print(made, flush=True)
time.sleep(60)
"""
    args = ["unshare", "--ipc", sys.executable, "-c", program]
    with subprocess.Popen(args, stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout is not None
            made = sysv.Object(sysv.SEM, 7, int(other.stdout.readline()))
            namespace = f"/proc/{other.pid}/ns/ipc"
            kept = changed(path, bundle)
            record.save(str(path), kept._replace(ipc=sysv.planned(namespace, [made])))
            assert recover.recover(str(path), "/no/runc", wait=True) and is_as_it_was(bundle)
            with sysv.namespace(namespace) as there:
                assert [one.key for one in there.objects()] == [8]
        finally:
            other.kill()


def test_a_restore_is_taken_back_by_its_own_process(path: Path, bundle: Path) -> None:
    """What others must leave alone: its child has died in the middle, or after the last step."""
    for phase in (record.RESTORING, record.RESTORED):
        if not path.exists():
            record.make_directory(str(path), of(bundle.parent, bundle))
        kept = changed(path, bundle)._replace(phase=phase).owned()
        record.save(str(path), kept)
        assert not recover.recover(str(path), "/no/runc", wait=True)
        recover.take_back(str(path), "/no/runc")
        assert is_as_it_was(bundle) and not path.exists()
        recover.take_back(str(path), "/no/runc")
        assert list(path.parent.iterdir()) == []


def test_the_restore_of_another_process_is_not_taken_back(path: Path, bundle: Path) -> None:
    """Whose `create` came when the guard had undone this one's."""
    changed(path, bundle)
    recover.take_back(str(path), "/no/runc")
    assert path.exists() and (bundle / "init.pid").exists()
    assert list(path.parent.iterdir()) == [path]


def test_what_a_living_process_writes_stays(path: Path, bundle: Path) -> None:
    changed(path, bundle)
    mine, other = (bundle / f"config.json.rewarm-{name}" for name in (os.getppid(), "backup"))
    mine.touch()
    other.touch()
    assert recover.recover(str(path), "/no/runc", wait=True)
    assert mine.exists() and other.exists()


def test_a_living_rewarm_is_left_alone(path: Path, bundle: Path, tmp_path: Path) -> None:
    record.save(str(path), changed(path, bundle)._replace(**of(tmp_path, bundle, os.getpid())._asdict() | {"undo": ()}))
    recover.settle(str(path), "/no/runc")
    assert sweep.left_overs(str(tmp_path / "state"), "/no/runc") == []
    assert path.exists() and (bundle / "init.pid").exists()


def test_the_guard_undoes_what_it_has_killed(path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a restore that was complete but for the last byte to the guard, and of a rewarm that waits for it."""
    monkeypatch.setenv("REWARM_CONFIG", "/no/config")
    kept = changed(path, bundle)._replace(phase=record.RESTORED, init_pid=DEAD).owned()
    record.save(str(path), kept)
    assert recover.main([str(path)]) == 0
    assert is_as_it_was(bundle) and not path.exists()


def test_what_start_reads_goes_with_the_directory(path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container that was restored and not started yet stays, and its record alone says what it is."""
    monkeypatch.setenv("REWARM_CONFIG", "/no/config")
    kept = changed(path, bundle)._replace(phase=record.RESTORED, init_pid=DEAD)
    resume.write_down(str(path), kept)
    record.save(str(path), kept)
    (Path(kept.root) / "c1").mkdir(parents=True)
    assert sweep.left_overs(str(path.parents[2]), "/no/runc") == []
    recover.settle(str(path), "/no/runc")
    assert {"start", "record.started.json"} <= set(os.listdir(path))
    assert record.load(str(path)) == kept
    (Path(kept.root) / "c1").rmdir()
    assert recover.main([str(path)]) == 0
    assert is_as_it_was(bundle) and not path.exists()


@pytest.mark.parametrize("phase", [record.STARTED, record.COLD])
def test_the_guard_never_touches_a_container(
    path: Path, bundle: Path, phase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REWARM_CONFIG", "/no/config")
    record.save(str(path), changed(path, bundle)._replace(phase=phase))
    assert recover.main([str(path)]) == 0
    assert path.exists() and (bundle / "rootfs/etc/new").exists()


def test_a_config_of_somebody_else_stays(path: Path, bundle: Path) -> None:
    """The engine may have made the bundle anew since the crash."""
    changed(path, bundle)
    (bundle / "config.json").write_text('{"the engine": "again"}')
    assert recover.recover(str(path), "/no/runc", wait=True)
    assert (bundle / "config.json").read_text() == '{"the engine": "again"}'


def test_config_keeps_its_mode(path: Path, bundle: Path) -> None:
    kept = changed(path, bundle)
    os.chmod(kept.config_backup, 0o640)
    recover.undo(str(path), kept, runc.Runc("/no/runc", kept.root))
    assert (bundle / "config.json").stat().st_mode & 0o7777 == 0o640


def test_half_written_config_goes(path: Path, bundle: Path) -> None:
    changed(path, bundle)
    Path(spec.scratch(str(bundle / "config.json"), DEAD)).write_text("half")
    assert recover.recover(str(path), "/no/runc", wait=True)
    assert is_as_it_was(bundle)


def test_what_a_killed_criu_left_in_tmp_goes(path: Path, bundle: Path) -> None:
    """By the names in its log, but nothing that was there before, or that holds something."""
    kept = changed(path, bundle)
    older, own, full, unnamed = (Path(f"/tmp/.criu.mntns.{secrets.token_hex(3)}") for _ in range(4))
    file = Path(f"/tmp/.criu.mntns.{secrets.token_hex(3)}")
    try:
        older.mkdir()
        time.sleep(0.05)
        (path / "criu.conf").touch()
        (path / "work").mkdir()
        for yard in (own, full, unnamed):
            yard.mkdir()
        (full / "file").touch()
        file.symlink_to(unnamed)
        (path / "work/restore.log").write_text(
            "".join(f"(00.1) mnt: \t\tWill mount 55 @ {yard}/mnt-55 /sys\n" for yard in (older, file, full, own))
        )
        for _ in range(2):
            recover.undo(str(path), kept, runc.Runc("/no/runc", kept.root))
            assert not own.exists()
            assert older.exists() and full.exists() and unnamed.exists() and file.is_symlink()
    finally:
        file.unlink(missing_ok=True)
        for yard in (older, own, full, unnamed):
            shutil.rmtree(yard, ignore_errors=True)


@pytest.mark.parametrize("when", ["before", "after"])
def test_what_criu_looks_at_the_kernel_with(path: Path, when: str) -> None:
    """It is killed between two mounts; what was there before this restore is not this one's."""
    probe = Path(tempfile.mkdtemp(prefix=".criu.move_mount_set_group.", dir="/tmp"))
    probe = probe.rename(f"/tmp/.criu.move_mount_set_group.{secrets.token_hex(3)}")
    kept = record.load(str(path))
    assert kept is not None
    try:
        command("mount", "-t", "tmpfs", "tmpfs", probe)
        (probe / "subdir").mkdir()
        command("mount", "-t", "tmpfs", "tmpfs", probe / "subdir")
        time.sleep(0.05)
        (path / "criu.conf").touch()
        if when == "after":
            os.utime(path / "criu.conf", (time.time() - 1, time.time() - 1))
        other = Path(f"{probe}0")  # whose name begins like it, and which is somebody's
        other.mkdir()
        command("mount", "-t", "tmpfs", "tmpfs", other)
        recover.undo(str(path), kept, runc.Runc("/no/runc", kept.root))
        assert probe.exists() is (when == "before")
        assert bool(mounts.below(str(probe)) or os.path.ismount(probe)) is (when == "before")
        assert os.path.ismount(other)
        command("umount", other)
        other.rmdir()
    finally:
        for target in (Path(f"{probe}0"), probe / "subdir", probe):
            if os.path.ismount(target):
                command("umount", target)
        if probe.exists():
            probe.rmdir()


def test_a_place_that_holds_something_stays(path: Path, bundle: Path) -> None:
    kept = changed(path, bundle)
    (bundle / "rootfs/run/rewarm/file").write_text("somebody's")
    recover.undo(str(path), kept, runc.Runc("/no/runc", kept.root))
    assert (bundle / "rootfs/run/rewarm/file").read_text() == "somebody's"


def test_a_tree_that_was_unmounted_is_left(path: Path, bundle: Path) -> None:
    """What was a mounted root filesystem is now the empty directory below: no place for originals."""
    kept = changed(path, bundle)
    kept = kept._replace(undo=tuple(change._replace(mounted=True) for change in kept.undo), places=())
    (bundle / "rootfs/etc/issue").unlink()
    recover.undo(str(path), kept, runc.Runc("/no/runc", kept.root))
    assert not (bundle / "rootfs/etc/issue").exists()


def test_a_bundle_that_is_gone_is_no_failure(path: Path, bundle: Path) -> None:
    changed(path, bundle)
    bundle.rename(bundle.with_name("elsewhere"))
    assert recover.recover(str(path), "/no/runc", wait=True)


def test_what_cannot_be_undone_is_kept_and_said(path: Path, bundle: Path, tmp_path: Path) -> None:
    changed(path, bundle)
    undo = path / "rootfs.undo"
    undo.write_bytes(b"no layer" * 200)
    problems = sweep.left_overs(str(tmp_path / "state"), "/no/runc")
    assert len(problems) == 1 and "undo restore c1" in problems[0] and str(bundle / "rootfs") in problems[0]
    assert path.exists() and undo.exists()
    # Who waits for something else does not wait for it time and again.
    state = str(tmp_path / "state")
    assert sweep.left_overs(state, "/no/runc", in_passing=True) == problems
    assert sweep.left_overs(state, "/no/runc", in_passing=True) == []
    assert sweep.left_overs(state, "/no/runc") == problems
    (path / "record.json").rename(path / "kept")
    (path / "record.json").write_text("{")
    for _ in range(2):
        [line] = sweep.left_overs(state, "/no/runc", in_passing=True)
        assert "record.json" in line
    (path / "kept").rename(path / "record.json")
    os.utime(path / "tried", (1, 1))
    assert sweep.left_overs(state, "/no/runc", in_passing=True) == problems


def test_what_takes_long_is_left_to_the_next_one(
    path: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed(path, bundle)
    monkeypatch.setattr(sweep, "_LONGEST", -1)
    assert sweep.left_overs(str(tmp_path / "state"), "/no/runc", in_passing=True) == []
    assert path.exists()
    assert sweep.left_overs(str(tmp_path / "state"), "/no/runc") == []
    assert not path.exists()


def test_mounts_go_before_anything_is_deleted(path: Path, bundle: Path, tmp_path: Path) -> None:
    """A killed runc leaves the rootfs bind-mounted below its own directory, which `runc delete` removes recursively."""
    kept = changed(path, bundle)
    volume = tmp_path / "volume"
    volume.mkdir()
    (volume / "precious").write_text("data")
    engine = bundle / "rootfs/etc/engines"
    for target in (Path(kept.root, "c1/criu-root"), bundle / "rootfs/data", path / "work/.criu.cgyard", engine):
        target.mkdir(parents=True)
        subprocess.run(["mount", "--bind", volume, target], check=True)
    script = tmp_path / "runc"
    script.write_text(f"#!/bin/sh\nrm -rf {kept.root}/c1\n")
    script.chmod(0o755)
    record.save(str(path), kept._replace(mounts=(str(engine),)))
    try:
        assert recover.recover(str(path), str(script), wait=True)
        assert (volume / "precious").read_text() == "data"
        assert not Path(kept.root, "c1").exists() and not path.exists()
        assert mounts.below(str(tmp_path)) == [str(engine)], "a mount from before the restore is not its own"
    finally:
        mounts.unmount_below(str(tmp_path))


def test_a_container_directory_with_mounts_is_removed_without_them(path: Path, tmp_path: Path) -> None:
    volume = tmp_path / "volume"
    volume.mkdir()
    (volume / "precious").write_text("data")
    target = path / "work with space"
    target.mkdir()
    for _ in range(2):  # one upon the other
        subprocess.run(["mount", "--bind", volume, target], check=True)
    recover.forget(str(path))
    assert (volume / "precious").exists() and not path.exists()


def test_forgetting_takes_along_what_was_begun_by_the_dead(path: Path) -> None:
    """A `create` killed while it made the directory, or a `delete` while it removed it; the next `delete` is enough."""
    for name in (f"{path.name}~{DEAD}", f"{path.name}~1", f"{path.name}2~{DEAD}"):
        path.with_name(name).mkdir()
    recover.forget(str(path))
    recover.forget(str(path))
    left = sorted(item.name for item in path.parent.iterdir())
    assert left == sorted([f"{path.name}~1", f"{path.name}2~{DEAD}"])


def test_processes_of_a_container_that_runc_knows_not(path: Path, bundle: Path) -> None:
    """Killed before it wrote state.json, runc has left CRIU and what it made in the cgroup alone."""
    directory = Path("/sys/fs/cgroup/pids") / f"rewarm-test-{os.getpid()}"
    if not directory.parent.is_dir():
        directory = Path("/sys/fs/cgroup") / directory.name
    below = directory / "nested"
    below.mkdir(parents=True)
    stopped = subprocess.Popen(["sleep", "100"])
    (below / "cgroup.procs").write_text(str(stopped.pid))
    try:
        record.save(str(path), changed(path, bundle)._replace(cgroups=(str(directory),)))
        assert recover.recover(str(path), "/no/runc", wait=True)
        assert not directory.exists()
        assert stopped.wait(5) == -9
    finally:
        stopped.kill()
        stopped.wait()
        for one in (below, directory):
            if one.exists():
                one.rmdir()


def test_sweep_forgets_what_nobody_has(tmp_path: Path, bundle: Path) -> None:
    state, root = str(tmp_path / "state"), str(tmp_path / "root")
    kinds = {
        "gone": of(tmp_path, bundle),
        "begins": of(tmp_path, bundle, os.getpid()),
        "known": of(tmp_path, bundle),
    }
    for name, kept in kinds.items():
        record.make_directory(record.directory(state, root, name), kept._replace(id=name, phase=record.COLD))
    Path(root, "known").mkdir(parents=True)
    parent = Path(record.directory(state, root, "x")).parent
    (parent / f"half~{DEAD}").mkdir()
    (parent / f"half~{os.getpid()}").mkdir()
    (parent / "broken").mkdir()
    (parent / "broken" / "record.json").write_text("{")
    assert ["record.json" in line for line in sweep.left_overs(state, "/no/runc")] == [True]
    assert {item.name for item in parent.iterdir()} == {"begins", "known", "broken", f"half~{os.getpid()}"}


def test_sweep_says_what_it_cannot_remove(tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An immutable file of a container's is no reason for every other one to start cold."""
    parent = tmp_path / "state" / "containers" / "root"
    (parent / f"half~{DEAD}").mkdir(parents=True)

    def immutable(path: str) -> None:
        raise PermissionError(1, "Operation not permitted", path)

    monkeypatch.setattr("rewarm.oci.record.remove", immutable)
    [problem] = sweep.left_overs(str(tmp_path / "state"), "/no/runc")
    assert "Operation not permitted" in problem and "half~" in problem


def test_a_watcher_is_no_guard(path: Path) -> None:
    """It has the container directory as an argument, too."""
    words = [sys.executable, "-c", "import time; time.sleep(100)", "rewarm.watcher", str(path)]
    with subprocess.Popen(words) as watcher:
        try:
            assert recover.guards(str(path)) == []
        finally:
            watcher.kill()
    with subprocess.Popen([*words[:3], "rewarm.recover", str(path)]) as guard:
        try:
            assert recover.guards(str(path)) == [guard.pid]
        finally:
            guard.kill()


@pytest.mark.parametrize("empty", [[1], [1, 2, 3], [2]])
def test_a_guard_in_the_middle_of_execve(path: Path, monkeypatch: pytest.MonkeyPatch, empty: list[int]) -> None:
    """It has no arguments yet, or none any more, and is none the less there. `empty`: which looks find none."""
    words, asked = recover._words, []

    def not_always(pid: int) -> bytes:
        asked.append(pid)
        return b"" if pid == guard.pid and asked.count(pid) in empty else words(pid)

    command = [sys.executable, "-c", "import time; time.sleep(100)", "rewarm.recover", str(path)]
    with subprocess.Popen(command) as guard:
        try:
            wait_for("its arguments", lambda: words(guard.pid))
            monkeypatch.setattr(recover, "_LONGEST_EXEC", 30.0)
            monkeypatch.setattr(recover, "_words", not_always)
            assert recover.guards(str(path)) == [guard.pid]
        finally:
            guard.kill()


def test_processes_without_words_hold_nothing_up_for_long(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = recover._words
    program = "import time; time.sleep(100)"
    with (
        subprocess.Popen([sys.executable, "-c", program]) as one,
        subprocess.Popen([sys.executable, "-c", program]) as two,
    ):
        try:
            wait_for("their arguments", lambda: words(one.pid) and words(two.pid))
            monkeypatch.setattr(recover, "_LONGEST_EXEC", 0.5)
            monkeypatch.setattr(recover, "_words", lambda pid: b"" if pid in (one.pid, two.pid) else words(pid))
            began = time.monotonic()
            assert recover.guards(str(path)) == []
            assert time.monotonic() - began >= 0.5, "they were not waited for"
            monkeypatch.setattr(recover, "_LONGEST_EXEC", 30.0)
            began = time.monotonic()
            os.kill(one.pid, signal.SIGKILL)
            os.kill(two.pid, signal.SIGKILL)
            assert recover.guards(str(path)) == []
            assert time.monotonic() - began < 20, "they are gone"
        finally:
            one.kill()
            two.kill()


def test_sweep_of_no_state_is_no_failure(tmp_path: Path) -> None:
    assert sweep.left_overs(str(tmp_path / "nowhere"), "/no/runc") == []
    (tmp_path / "file").write_text("")
    assert sweep.left_overs(str(tmp_path / "file"), "/no/runc") == []


def test_one_at_a_time(path: Path) -> None:
    with recover.locked(str(path), wait=True) as first:
        assert first >= 0
        with recover.locked(str(path), wait=False) as second:
            assert second == -1
    with recover.locked(str(path), wait=False) as again:
        assert again >= 0


def test_a_lock_that_was_removed_is_no_lock(path: Path) -> None:
    """Who waited for the lock of a directory that was forgotten meanwhile must not share it with the next one."""
    lock = Path(f"{path}~lock")
    program = (
        "import os, sys; from rewarm import recover\n"
        "with recover.locked(sys.argv[1], wait=True): sys.exit(not os.path.exists(sys.argv[1] + '~lock'))\n"
    )
    with recover.locked(str(path), wait=True):
        child = subprocess.Popen([sys.executable, "-c", program, path], env={**os.environ, "PYTHONPATH": SOURCES})
        wait_for("the other to wait", lambda: blocked(child.pid))
        lock.unlink()
    assert child.wait(10) == 0


def blocked(pid: int) -> bool:
    """Whether the process waits for a flock: it is in /proc/locks behind an arrow."""
    return any(f" {pid} " in line and "->" in line for line in Path("/proc/locks").read_text().splitlines())


def test_directory_appears_whole_or_not_at_all(path: Path, tmp_path: Path, bundle: Path) -> None:
    with pytest.raises(FileExistsError):
        record.make_directory(str(path), of(tmp_path, bundle))
    assert {item.name for item in path.parent.iterdir()} == {"c1"}
    assert (path / "control").stat().st_mode & 0o7777 == 0o1777
    assert path.stat().st_mode & 0o7777 == 0o700


@pytest.mark.parametrize(
    "container_id", ["", ".", "..", "a/b", "../x", "a b", "a\n", "ü", "a~1", "-x", "--force", "x" * 201, "\0"]
)
def test_ids_that_rewarm_has_no_part_in(container_id: str) -> None:
    with pytest.raises(OciError, match="container id"):
        record.check_id(container_id)


@pytest.mark.parametrize("container_id", ["a", "A_9", "a.b", "a+b", "a,b", "a-b", "...", "0" * 64, "x" * 200])
def test_ids(container_id: str) -> None:
    record.check_id(container_id)


def test_records_are_read_as_written(path: Path, bundle: Path) -> None:
    kept = changed(path, bundle)
    assert record.load(str(path)) == kept
    older = json.loads((path / "record.json").read_text())
    for key in record.Record._field_defaults.keys() - {"undo"}:
        # One by one: a rewarm of any age may have written it.
        (path / "record.json").write_text(json.dumps({name: value for name, value in older.items() if name != key}))
        found = record.load(str(path))
        assert found == kept._replace(**{key: record.Record._field_defaults[key]}), key


@pytest.fixture(autouse=True)
def no_processes_left() -> Iterator[None]:
    before = set(processes.tree(os.getpid()))
    yield
    assert set(processes.tree(os.getpid())) == before


def test_a_record_of_a_newer_rewarm(tmp_path: Path, bundle: Path) -> None:
    """The node went back to this one, and its containers live on."""
    path = tmp_path / "c1"
    kept = of(tmp_path, bundle)._replace(undo=(record.Undo("/root", "/layer"),))
    record.make_directory(str(path), kept)
    file = path / "record.json"
    data = json.loads(file.read_text())
    data["undo"][0]["later"] = 1
    file.write_text(json.dumps({**data, "later": ["x"]}))
    assert record.load(str(path)) == kept
