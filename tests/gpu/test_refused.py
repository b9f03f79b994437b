"""What the driver cannot checkpoint is refused by name, and the source runs on."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from support.bundle import bind
from support.gpu.checkpoints import RUNNING, Checkpoints
from support.gpu.fleet import Fleet, Running
from support.proc import Timeout


@contextmanager
def states(checkpoints: Checkpoints, pids: list[int]) -> Iterator[set[int | None]]:
    """The driver's states of the processes that are seen meanwhile; None, where it did not answer, left out."""
    seen: set[int | None] = set()
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            seen.update(checkpoints.state(pid) for pid in pids)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()
        seen.discard(None)


def refused(source: Running, checkpoints: Checkpoints, *words: str, unpaused: bool) -> str:
    """A capture fails and says one of the words; with `unpaused`, no process was held at any time."""
    with states(checkpoints, checkpoints.using(source.pids())) as seen:
        done = source.node.rewarm("capture", source.name, "--name", source.case, check=False)
    said = done.stdout + done.stderr
    assert done.returncode != 0, f"it was captured: {said}"
    assert any(word in said for word in words), f"none of {words} in: {said}"
    assert not unpaused or seen <= {RUNNING}, f"states {seen}: {said}"
    return said.strip()


def goes_on(source: Running, expected: list[Any], checkpoints: Checkpoints) -> None:
    assert source.answers(len(expected)) == expected
    assert {checkpoints.state(pid) for pid in checkpoints.using(source.pids())} <= {RUNNING}


@pytest.mark.parametrize("source", ["managed"], indirect=True)
def test_managed_memory(card: None, source: Running, checkpoints: Checkpoints, figures: dict[str, Any]) -> None:
    expected = source.answers(4)
    source.ask("/reset")
    source.answers(2)
    figures["said"] = refused(source, checkpoints, "managed", unpaused=True)
    goes_on(source, expected[2:], checkpoints)


@pytest.mark.parametrize("source", ["exported"], indirect=True)
def test_exported_handle(card: None, source: Running, checkpoints: Checkpoints, figures: dict[str, Any]) -> None:
    """It shows only after the checkpoint, by the device that is still open: all is undone."""
    expected = source.answers(4)
    source.ask("/reset")
    source.answers(2)
    figures["said"] = refused(source, checkpoints, "exported", "IPC", "/dev/nvidia", unpaused=False)
    goes_on(source, expected[2:], checkpoints)


@pytest.mark.parametrize("source", ["ipc"], indirect=True)
def test_ipc_memory(card: None, source: Running, checkpoints: Checkpoints, figures: dict[str, Any]) -> None:
    """The driver would take it, and never give it back to who has imported it."""
    expected = source.answers(4)
    source.ask("/reset")
    source.answers(2)
    figures["said"] = refused(source, checkpoints, "IPC", unpaused=True)
    goes_on(source, expected[2:], checkpoints)


@pytest.fixture
def mps(card: None, tmp_path: Path) -> Iterator[Path]:
    """An MPS daemon of our own, by its directory of pipes: other programs do not see it."""
    path = f"{os.environ.get('PATH', '')}:/usr/local/nvidia/bin"
    control = shutil.which("nvidia-cuda-mps-control", path=path)
    if control is None:
        pytest.skip("not run: no nvidia-cuda-mps-control here")
    pipes = tmp_path / "mps"
    pipes.mkdir()
    env = {
        **os.environ,
        "PATH": path,
        "CUDA_MPS_PIPE_DIRECTORY": str(pipes),
        "CUDA_MPS_LOG_DIRECTORY": str(tmp_path),
    }
    done = subprocess.run([control, "-d"], env=env, capture_output=True, text=True, timeout=20)
    if done.returncode != 0:
        pytest.skip(f"not run: MPS does not start: {done.stdout}{done.stderr}")
    try:
        yield pipes
    finally:
        subprocess.run([control], input="quit -t 5\n", env=env, text=True, timeout=40, check=False)


def test_mps_client(mps: Path, fleet: Fleet, checkpoints: Checkpoints, figures: dict[str, Any]) -> None:
    def shared_ipc(spec: dict[str, Any]) -> None:
        namespaces = spec["linux"]["namespaces"]
        spec["linux"]["namespaces"] = [one for one in namespaces if one["type"] != "ipc"]
        spec["mounts"] = [mount for mount in spec["mounts"] if mount["destination"] != "/dev/mqueue"]

    pipes = "/run/mps-pipes"
    source = fleet.start(
        "source-mps",
        "plain",
        env={"CUDA_MPS_PIPE_DIRECTORY": pipes},
        mounts=[bind(mps, pipes), bind(Path("/dev/shm"), "/dev/shm")],
        change=shared_ipc,
    )
    try:
        try:
            source.wait_ready(30)
        except Timeout as error:
            pytest.skip(f"not run: no MPS client in a container: {error}")
        expected = source.answers(4)
        source.ask("/reset")
        source.answers(2)
        figures["said"] = refused(source, checkpoints, "MPS", unpaused=True)
        goes_on(source, expected[2:], checkpoints)
    finally:
        source.stop()
