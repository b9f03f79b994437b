"""rewarm-runc's own `start`: real processes that are stopped, and continued by what a restore has written down.

The real binary, built plain and with ASan and UBSan. A `start` that it does not take goes to a python3 that is a
script, as in test_launcher.py.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from rewarm import processes, resume
from rewarm.oci import record
from rewarm.oci.record import Record
from support.proc import state_of, wait_for

NATIVE = Path(__file__).resolve().parents[2] / "native"
DEAD = 2**22 + 1  # above the largest pid that Linux gives
# A parent and two children, all stopped by themselves; what goes on adds its line to a file.
TREE = """
for name in one two; do
    sh -c 'kill -STOP $$; echo '$name' >>ran; exec sleep 100' &
done
kill -STOP $$
echo init >>ran
exec sleep 100
"""


@pytest.fixture(scope="module", params=["plain", "sanitized"])
def launcher(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    build = tmp_path_factory.mktemp(request.param)
    sanitize = ["SANITIZE=1"] if request.param == "sanitized" else []
    subprocess.run(["make", "-s", "-C", NATIVE, f"BUILD={build}", *sanitize, f"{build}/rewarm-runc"], check=True)
    return build / "rewarm-runc"


@dataclass
class Restored:
    """A container as a restore leaves it: the tree stopped, the record RESTORED, what runc keeps, and left-overs."""

    base: Path
    init: int
    kept: Record = field(init=False)

    def __post_init__(self) -> None:
        (self.root / "c1").mkdir(parents=True)
        (self.root / "c1/state.json").write_text("{}")
        os.mkfifo(self.fifo)
        self.kept = Record("c1", str(self.root), str(self.base), record.RESTORING)
        record.make_directory(str(self.directory), self.kept)
        start = processes.start_time(self.init) or 0
        self.kept = self.kept._replace(phase=record.RESTORED, init_pid=self.init, init_start=start)
        self.prepare()

    def prepare(self) -> None:
        resume.write_down(str(self.directory), self.kept)
        record.save(str(self.directory), self.kept)

    @property
    def root(self) -> Path:
        return self.base / "root"

    @property
    def fifo(self) -> Path:
        return self.root / "c1/exec.fifo"

    @property
    def directory(self) -> Path:
        return Path(record.directory(str(self.base / "state"), str(self.root), "c1"))

    @property
    def plan(self) -> Path:
        return self.directory / "start"

    @property
    def ran(self) -> list[str]:
        path = self.base / "ran"
        return sorted(path.read_text().split()) if path.exists() else []

    @property
    def tree(self) -> list[int]:
        return processes.tree(self.init)

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Status 0 and no word is the launcher's own; status 7 is that of what stands for Python."""
        command = [str(self.base / "prefix/bin/rewarm-runc"), "--root", str(self.root), *(words or ("start", "c1"))]
        env = {"PATH": "/usr/bin:/bin", "REWARM_CONFIG": str(self.base / "config.yaml")}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
        assert "Sanitizer" not in done.stderr and "runtime error" not in done.stderr, done.stderr
        return done

    def started(self, *names: str) -> None:
        """By the launcher: these went on, and everything is as start.py would have left it."""
        done = self.run()
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        wait_for(f"{names} to run", lambda: self.ran == sorted(names))
        assert not self.fifo.exists()
        assert {path.name for path in self.directory.iterdir()} <= {
            "record.json",
            "outcome.json",
            "trace.json",
            "control",
        }
        kept = record.load(str(self.directory))
        assert kept is not None and kept.phase == record.STARTED
        assert kept == self.kept._replace(phase=record.STARTED)

    def left_to_python(self) -> None:
        """Nothing was done."""
        before = sorted(self.directory.rglob("*"))
        assert self.run().returncode == 7
        assert sorted(self.directory.rglob("*")) == before
        assert self.fifo.exists()
        assert {state_of(pid) for pid in self.tree} <= {"T", "Z"}
        assert self.ran == []


