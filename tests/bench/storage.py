"""The store: reading it cold, sharing it between restores, what snapshots take there, and what a capture takes."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from bench import fio
from bench.direct import forget
from bench.measured import Measured, median
from bench.sides import REWARM, Capture, Phase, Program, Sides, stored, touch_for
from support import samples
from support.node import Node
from support.proc import command, wait_for

COLD_TURNS = 9
ENGINE_TURNS = 3
SHARED_TURNS = 3
RESTORES = 10
CAPTURES = 3
BIG = Program("memory", {"MIB": "3072", "FAST": "1"})
SMALL = Program("memory", {"MIB": "512", "FAST": "1"})


def cold(directory: Path, prefix: Path) -> list[Measured]:
    """The rate at which a restore reads a store that is not in the page cache, against fio's best over its packs."""
    found: dict[str, list[float]] = {"fio": [], REWARM: []}
    with Node(directory / "node", prefix, cache="off") as node, Sides(directory, node, BIG, "cold") as sides:
        sides.capture(by_hand=False)
        # The page cache and what is read ahead take new memory, too.
        sides.touched = 3.0
        packs = sorted((node.store / "v1" / "packs").rglob("*/*"))
        seconds = []

        def drop() -> None:
            forget(node.store)
            touch_for(sides.memory * sides.touched)  # as before a restore

        def by_fio(engine: str) -> float:
            return fio.rate(packs, engine, drop=drop)

        def by_rewarm() -> float:
            forget(node.store)
            with sides.restored(REWARM) as restored:
                seconds.append(restored.seconds)
                return _read_rate(restored.phases, stored(node.store))

        engines = {name: [by_fio(name) for _ in range(ENGINE_TURNS)] for name in fio.engines()}
        best = max(engines, key=lambda name: median(engines[name]))
        by_rewarm()  # not counted
        seconds.clear()
        # A disk that others use too changes from second to second: the two go one after the other, each first in turn.
        sides_of = {"fio": lambda: by_fio(best), REWARM: by_rewarm}
        for turn in range(COLD_TURNS):
            for label in sorted(sides_of, reverse=turn % 2 == 1):
                found[label].append(sides_of[label]())
    ratio = median(found[REWARM]) / median(found["fio"])
    more = {"cold_fio_gb_per_s": {name: round(median(rates), 3) for name, rates in engines.items()}}
    more["cold_restore_3g_s"] = {"median": round(median(seconds), 4)}
    what = f"3 GiB from a cold disk, against fio ({best})"
    return [Measured(what, "cold_read_fraction", found, ratio, ">= 0.85", ratio >= 0.85, more, unit="GB/s")]


def _read_rate(phases: dict[str, Phase], size: int) -> float:
    """GB/s from the first byte that was asked for to the last that was written, waiting for CRIU included."""
    phase = phases["memory"]
    assert phase.bytes > size * 0.9, "most of the snapshot is memory"
    return phase.bytes / phase.seconds / 1e9


class Share:
    """`source` seen through bindfs at `target`, as over a network: what is read passes through one process."""

    def __init__(self, source: Path, target: Path) -> None:
        self.target = target
        target.mkdir()
        command("bindfs", source, target)
        [self.pid] = wait_for("bindfs", lambda: list(_bindfs(target)))

    def __enter__(self) -> Share:
        return self

    def __exit__(self, *_error: object) -> None:
        command("umount", self.target)
        wait_for("the end of bindfs", lambda: not list(_bindfs(self.target)))

    def bytes_read(self) -> int:
        """By bindfs from the directory behind it, since it was started."""
        words = Path(f"/proc/{self.pid}/io").read_text().split()
        return int(words[words.index("rchar:") + 1])


def _bindfs(target: Path) -> Iterator[int]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if words[0].endswith(b"bindfs") and os.fsencode(target) in words:
                yield int(entry.name)


