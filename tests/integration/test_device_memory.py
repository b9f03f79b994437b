"""Device memory that the library serves, in containers whose driver is not there (tests/support/fake_cuda.c): out of
the processes, into the store, and back. What a real driver does with it is tests/gpu.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from support import faults
from support.bundle import Bundle
from support.fake_gpu import MOUNT_POINT
from support.gpu_containers import Place, place
from support.outcomes import said
from support.proc import command_line, descendants, reap_orphans, state_of, wait_for
from support.workloads.gpu_served import ZERO_BYTES

MIB = 1 << 20
LIBRARY = "/run/rewarm-device-memory.so"
SIZES = (8, 4, 2)
KILLS = 50


@functools.cache
def expected(step: int, sizes: Sequence[int] = SIZES) -> str:
    """The digest of the served memory after so many steps (workloads/gpu_served.py)."""
    data = []
    for number, size in enumerate(sizes):
        filled = random.Random(100 + number).randbytes(ZERO_BYTES if number % 2 else size * MIB)
        data.append(bytearray(size * MIB - len(filled)) + filled)
    for at in range(1, step + 1):
        for part in data:
            part[at * 5 * 4096 % len(part) :][:8]  # the place is inside
            start = at * 5 * 4096 % len(part)
            part[start : start + 8] = at.to_bytes(8, "little")
    digest = hashlib.blake2b(digest_size=16)
    for part in data:
        digest.update(part)
    return digest.hexdigest()


@pytest.fixture
def here(nothing_left_behind: None, tmp_path: Path, prefix: Path) -> Iterator[Place]:
    with place(tmp_path, prefix) as found:
        yield found


def served(where: Place, name: str, env: dict[str, str] | None = None, **more: Any) -> Bundle:
    return where.bundle(name, workload="gpu_served", env={"LD_LIBRARY_PATH": MOUNT_POINT, **(env or {})}, **more)


@pytest.fixture
def source(here: Place) -> Place:
    here.start("source", served(here, "source"))
    assert here.ask()["answers"][1] == expected(1)
    return here


@pytest.fixture
def captured(source: Place) -> Place:
    """Without its source; the snapshot is of step 1."""
    capture(source, "source", "--stop")
    source.end("source")
    return source


def capture(where: Place, name: str, *flags: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return where.node.rewarm("capture", name, "--name", "model", *flags, check=check)


def goes_on(where: Place, step: int, sizes: Sequence[int] = SIZES) -> None:
    answer = where.ask()
    assert (answer["step"], answer["answers"][1]) == (step, expected(step, sizes))


def restore(where: Place, name: str = "copy", **more: Any) -> Bundle:
    made = served(where, name, **more)
    where.start(name, made)
    outcome = where.node.outcome(name)
    assert outcome["outcome"] == "warm", outcome
    return made


def cold(where: Place, name: str, *parts: str) -> None:
    """It was started cold, for this reason, and is right."""
    where.start(name, served(where, name))
    outcome = where.node.outcome(name)
    assert outcome["outcome"] == "cold", outcome
    said(outcome["reason"], *parts)
    goes_on(where, 1)
    where.end(name)


def inspect(where: Place) -> dict[str, Any]:
    found: dict[str, Any] = where.node.json("inspect", "model")
    return found


def init(where: Place, name: str) -> int:
    pid = where.node.runtime.containers[name].pid
    assert pid is not None
    return pid


def test_there_and_back(source: Place) -> None:
    done = json.loads(capture(source, "source", "--json").stdout)
    goes_on(source, 2)
    source.end("source")
    restore(source)
    goes_on(source, 2)
    goes_on(source, 3)
    assert inspect(source)["cuda"]["served_bytes"] == done["device_bytes"] == sum(SIZES) * MIB
    # Of the second allocation but the window with its end, and that with the step.
    assert done["device_zero_bytes"] == (4 - 2 - 2) * MIB
    assert "not by way of the driver" in source.node.rewarm("inspect", "model").stdout


CREATED = (*SIZES, 6, 2, 4)
WITH_CREATED = {"CREATED_MIB": "6,2,4"}


def test_memory_that_the_program_creates_itself(here: Place) -> None:
    """It keeps a handle of some, which is another after every capture and restore."""
    here.start("source", served(here, "source", WITH_CREATED))
    goes_on(here, 1, CREATED)
    done = json.loads(capture(here, "source", "--json").stdout)
    assert done["device_bytes"] == sum(CREATED) * MIB
    goes_on(here, 2, CREATED)
    here.end("source")
    for generation in range(2, 4):
        restore(here, f"copy-{generation}", env=WITH_CREATED)
        goes_on(here, generation, CREATED)
        capture(here, f"copy-{generation}")
        goes_on(here, generation + 1, CREATED)
        here.end(f"copy-{generation}")


def test_memory_of_a_restore_that_is_not_mapped(here: Place) -> None:
    """Only the program could take it out: it is refused by name, and as soon as it is mapped again, captured."""
    here.start("source", served(here, "source", WITH_CREATED))
    goes_on(here, 1, CREATED)
    capture(here, "source", "--stop")
    here.end("source")
    restore(here, env=WITH_CREATED)
    here.ask("/unmap")
    refused = capture(here, "copy", check=False)
    assert refused.returncode != 0
    said(refused.stderr.strip(), "take GPU memory of", f"{6 * MIB} bytes of it are not mapped", "that of a restore")
    goes_on(here, 2, CREATED)
    capture(here, "copy")
    goes_on(here, 3, CREATED)


def test_zeros_and_memory_of_several_pieces(here: Place) -> None:
    here.start("source", served(here, "source", {"SERVED_MIB": "2,1030"}))
    before = here.ask()
    done = json.loads(capture(here, "source", "--json").stdout)
    following = here.ask()
    here.end("source")
    assert done["device_bytes"] - done["device_zero_bytes"] == 6 * MIB  # the step's window, and the end's
    assert done["stored_bytes"] < 60 * MIB
    made = served(here, "copy", {"SERVED_MIB": "2,1030"})
    here.start("copy", made)
    assert here.node.outcome("copy")["outcome"] == "warm", here.node.outcome("copy")
    assert here.ask() == following
    assert before["step"] == 1


@pytest.mark.parametrize("room", [True, False])
def test_captured_by_way_of_a_copy_on_the_gpu(
    nothing_left_behind: None, tmp_path: Path, prefix: Path, room: bool
) -> None:
    """And killed in the middle of that."""
    with place(tmp_path, prefix, gpu_copy=50) as source:
        if not room:
            source.node.env["FAKE_LIMIT"] = str(20 * MIB)
        source.start("source", served(source, "source"))
        began = time.monotonic()
        goes_on(source, 1)
        notes = json.loads(capture(source, "source", "--json").stdout)["notes"]
        assert any("out of a copy" in note for note in notes) is room
        assert any("had not as much room" in note for note in notes) is not room
        duration = time.monotonic() - began
        goes_on(source, 2)
        for number in range(8):
            with running_capture(source) as running:
                time.sleep(duration * (number + random.random()) / 8)
                helper = helpers(running.pid)
                running.kill()
            wait_for("the end of the helper", lambda: all(state_of(one) in (None, "Z") for one in helper))  # noqa: B023
            reap_orphans()
            goes_on(source, 3 + number)
        capture(source, "source", "--stop")
        source.end("source")
        restore(source)
        goes_on(source, 11)


def test_captured_again(captured: Place) -> None:
    """What a restored process has mapped is imported, and cannot be handed on as it is."""
    restore(captured)
    goes_on(captured, 2)
    capture(captured, "copy")
    goes_on(captured, 3)
    capture(captured, "copy")  # and is its own by now
    captured.end("copy")
    restore(captured, "again")
    goes_on(captured, 4)
    capture(captured, "again")
    goes_on(captured, 5)


def test_left_out(here: Place) -> None:
    off = {"rewarm.dev/device-memory": "off"}
    made = served(here, "source", annotations=off)
    here.start("source", made)
    assert here.ask()["step"] == 1
    assert LIBRARY not in (made.directory / "config.json").read_text()
    assert LIBRARY not in Path(f"/proc/{init(here, 'source')}/maps").read_text()


def test_what_is_preloaded_already_stays(here: Place) -> None:
    here.start("source", served(here, "source", {"LD_PRELOAD": "libdl.so.2"}))
    assert here.ask()["answers"][1] == expected(1)
    words = Path(f"/proc/{init(here, 'source')}/environ").read_bytes().split(b"\0")
    assert f"LD_PRELOAD={LIBRARY}:libdl.so.2".encode() in words
    capture(here, "source")
    here.end("source")
    restore(here, env={"LD_PRELOAD": "libdl.so.2"})
    goes_on(here, 2)
    here.end("copy")
    # Without it, it is another container.
    cold(here, "other", "snapshot was taken with environment variable LD_PRELOAD")


def test_the_library_of_the_snapshot_comes_back(captured: Place) -> None:
    installed = captured.node.prefix / "lib/rewarm-device-memory.so"
    kept = installed.read_bytes()
    other = installed.with_name("kept")
    installed.rename(other)
    try:
        installed.write_bytes(kept + b"another version")
        restore(captured)
        goes_on(captured, 2)
        assert Path(f"/proc/{init(captured, 'copy')}/root{LIBRARY}").read_bytes() == kept
        captured.end("copy")
        installed.unlink()
        restore(captured, "without")
        goes_on(captured, 2)
    finally:
        other.rename(installed)


def test_a_damaged_chunk(captured: Place) -> None:
    """None of the processes has run by the time that it is found."""
    faults.flip(faults.device_pack(captured.node.store), MIB)
    cold(captured, "copy", "read memory chunk", "its bytes are not what its digest says")


def test_not_enough_memory_on_the_gpu(captured: Place) -> None:
    captured.node.runtime.env["FAKE_LIMIT"] = str(4 * MIB)
    cold(captured, "copy", "allocate memory on GPU-", "the GPU has not enough free memory")
    del captured.node.runtime.env["FAKE_LIMIT"]
    restore(captured, "later")
    goes_on(captured, 2)


def test_a_table_that_is_not_of_the_snapshot(captured: Place) -> None:
    faults.rewritten(captured.node.store, lambda one: one["cuda"].update(served_bytes=2 * MIB))
    cold(captured, "copy", "read device/pieces of", "its pieces are not of 2097152 bytes")


def test_a_process_that_has_not_its_memory(captured: Place, tmp_path: Path) -> None:
    """A piece at another address: the library in the process does not know it, and what has run of it is killed."""

    def shift(directory: Path) -> None:
        path = directory / "device/pieces"
        data = bytearray(path.read_bytes())
        data[8:16] = (int.from_bytes(data[8:16], "little") - (1 << 40)).to_bytes(8, "little")
        path.write_bytes(data)

    faults.altered(captured.node.store, tmp_path / "scratch", shift)
    cold(captured, "copy", "map GPU memory of process", "they are not the 3 that are there")


def running_capture(where: Place) -> subprocess.Popen[bytes]:
    words = [str(where.node.prefix / "bin/rewarm"), "capture", "source", "--name", "model"]
    return subprocess.Popen(words, env={**os.environ, **where.node.env}, stderr=subprocess.DEVNULL)


def helpers(pid: int) -> list[int]:
    return [one for one in descendants(pid) if "rewarm.lifeline" in command_line(one)]


def test_a_capture_killed_at_any_moment(source: Place) -> None:
    began = time.monotonic()
    capture(source, "source")
    duration = time.monotonic() - began
    goes_on(source, 2)
    for number in range(KILLS):
        delay = duration * (number + random.random()) / KILLS
        with running_capture(source) as running:
            time.sleep(delay)
            helper = helpers(running.pid)
            running.kill()
        print(f"killed after {delay:.4f} s of {duration:.4f}")
        wait_for("the end of the helper", lambda: all(state_of(one) in (None, "Z") for one in helper))  # noqa: B023
        reap_orphans()
        goes_on(source, 3 + number)
    capture(source, "source")
    goes_on(source, 3 + KILLS)


def test_a_capture_whose_helper_is_killed(source: Place) -> None:
    for number in range(8):
        with running_capture(source) as running:
            wait_for("the helper", lambda: helpers(running.pid) or running.poll() is not None)
            time.sleep(0.15 * random.random())
            for one in helpers(running.pid):
                os.kill(one, signal.SIGKILL)
        goes_on(source, 2 + number)


def test_a_restore_killed_at_any_moment(captured: Place) -> None:
    began = time.monotonic()
    restore(captured, "measured")
    duration = time.monotonic() - began
    captured.end("measured")
    complete = 0
    for number in range(KILLS):
        name = f"killed-{number}"
        made = served(captured, name)
        delay = duration * (number + random.random()) / KILLS
        process, _ = captured.node.runtime.spawn("create", name, made)
        time.sleep(delay)
        process.kill()
        process.wait()
        print(f"{name}: after {delay:.4f} s of {duration:.4f}")

        def phase(name: str = name) -> str:
            try:
                return str(json.loads((captured.node.container_directory(name) / "record.json").read_text())["phase"])
            except (FileNotFoundError, json.JSONDecodeError):
                return ""

        def guards(name: str = name) -> list[int]:
            directory = str(captured.node.container_directory(name))
            pids = descendants(os.getpid())
            return [pid for pid in pids if f"rewarm.recover {directory}" in command_line(pid) and state_of(pid) != "Z"]

        def settled(name: str = name, made: Bundle = made) -> bool:
            """Nothing is there but the container directory, which the next create takes away; or all."""
            left = [
                one for one in faults.remains(captured.node, name, made) if not one.startswith(str(captured.node.state))
            ]
            return not guards() and (phase() == "restored" or not left)

        wait_for("all or nothing", settled, timeout=30)
        if phase() == "restored":
            captured.node.runtime.start(name)
            goes_on(captured, 2)
            complete += 1
        captured.node.runtime.run("delete", "--force", name, check=False)
        reap_orphans()
    assert complete < KILLS
    restore(captured, "after")
    goes_on(captured, 2)