@pytest.fixture
def restored(launcher: Path, tmp_path: Path) -> Iterator[Restored]:
    binary = tmp_path / "prefix/bin/rewarm-runc"
    binary.parent.mkdir(parents=True)
    shutil.copy2(launcher, binary)
    python = tmp_path / "prefix/venv/bin/python3"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\nexit 7\n")
    python.chmod(0o755)
    config = tmp_path / "config.yaml"
    config.write_text(f"state_dir: {tmp_path}/state\n")
    config.chmod(0o644)
    process = subprocess.Popen(["sh", "-c", TREE], cwd=tmp_path)
    pids = {process.pid}
    try:
        wait_for("all to be stopped", lambda: [state_of(pid) for pid in processes.tree(process.pid)] == ["T"] * 3)
        pids |= set(processes.tree(process.pid))
        yield Restored(tmp_path, process.pid)
    finally:
        for pid in pids:
            processes.send(pid, signal.SIGKILL)
        process.wait()


def test_the_tree_goes_on_and_the_directory_is_tidied(restored: Restored) -> None:
    outside = restored.base / "outside"
    outside.mkdir()
    (outside / "file").write_text("not the container's")
    directory = restored.directory
    (directory / "checkpoint/deeper").mkdir(parents=True)
    for name in ("checkpoint/pages-1.img", "checkpoint/deeper/file", "criu.conf", "outcome.json", "trace.json"):
        (directory / name).write_text("x")
    (directory / "checkpoint/link").symlink_to(outside)
    (directory / "link").symlink_to(outside)
    (directory / "control/ready").write_text("")
    restored.started("init", "one", "two")
    assert (directory / "outcome.json").exists() and (directory / "trace.json").exists()
    assert (directory / "control/ready").exists()
    assert (outside / "file").exists()


def test_children_come_before_parents(restored: Restored) -> None:
    lines = restored.plan.read_text().splitlines()
    start = {pid: processes.start_time(pid) for pid in restored.tree}
    assert lines[:2] == ["1", f"init {restored.init} {start[restored.init]}"]
    assert lines[2:] == [f"{pid} {start[pid]}" for pid in reversed(restored.tree)]


def test_what_was_stopped_in_the_source_stays_so(restored: Restored) -> None:
    _, one, _ = restored.tree
    restored.kept = restored.kept._replace(stopped=(one,))
    restored.prepare()
    restored.started("init", "two")
    assert state_of(one) == "T"


def test_an_init_that_was_stopped_stays_so(restored: Restored) -> None:
    restored.kept = restored.kept._replace(stopped=(restored.init,))
    restored.prepare()
    restored.started("one", "two")
    assert state_of(restored.init) == "T"


def test_one_that_has_ended_is_passed_over(restored: Restored) -> None:
    os.kill(restored.tree[1], signal.SIGKILL)
    wait_for("its end", lambda: state_of(restored.tree[1]) == "Z")
    gone = restored.plan.read_text() + f"{DEAD} 5\n1 1\n"
    restored.plan.write_text(gone)
    restored.started("init", "two")


def test_another_with_its_pid_is_let_alone(restored: Restored) -> None:
    other = subprocess.Popen(["sh", "-c", "kill -STOP $$; exec sleep 100"])
    try:
        wait_for("it to stop", lambda: state_of(other.pid) == "T")
        with restored.plan.open("a") as file:
            file.write(f"{other.pid} {(processes.start_time(other.pid) or 0) + 1}\n")
        restored.started("init", "one", "two")
        assert state_of(other.pid) == "T"
    finally:
        other.kill()
        other.wait()


def test_another_init_is_for_python(restored: Restored) -> None:
    start = restored.kept.init_start
    text = restored.plan.read_text()
    for init in (f"init {restored.init} {start + 1}", f"init {DEAD} {start}", "init 1 1"):
        restored.plan.write_text(text.replace(f"init {restored.init} {start}", init))
        restored.left_to_python()


