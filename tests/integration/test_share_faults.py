"""A share that is slow, hangs, breaks off or vanishes, before and in the middle of a restore: a cold start in time."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from rewarm.store.directory import DirectoryStore
from support import carving, counter, faults
from support.bundle import Bundle, bind
from support.carving import Snapshot, end, goes_on_right, nothing_remains_of, stays_cold
from support.node import Node
from support.outcomes import fails, said
from support.proc import descendants, reap_orphans, state_of, wait_for
from support.share import Share
from support.silence import Silence
from support.snapshots import MIB

pytestmark = pytest.mark.alone

DEADLINE = 2.0
GRACE = 5.0
"""Seconds that clean-up and runc may take after the deadline, on a busy machine."""
RATE = 6 * MIB


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory, prefix: Path) -> Iterator[Snapshot]:
    """20 MiB to read, 3 seconds at RATE. Not to be changed."""
    with Node(tmp_path_factory.mktemp("captured"), prefix) as node:
        yield carving.captured(node, 10)


@pytest.fixture(scope="module")
def vast(tmp_path_factory: pytest.TempPathFactory, prefix: Path) -> Iterator[Snapshot]:
    """With a large file, which takes its time to be copied."""
    with Node(tmp_path_factory.mktemp("vast"), prefix) as node:
        yield carving.captured(node, 4, diff_mib=65)


@contextmanager
def shared(
    tmp_path: Path, prefix: Path, snapshot: Snapshot, rate: int = 0, cache: str = "off", deadline: float = DEADLINE
) -> Iterator[tuple[Share, Node]]:
    """A node that sees the snapshot's store as a share."""
    with (
        Share(snapshot.store, tmp_path / "share", rate=rate) as share,
        Node(tmp_path / "node", prefix, store=share.target, cache=cache, deadline=deadline) as node,
    ):
        yield share, node


@pytest.fixture(params=["no cache", "cache"])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return "off" if request.param == "no cache" else str(tmp_path / "cache")


def test_as_it_should_be(tmp_path: Path, prefix: Path, snapshot: Snapshot, cache: str) -> None:
    with shared(tmp_path, prefix, snapshot, RATE, cache, 30) as (_, node):
        carving.works(node, snapshot)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("hang", "the deadline of 2 s passed during find"),
        ("vanish", "find snapshot default/counter: there is none in the store"),
        ("break_off", "not connected"),
    ],
)
def test_before(tmp_path: Path, prefix: Path, snapshot: Snapshot, how: str, reason: str) -> None:
    with shared(tmp_path, prefix, snapshot) as (share, node):
        made = snapshot.bundle(node.directory / "copy")
        getattr(share, how)()
        began = time.monotonic()
        stays_cold(node, made, reason)
        assert time.monotonic() - began < DEADLINE + GRACE


@pytest.mark.parametrize("on_miss", ["cold-start", "fail"])
def test_takes_requests_and_answers_none(tmp_path: Path, prefix: Path, snapshot: Snapshot, on_miss: str) -> None:
    """No signal ends a thread that waits for it: it holds up neither `create` nor who reads the container's output."""
    with (
        Silence(tmp_path / "share") as silence,
        Node(tmp_path / "node", prefix, store=silence.target / "store", cache="off", deadline=DEADLINE) as node,
    ):
        made = snapshot.bundle(node.directory / "copy")
        began = time.monotonic()
        reason = f"the deadline of {DEADLINE:g} s passed during find"
        fails(node, made, reason) if on_miss == "fail" else stays_cold(node, made, reason)
        assert time.monotonic() - began < DEADLINE + GRACE
        assert silence.asked.is_set()


