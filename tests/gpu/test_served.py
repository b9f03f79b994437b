"""Device memory that the library serves, on a real GPU: programs go on bit for bit, from a capture and from a restore,
and whatever happens to the capture.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from support.gpu.checkpoints import RUNNING, Checkpoints
from support.gpu.fleet import Fleet, Running, trace
from support.proc import command, wait_for

CASES = (
    *("served-server", "served-child", "served-pinned", "served-streams", "served-pooled", "served-expandable"),
    "served-threads",
)
BEFORE, AFTER = 3, 3
KILLS = 12
PLACE = """
import json, sys
from rewarm.store import chunks
from rewarm.store.directory import DirectoryStore
store = DirectoryStore(sys.argv[1])
(ref,) = [ref for ref in store.list() if ref.name == sys.argv[2]]
manifest = store.load(ref)
chunk = chunks.decode(store.read_file(manifest, chunks.CHUNKS), manifest.packs, str(ref))[3]
assert manifest.cuda.served_bytes > 3 * chunks.CHUNK
print(json.dumps([str(store.pack_path(manifest.packs[chunk.pack].digest)), chunk.offset + chunk.stored // 3]))
"""
"""Where a byte of device memory lies: the first chunks are those."""


@pytest.mark.parametrize("source", CASES, indirect=True)
def test_goes_on_bit_for_bit(fleet: Fleet, source: Running, figures: dict[str, Any]) -> None:
    expected = source.answers(BEFORE + AFTER)
    checksum = source.ask("/checksum")
    source.ask("/reset")
    assert source.answers(BEFORE) == expected[:BEFORE], "the program is not deterministic"

    snapshot = source.name.removeprefix("source-")
    said = fleet.capture(source, snapshot)
    figures["capture"] = {key: said[key] for key in ("paused_seconds", "total_seconds", "device_bytes", "memory_bytes")}
    state = source.ask("/state")
    least = state.get("weights", 0) + state.get("kv_bytes", 0)
    assert said["device_bytes"] > least, "the library did not serve all"
    assert source.answers(AFTER) == expected[BEFORE:], "the source was changed by the capture"
    assert source.ask("/checksum") == checksum
    source.stop()

    copy = fleet.restore(f"copy-{snapshot}", source, snapshot)
    found = notes(copy)
    assert found["verified_on_gpu"] is True and "read_again" not in found, found
    assert copy.answers(1) == expected[BEFORE : BEFORE + 1], "the restored program goes on differently"
    # What it has now is imported, and has to be made its own for this.
    assert fleet.capture(copy, f"{snapshot}-again")["device_bytes"] == said["device_bytes"]
    assert copy.answers(AFTER - 1) == expected[BEFORE + 1 :]
    assert copy.ask("/checksum") == checksum
    copy.stop()

    again = fleet.restore(f"again-{snapshot}", source, f"{snapshot}-again")
    assert again.answers(AFTER - 1) == expected[BEFORE + 1 :], "the second generation goes on differently"
    assert again.ask("/checksum") == checksum
    again.ask("/reset")
    assert again.answers(BEFORE + AFTER) == expected
    again.stop()


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def notes(running: Running) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(trace(running).read_text())["otherData"]
    return found


@pytest.mark.parametrize("source", ["served-copied"], indirect=True)
def test_captured_by_way_of_a_copy(fleet: Fleet, source: Running, figures: dict[str, Any]) -> None:
    """Weights, and a cache of which little was used: the source goes on while they are stored, and both are right."""
    node = source.node
    expected = source.answers(BEFORE + AFTER)
    checksum = source.ask("/checksum")
    source.ask("/reset")
    source.answers(BEFORE)
    node.configure(gpu_copy=25)
    try:
        said = fleet.capture(source, "served-copied")
    finally:
        node.configure()
    figures["copied"] = said
    assert source.answers(AFTER) == expected[BEFORE:]
    assert source.ask("/checksum") == checksum
    assert said["device_zero_bytes"] > 3 << 30, "the cache is stored"
    assert said["notes"] == ["device memory was stored out of a copy on the GPU (gpu_copy)"]
    source.stop()
    copy = fleet.restore("copy-copied", source, "served-copied")
    assert copy.answers(AFTER) == expected[BEFORE:]
    assert copy.ask("/checksum") == checksum
    copy.stop()


@pytest.mark.parametrize("source", ["served-damaged"], indirect=True)
def test_a_damaged_chunk(fleet: Fleet, source: Running, figures: dict[str, Any]) -> None:
    """The GPU finds it, and it is not run; whole again, it is."""
    node = source.node
    expected = source.answers(2)
    fleet.capture(source, "served-damaged")
    source.stop()
    # The Python that runs this may have no rewarm.
    words = [f"{node.prefix}/venv/bin/python3", "-I", "-c", PLACE, str(node.store), "served-damaged"]
    path, offset = json.loads(command(*words).stdout)
    flip(Path(path), offset)
    cold = fleet.start("cold-damaged", source.case, snapshot="served-damaged", env=source.env)
    outcome = cold.outcome()
    figures["outcome"] = outcome
    assert outcome["outcome"] == "cold", outcome
    assert "its bytes are not what its digest says" in outcome["reason"], outcome
    cold.wait_ready()
    assert cold.answers(2) == expected
    cold.stop()
    flip(Path(path), offset)
    copy = fleet.restore("copy-damaged", source, "served-damaged")
    copy.ask("/reset")
    assert copy.answers(2) == expected
    copy.stop()


@pytest.mark.parametrize("source", ["served-killed"], indirect=True)
def test_a_capture_killed_at_any_moment(
    card: None, fleet: Fleet, source: Running, checkpoints: Checkpoints, figures: dict[str, Any]
) -> None:
    checksum = source.ask("/checksum")
    expected = source.answers(KILLS)
    source.ask("/reset")
    node = source.node
    using = checkpoints.using(source.pids())
    began = time.monotonic()
    fleet.capture(source, "served-killed")
    duration = time.monotonic() - began
    figures["moments"] = []
    for number in range(KILLS):
        delay = duration * (number + random.random()) / KILLS
        words: list[str | Path] = [node.prefix / "bin/rewarm", "capture", source.name, "--name", "served-killed"]
        with subprocess.Popen(words, env={**os.environ, **node.env}, stdout=subprocess.DEVNULL) as tool:
            time.sleep(delay)
            tool.send_signal(signal.SIGKILL)
        figures["moments"].append([round(delay, 3), [checkpoints.state(pid) for pid in using]])
        assert source.ask() == expected[number]
        assert source.ask("/checksum") == checksum
    wait_for("all running", lambda: all(checkpoints.state(pid) == RUNNING for pid in using), timeout=60)
    fleet.capture(source, "served-killed")
    source.stop()
    copy = fleet.restore("copy-served-killed", source, "served-killed")
    assert copy.ask("/checksum") == checksum