def test_an_init_that_was_killed_is_for_python(restored: Restored) -> None:
    os.kill(restored.init, signal.SIGKILL)
    wait_for("its end", lambda: state_of(restored.init) == "Z")
    assert restored.run().returncode == 7
    assert restored.fifo.exists() and restored.plan.exists()


@pytest.mark.parametrize("missing", ["start", "record.started.json", "record.json", "state.json", "state"])
def test_without_one_of_the_files_it_is_for_python(restored: Restored, missing: str) -> None:
    if missing == "state":
        (restored.root / "c1").rename(restored.root / "c2")
        assert restored.run().returncode == 7
        assert restored.plan.exists()
        return
    place = restored.fifo.parent if missing == "state.json" else restored.directory
    (place / missing).unlink()
    restored.left_to_python()
    (place / missing).symlink_to("/etc/passwd")
    restored.left_to_python()
    (place / missing).unlink()
    (place / missing).mkdir()
    restored.left_to_python()


@pytest.mark.parametrize("phase", [record.RESTORING, record.STARTED, record.COLD])
def test_in_another_phase_it_is_for_python(restored: Restored, phase: str) -> None:
    """RESTORING: `create` is not over, or it is being undone."""
    restored.kept = restored.kept._replace(phase=phase, reason='"phase": "restored"')
    record.save(str(restored.directory), restored.kept)
    restored.left_to_python()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1",
        "1\n",
        "2\n{init}\n{rest}\n",
        "11\n{init}\n{rest}\n",
        "1\n\n{init}\n{rest}\n",
        "1\n{rest}\n",
        "1\n{init}\n{rest}",
        "1\n{init}\n{rest}\n\n",
        "1\n{init}\n{rest}\nx\n",
        "1\n{init}\n{rest}\n0 5\n",
        "1\n{init}\n{rest}\n5 0\n",
        "1\n{init}\n{rest}\n5\n",
        "1\n{init}\n{rest}\n5 \n",
        "1\n{init}\n{rest}\n5  5\n",
        "1\n{init}\n{rest}\n 5 5\n",
        "1\n{init}\n{rest}\n5 5 \n",
        "1\n{init}\n{rest}\n5 5 5\n",
        "1\n{init}\n{rest}\n-1 5\n",
        "1\n{init}\n{rest}\n+5 5\n",
        "1\n{init}\n{rest}\n0x5 5\n",
        "1\n{init}\n{rest}\n2147483648 5\n",
        "1\n{init}\n{rest}\n4294967297 5\n",
        "1\n{init}\n{rest}\n18446744073709551617 5\n",
        "1\n{init}\n{rest}\n5 18446744073709551616\n",
        "1\n{init}\n{rest}\n5 99999999999999999999999999\n",
        "1\n{init}\n{rest}\n\0 5 5\n",
        "1\n{init}\n{rest}\n\0",
        "1\r\n{init}\r\n{rest}\r\n",
        "1\n{init}\n{init}\n{rest}\n",
    ],
)
def test_bad_lines_are_for_python(restored: Restored, text: str) -> None:
    _, init, rest = restored.plan.read_text().split("\n", 2)
    restored.plan.write_text(text.format(init=init, rest=rest.rstrip("\n")))
    restored.left_to_python()


def test_the_plan_may_be_large_but_not_larger(restored: Restored) -> None:
    text = restored.plan.read_text()
    line = f"{DEAD} 5\n"
    fitting = ((1 << 20) - len(text)) // len(line)
    restored.plan.write_text(text + line * (fitting + 1))
    restored.left_to_python()
    restored.plan.write_text(text + line * fitting)
    restored.started("init", "one", "two")


def test_a_fifo_in_the_files_place_is_not_waited_for(restored: Restored) -> None:
    restored.plan.unlink()
    os.mkfifo(restored.plan)
    restored.left_to_python()