def test_a_volume_that_answers_nothing(tmp_path: Path, prefix: Path, snapshot: Snapshot) -> None:
    """Where its bind mounts come from is looked at to find out which GPUs a container has."""
    with (
        Silence(tmp_path / "volume") as silence,
        Node(tmp_path / "node", prefix, store=snapshot.store, cache="off", deadline=DEADLINE) as node,
    ):
        made = snapshot.bundle(node.directory / "copy")
        made.spec["mounts"].append(bind(silence.target / "data", "/data"))
        made.write()
        began = time.monotonic()
        # Not cold: that start would hang in runc.
        fails(node, made, f"the deadline of {DEADLINE:g} s passed during find")
        assert time.monotonic() - began < DEADLINE + GRACE
        assert silence.asked.is_set()


def test_a_volume_that_answers_nothing_any_more(tmp_path: Path, prefix: Path) -> None:
    """When a log of the snapshot's is made on it. Taking away again what was made there must not hang either."""
    program = "log = open('/data/app.log', 'a')\nlog.write('line')\nlog.flush()\n" + counter.PROGRAM
    args = ["python3", "-c", program]
    with Node(tmp_path / "captured", prefix) as node:
        (volume := tmp_path / "source").mkdir()
        counter.captured(node, args=args, mounts=[bind(volume, "/data")])
        end(node, "source")
        store = node.store
    (empty := tmp_path / "empty").mkdir()
    with (
        Silence(tmp_path / "volume", empty) as silence,
        Node(tmp_path / "node", prefix, store=store, cache="off", deadline=DEADLINE) as node,
    ):
        made = counter.bundle(node.directory / "copy", args=args, mounts=[bind(silence.target, "/data")])
        silence.fall_silent("CREATE")
        began = time.monotonic()
        process, container = node.runtime.spawn("create", "copy", made)
        assert process.wait(60) == 0
        assert time.monotonic() - began < DEADLINE + 2 * GRACE
        assert silence.asked.is_set()
        node.runtime.settle(container)
        outcome = node.outcome("copy")
        assert outcome["outcome"] == "cold", outcome
        said(outcome["reason"], f"the deadline of {DEADLINE:g} s passed during restore.runc")
        end(node, "copy")
        assert os.listdir(empty) == []


@pytest.mark.parametrize("part", [0.02, 0.3, 0.7])
@pytest.mark.parametrize("how", ["hang", "vanish", "break_off"])
def test_in_the_middle(tmp_path: Path, prefix: Path, snapshot: Snapshot, how: str, part: float) -> None:
    with shared(tmp_path, prefix, snapshot, RATE, deadline=4) as (share, node):
        made = snapshot.bundle(node.directory / "copy")
        before = faults.Before(made)
        began = time.monotonic()
        process, container = node.runtime.spawn("create", "copy", made)
        wait_for("reading", lambda: share.read_so_far() > part * 20 * MIB, interval=0.001)
        getattr(share, how)()
        assert process.wait(30) == 0
        assert time.monotonic() - began < 4 + GRACE
        node.runtime.settle(container)
        outcome = node.outcome("copy")
        if how == "hang":
            said(outcome["reason"], "the deadline of 4 s passed during")
        elif how == "break_off":
            assert "pack" in outcome["reason"] or "open store" in outcome["reason"], outcome
        # What is open when its mount vanishes can be read to the end.
        assert outcome["outcome"] == "cold" or how == "vanish", outcome
        finish(node, snapshot, made, before)


@pytest.mark.parametrize("operation", ["READ", "FLUSH"])
def test_falls_silent_in_the_middle(
    tmp_path: Path, prefix: Path, snapshot: Snapshot, operation: str, cache: str
) -> None:
    """It has taken the request, so that whoever waits for it cannot end. What is closed for the end asks it, too."""
    with (
        Silence(tmp_path / "share", snapshot.store) as silence,
        Node(tmp_path / "node", prefix, store=silence.target, cache=cache, deadline=4) as node,
    ):
        made = snapshot.bundle(node.directory / "copy")
        flag = faults.blocking(node, "createRuntime", made)
        before = faults.Before(made)
        silence.fall_silent(operation, only=faults.memory_pack(snapshot.store)[1])
        process, container = node.runtime.spawn("create", "copy", made)
        wait_for("the hook", flag.exists)
        assert process.wait(4 + 2 * GRACE) == 0
        assert silence.asked.is_set()
        node.runtime.settle(container)
        outcome = node.outcome("copy")
        assert outcome["outcome"] == "cold", outcome
        said(outcome["reason"], "the deadline of 4 s passed during")
        before.check_files(mount_points=True)
        node.runtime.start("copy")
        assert container.stdout.wait_text("\n2 ").startswith("ready\n1 ")
        end(node, "copy")
        nothing_remains_of(node, made, "copy")
        assert container.stdout.wait_end().startswith("ready\n1 "), "the one that hangs holds its output open"


