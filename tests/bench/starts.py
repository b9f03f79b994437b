"""What a container start costs: passed through to runc, cold and warm, restored at 1 GiB."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.measured import Measured
from bench.sides import touch_for
from support import rootfs, samples
from support.bundle import Bundle
from support.netns import NetworkNamespace
from support.node import Node
from support.proc import wait_for
from support.runtime import Runtime

PORT = 8000
CYCLES = 101
RESTORES = 7
COLD_STARTS = 3


def passthrough(directory: Path, prefix: Path) -> list[Measured]:
    """A whole create/start/kill/delete cycle of a container without an annotation: rewarm-runc against runc."""
    found: dict[str, list[float]] = {"runc": [], "rewarm-runc": []}
    binaries = {"runc": Path("runc"), "rewarm-runc": prefix / "bin" / "rewarm-runc"}
    runtimes = {name: Runtime(directory / name, binary) for name, binary in binaries.items()}
    try:
        for turn in range(CYCLES + 1):
            for name, runtime in runtimes.items():
                made = Bundle(directory / f"{name}-{turn}", [rootfs.base()], ["sleep", "1000"])
                began = time.monotonic()
                runtime.create("cycle", made)
                runtime.start("cycle")
                runtime.kill("cycle")
                runtime.wait_stopped("cycle")
                runtime.delete("cycle")
                if turn:  # the first of each warms the caches
                    found[name].append(time.monotonic() - began)
                made.close()
    finally:
        for runtime in runtimes.values():
            runtime.cleanup()
    ratio = statistics.median(found["rewarm-runc"]) / statistics.median(found["runc"])
    what = "create/start/kill/delete, not annotated"
    return [Measured(what, "passthrough_ratio", found, ratio, "<= 1.05", ratio <= 1.05)]


def model_server(directory: Path, prefix: Path) -> list[Measured]:
    """`create` to the first right answer of the OCR model server: cold, and restored."""
    page = samples.png("invoice")
    found: dict[str, list[float]] = {"cold": [], "restored": []}
    answers: list[Any] = []
    with Node(directory / "node", prefix) as node:

        def once(label: str, name: str, annotations: dict[str, str]) -> None:
            with NetworkNamespace() as network:
                made = Bundle(
                    node.directory / name,
                    rootfs.layers("ocr_server"),
                    rootfs.args("ocr_server"),
                    env=rootfs.env("ocr_server"),
                    network=network.path,
                    annotations=annotations,
                )
                began = time.monotonic()
                node.runtime.create(name, made)
                node.runtime.start(name)
                answers.append(_first_answer(network, page))
                found[label].append(time.monotonic() - began)
                assert not annotations or node.outcome(name)["outcome"] == ("warm" if label == "restored" else "cold")
                if label == "cold" and not (node.store / "v1").exists():
                    node.rewarm("capture", name, "--name", "ocr")
                node.runtime.stop(name)

        for turn in range(COLD_STARTS):
            once("cold", f"cold-{turn}", {"rewarm.dev/snapshot": "ocr" if turn == 0 else f"none-{turn}"})
        for turn in range(RESTORES):
            once("restored", f"restored-{turn}", {"rewarm.dev/snapshot": "ocr"})
    assert all(answer == answers[0] for answer in answers), "answers differ"
    ratio = statistics.median(found["cold"]) / statistics.median(found["restored"])
    return [Measured("OCR server, create to first answer", "model_server_speedup", found, ratio, ">= 5", ratio >= 5)]


def restore_1g(directory: Path, prefix: Path) -> list[Measured]:
    """A process with 1 GiB of private memory: `rewarm-runc create` and `start` against `runc restore` by hand."""
    found: dict[str, list[float]] = {"runc restore": [], "rewarm": []}
    with Node(directory / "node", prefix) as node:
        environment = {**os.environ, "PATH": f"{prefix}/criu/bin:{os.environ['PATH']}"}
        by_hand = Runtime(directory / "by-hand", "runc", env={"PATH": environment["PATH"]})
        try:
            with NetworkNamespace() as network:
                made = _memory_bundle(node.directory / "source", network)
                node.runtime.create("source", made)
                node.runtime.start("source")
                expected = _hash(network)
                node.rewarm("capture", "source", "--name", "memory")
                images = directory / "images"
                images.mkdir()
                node.runtime.run(
                    "checkpoint",
                    "--leave-running",
                    "--image-path",
                    images,
                    "--work-path",
                    directory / "w",
                    "source",
                    env={"PATH": environment["PATH"]},
                )
                node.runtime.stop("source")
            for turn in range(RESTORES + 1):
                for label in found:
                    seconds = _restore_memory(label, turn, node, by_hand, images, expected)
                    if turn:
                        found[label].append(seconds)
        finally:
            by_hand.cleanup()
    ratio = statistics.median(found["rewarm"]) / statistics.median(found["runc restore"])
    return [Measured("1 GiB process, create and start", "restore_1g_ratio", found, ratio, "<= 1.15", ratio <= 1.15)]


def _restore_memory(label: str, turn: int, node: Node, by_hand: Runtime, images: Path, expected: object) -> float:
    """Seconds until the restored process runs; then its memory is compared with the source's."""
    name = f"{label.split()[0]}-{turn}"
    with NetworkNamespace() as network:
        made = _memory_bundle(node.directory / name, network, {"rewarm.dev/snapshot": "memory"})
        runtime = node.runtime if label == "rewarm" else by_hand
        if label != "rewarm":
            # By hand the container needs the same mounts as the images, control directory included.
            made.spec["annotations"] = {}
            made.write()
        touch_for(1 << 30)
        began = time.monotonic()
        if label == "rewarm":
            runtime.create(name, made)
            runtime.start(name)
        else:
            runtime.restore(name, made, images)
        seconds = time.monotonic() - began
        assert label != "rewarm" or node.outcome(name)["outcome"] == "warm", node.outcome(name)
        assert _hash(network) == expected, "the memory is not the source's"
        runtime.stop(name)
        made.close()
    return seconds


def _memory_bundle(directory: Path, network: NetworkNamespace, annotations: dict[str, str] | None = None) -> Bundle:
    return Bundle(
        directory,
        rootfs.layers("memory"),
        rootfs.args("memory"),
        env=rootfs.env("memory", MIB="1024"),
        network=network.path,
        annotations=annotations or {},
    )


def _hash(network: NetworkNamespace) -> object:
    return wait_for(
        "the hash of the memory", lambda: _try(lambda: network.json(PORT, "/hash", timeout=60)), timeout=120
    )


def _first_answer(network: NetworkNamespace, page: bytes) -> Any:
    ask = lambda: network.json(PORT, "/ocr", body=page)  # noqa: E731
    return wait_for("the first answer", lambda: _try(ask), timeout=120, interval=0.005)


def _try(ask: Callable[[], Any]) -> Any:
    try:
        return ask()
    except OSError:
        return None  # it does not listen yet