@pytest.mark.parametrize("words", [["start"], ["start", "c1", "c2"], ["start", "--new", "c1"], ["start", "--", "c1"]])
def test_other_forms_of_the_call_are_for_python(restored: Restored, words: list[str]) -> None:
    record.make_directory(f"{restored.directory.parent}/c2", restored.kept)
    status = restored.run(*words).returncode
    assert status == (7 if len(words) > 1 else status)
    assert restored.ran == [] and restored.plan.exists()


def test_killed_at_any_point_it_can_be_repeated(restored: Restored) -> None:
    """After the signals; after the FIFO is gone; the second one, after all of it, is for Python, as any other."""
    for pid in restored.tree:
        os.kill(pid, signal.SIGCONT)
    restored.fifo.unlink()
    restored.started("init", "one", "two")
    assert restored.run().returncode == 7


def test_killed_before_tidying_it_counts_as_started(restored: Restored) -> None:
    (restored.directory / "record.started.json").rename(restored.directory / "record.json")
    restored.left_to_python()


def test_killed_while_running(restored: Restored) -> None:
    """At moments spread over its length; then the next one ends it, or Python finds a container that was started."""
    for number in range(40):
        restored.prepare()
        if not restored.fifo.exists():
            os.mkfifo(restored.fifo)
        for name in range(20):
            (restored.directory / f"file-{name}").write_text("x")
        command = [str(restored.base / "prefix/bin/rewarm-runc"), "--root", str(restored.root), "start", "c1"]
        process = subprocess.Popen(command, env={"REWARM_CONFIG": str(restored.base / "config.yaml")})
        time.sleep(number * 0.0001)
        process.kill()
        process.wait()
        again = restored.run().returncode
        kept = record.load(str(restored.directory))
        assert kept is not None and kept.phase == record.STARTED
        assert not restored.fifo.exists()
        assert again in (0, 7)
        assert again == 7 or not restored.plan.exists()
    wait_for("all to run", lambda: restored.ran == ["init", "one", "two"])


def test_a_fifo_that_cannot_be_removed_is_for_python(restored: Restored) -> None:
    restored.fifo.unlink()
    restored.fifo.mkdir()
    assert restored.run().returncode == 7
    kept = record.load(str(restored.directory))
    assert kept is not None and kept.phase == record.RESTORED
    restored.fifo.rmdir()
    restored.started("init", "one", "two")


@pytest.fixture
def read_only(restored: Restored) -> Iterator[Path]:
    """The container directory in a file system that nobody may write to."""
    place = restored.directory
    copy = restored.base / "copy"
    shutil.copytree(place, copy)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place], check=True)
    try:
        shutil.copytree(copy, place, dirs_exist_ok=True)
        subprocess.run(["mount", "-o", "remount,ro", place], check=True)
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def test_a_record_that_cannot_be_written_is_for_python(restored: Restored, read_only: Path) -> None:
    assert restored.run().returncode == 7
    kept = record.load(str(read_only))
    assert kept is not None and kept.phase == record.RESTORED
    assert (read_only / "record.started.json").exists()
    subprocess.run(["mount", "-o", "remount,rw", read_only], check=True)
    restored.started("init", "one", "two")


def test_what_cannot_be_tidied_up_is_a_warning(restored: Restored) -> None:
    """Another file system in there, and directories without end: neither is gone into."""
    place = restored.directory / "mounted"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place], check=True)
    try:
        (place / "file").write_text("another's")
        done = restored.run()
        assert done.returncode == 0
        assert 'level=warning msg="rewarm: ' in done.stderr and "was not tidied up: Invalid cross-device" in done.stderr
        assert (place / "file").exists()
    finally:
        subprocess.run(["umount", place], check=True)
    restored.prepare()
    (restored.directory / "/".join(["d"] * 40)).mkdir(parents=True)
    done = restored.run()
    assert done.returncode == 0 and "was not tidied up" in done.stderr