def test_killed_while_it_hangs(tmp_path: Path, prefix: Path, snapshot: Snapshot) -> None:
    """No signal ends the process that restores, and its guard undoes what it has begun all the same."""
    with (
        Silence(tmp_path / "share", snapshot.store) as silence,
        Node(tmp_path / "node", prefix, store=silence.target, cache="off") as node,
    ):
        made = snapshot.bundle(node.directory / "copy")
        flag = faults.blocking(node, "createRuntime", made)
        before = faults.Before(made)
        silence.fall_silent("READ", only=faults.memory_pack(snapshot.store)[1])
        process, _ = node.runtime.spawn("create", "copy", made)
        wait_for("the hook", flag.exists)
        wait_for("somebody who hangs", silence.asked.is_set)
        process.kill()
        process.wait()

        def undone() -> bool:
            reap_orphans()
            return not faults.remains(node, "copy", made)

        wait_for("the guard", undone, timeout=15)
        before.check_files()
        before.check_config()
        before.check_names()


def finish(node: Node, snapshot: Snapshot, made: Bundle, before: faults.Before) -> None:
    """Nothing of the store's is needed any more: the container is there, runs as it should, and goes."""
    container = node.runtime.containers["copy"]
    threads = [pid for pid in descendants(os.getpid()) if state_of(pid) == "D"]
    assert threads == [], "something still waits for the share"
    if node.outcome("copy")["outcome"] == "cold":
        before.check_files(mount_points=True)
        node.runtime.start("copy")
        assert container.stdout.wait_text("\n2 ").startswith("ready\n1 ")
    else:
        node.runtime.start("copy")
        goes_on_right(container, snapshot)
    end(node, "copy")
    nothing_remains_of(node, made, "copy")


def test_hangs_while_the_cache_is_filled(tmp_path: Path, prefix: Path, snapshot: Snapshot) -> None:
    """The pack that was being fetched is nobody's then; the next restore fetches it."""
    cache = tmp_path / "cache"
    with shared(tmp_path, prefix, snapshot, RATE, str(cache)) as (share, node):
        made = snapshot.bundle(node.directory / "copy")
        process, container = node.runtime.spawn("create", "copy", made)
        wait_for("fetching", lambda: list((cache / "v1" / "tmp").glob("*")), interval=0.001)
        share.hang()
        assert process.wait(DEADLINE + GRACE) == 0
        node.runtime.settle(container)
        said(node.outcome("copy")["reason"], "the deadline of 2 s passed during")
        share.go_on()
        end(node, "copy")
        node.configure(cache=str(cache), deadline=30)
        carving.works(node, snapshot, "next")
        assert list((cache / "v1" / "tmp").glob("*")) == []
        before = share.read_so_far()
        carving.works(node, snapshot, "last")
        assert share.read_so_far() - before < MIB