def ten_at_once(directory: Path, prefix: Path) -> list[Measured]:
    """Ten restores of one snapshot at once on a node, from a share with an empty node-local cache; and one alone."""
    found: dict[str, list[float]] = {"one alone": [], "ten at once": []}
    ratios: list[float] = []
    cache = directory / "cache"
    with Node(directory / "source", prefix) as origin, Sides(directory, origin, SMALL, "shared") as sides:
        sides.capture(by_hand=False)
        size = stored(origin.store)
        with (
            Share(origin.store, directory / "share") as share,
            Node(directory / "node", prefix, store=share.target, cache=str(cache)) as node,
        ):
            sides.node = node
            for turn in range(SHARED_TURNS + 1):
                for label, count in (("one alone", 1), ("ten at once", RESTORES)):
                    shutil.rmtree(cache, ignore_errors=True)
                    before = share.bytes_read()
                    seconds = _at_once(sides, f"{turn}-{count}", count)
                    if turn:
                        found[label].append(seconds)
                        if count > 1:
                            ratios.append((share.bytes_read() - before) / size)
    ratio = median(ratios)
    more = {"ten_restores_share_bytes_ratios": [round(r, 4) for r in ratios], "ten_restores_snapshot_bytes": size}
    what = "ten restores of 0.5 GiB at once; bytes read from the share against the snapshot's"
    return [Measured(what, "ten_restores_share_bytes_ratio", found, ratio, "<= 1.1", ratio <= 1.1, more)]


def _at_once(sides: Sides, name: str, count: int) -> float:
    """Seconds until all of `count` restores, begun together, have answered."""
    names = [f"{name}-{number}" for number in range(count)]
    with ExitStack() as stack:
        networks = {each: stack.enter_context(sides.program.network()) for each in names}
        bundles = [
            sides.program.bundle(sides.node.directory / each, networks[each], sides.annotations()) for each in names
        ]
        runtime = sides.node.runtime
        began = time.monotonic()
        running = [runtime.spawn("create", each, made) for each, made in zip(names, bundles, strict=True)]

        def finish(number: int) -> None:
            process, container = running[number]
            assert process.wait(240) == 0, container.stderr.text()
            runtime.settle(container)
            runtime.start(names[number])
            assert sides.program.answer(networks[names[number]]) == sides.expected

        with ThreadPoolExecutor(count) as pool:
            list(pool.map(finish, range(count)))
        seconds = time.monotonic() - began
        for each, made in zip(names, bundles, strict=True):
            assert sides.node.outcome(each)["outcome"] == "warm", sides.node.outcome(each)
            runtime.stop(each)
            made.close()
    return seconds


def sizes(directory: Path, prefix: Path) -> list[Measured]:
    """Bytes in the store against the memory in use, of one snapshot and of a second one of the same server."""
    programs = {
        "OCR server": Program("ocr_server", {}, ask="/ocr", body=samples.png("invoice")),
        "vLLM-like": Program("vllm_like", {}, ask="/state"),
    }
    found = []
    for what, program in programs.items():
        key = program.workload
        taken: list[Capture] = []
        with Node(directory / key, prefix) as node:
            for name in ("first", "second"):
                with Sides(directory / f"{key}-{name}", node, program, name) as sides:
                    taken.append(sides.capture(by_hand=False))
        added = [(capture.store_after - capture.store_before) / 1e9 for capture in taken]
        in_use = taken[0].said["memory_bytes"] / 1e9
        figures = {"memory": [in_use], "first snapshot": [added[0]], "second of the same": [added[1]]}
        ratio = added[0] / in_use
        more = {f"{key}_second_snapshot_ratio": round(added[1] / in_use, 4)}
        found.append(Measured(f"{what}, in the store", f"{key}_size_ratio", figures, ratio, "-", True, more, unit="GB"))
    return found


def captures(directory: Path, prefix: Path) -> list[Measured]:
    """How long a container with 3 GiB is paused, and how long its capture takes; `runc checkpoint` pauses all along."""
    found: dict[str, list[float]] = {"runc checkpoint": [], "rewarm, paused": [], "rewarm, in all": []}
    for turn in range(CAPTURES):
        with (
            Node(directory / f"node-{turn}", prefix) as node,
            Sides(directory / f"sides-{turn}", node, BIG, "capture") as sides,
        ):
            taken = sides.capture()
            found["runc checkpoint"].append(taken.by_hand_seconds)
            found["rewarm, paused"].append(taken.said["paused_seconds"])
            found["rewarm, in all"].append(taken.seconds)
        shutil.rmtree(directory / f"node-{turn}")
        shutil.rmtree(directory / f"sides-{turn}")
    pause = median(found["rewarm, paused"])
    return [Measured("capture of 3 GiB; the figure is the pause", "capture_3g_pause_s", found, pause, "-", True)]