@pytest.mark.parametrize("flag", ["--stop", "--leave-running"])
def test_hangs_in_the_middle_of_a_capture(tmp_path: Path, prefix: Path, flag: str) -> None:
    """The source is held for `capture_timeout` at most, whatever the store does, and is not killed any more then."""
    (tmp_path / "store").mkdir(mode=0o700)
    with (
        Share(tmp_path / "store", tmp_path / "share") as share,
        Node(tmp_path / "node", prefix, store=share.target / "s", cache="off", capture_timeout=3) as node,
    ):
        source = counter.run(node.runtime, "source", counter.bundle(node.directory / "source", env={"MIB": "64"}))
        words = [str(node.prefix / "bin/rewarm"), "capture", "source", "--name", "trial", flag]
        with subprocess.Popen(words, env={**os.environ, **node.env}, stderr=subprocess.PIPE, text=True) as capture:
            wait_for(
                "the dump",
                lambda: list((node.directory / "work").glob("*/snapshot/checkpoint/pages-1.img")),
                interval=0,
            )
            share.hang()
            wait_for("the freeze", lambda: node.runtime.state("source")["status"] == "paused" or flag != "--stop")
            began = time.monotonic()
            wait_for("the source to go on", lambda: node.runtime.state("source")["status"] == "running", timeout=20)
            assert time.monotonic() - began < 3 + GRACE
            seen = counter.numbers(source)[-1]
            source.stdout.wait_text(f"\n{seen + 3} ")
            assert capture.poll() is None, "it does not wait for the store"
            share.go_on()
            said_last = capture.communicate(timeout=60)[1].strip()
        if flag == "--stop":
            assert capture.returncode == 1
            said(said_last.splitlines()[-1], "stop container source", "resumed meanwhile", "capture_timeout")
        assert node.runtime.state("source")["status"] == "running"
        assert node.rewarm("verify").returncode == 0
        assert len(counter.hashes(source)) == 1
        node.runtime.stop("source")


def written(directory: Path) -> int:
    """Bytes of the files below a directory."""
    size = 0
    for top, _, names in os.walk(directory):
        for name in names:
            with suppress(FileNotFoundError):  # renamed just now
                size += os.lstat(os.path.join(top, name)).st_size
    return size


@pytest.mark.parametrize("how", ["vanish", "break_off"])
@pytest.mark.parametrize("flag", ["--stop", "--leave-running"])
def test_goes_in_the_middle_of_a_capture(tmp_path: Path, prefix: Path, how: str, flag: str) -> None:
    """Unmounted, or its server gone: the source runs on, and what is in the store behind it is right."""
    (tmp_path / "store").mkdir(mode=0o700)
    with (
        Share(tmp_path / "store", tmp_path / "share", rate=16 * MIB) as share,
        Node(tmp_path / "node", prefix, store=share.target / "s", cache="off") as node,
    ):
        source = counter.run(node.runtime, "source", counter.bundle(node.directory / "source", env={"MIB": "384"}))
        words = [str(node.prefix / "bin/rewarm"), "capture", "source", "--name", "trial", flag]
        with subprocess.Popen(words, env={**os.environ, **node.env}, stderr=subprocess.PIPE, text=True) as capture:
            wait_for("a pack that grows", lambda: written(tmp_path / "store/s/v1/tmp") > MIB, interval=0.001)
            getattr(share, how)()
            said_last = capture.communicate(timeout=60)[1].strip().splitlines()[-1]
        assert capture.returncode == 1
        said(said_last, str(share.target / "s"))
        assert node.runtime.state("source")["status"] == "running"
        seen = counter.numbers(source)[-1]
        source.stdout.wait_text(f"\n{seen + 2} ")
        assert len(counter.hashes(source)) == 1
        node.runtime.stop("source")
    found = DirectoryStore(str(tmp_path / "store" / "s"))
    assert found.list() == [] and list(found.verify()) == []


def test_too_slow(tmp_path: Path, prefix: Path, snapshot: Snapshot) -> None:
    """It does not hang, and what reads it goes on for a while: it must not write where others clean up."""
    with shared(tmp_path, prefix, snapshot, 256 << 10, deadline=1) as (_, node):
        stays_cold(node, snapshot.bundle(node.directory / "copy"), "the deadline of 1 s passed during")


def test_too_slow_for_files(tmp_path: Path, prefix: Path, vast: Snapshot) -> None:
    with shared(tmp_path, prefix, vast, 4 * MIB, deadline=1.5) as (_, node):
        stays_cold(node, vast.bundle(node.directory / "copy"), "the deadline of 1.5 s passed during")
