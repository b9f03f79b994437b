"""Restores against `runc restore` of the same container: private memory of three sizes, an engine, the OCR server."""

from __future__ import annotations

from pathlib import Path

from bench.measured import Case, Measured, median
from bench.sides import BY_HAND, REWARM, Program, Sides
from support import samples
from support.node import Node

# MiB, restores of each side, what the figure is called, the least speedup.
SIZES = {
    512: (7, "restore_500m_speedup", None),
    3072: (5, "restore_3g_speedup", 2.0),
    6144: (5, "restore_6g_speedup", None),
}
THREADS = (1, 2)
THREAD_TURNS = 5


def private_memory(mib: int) -> Case:
    """Create to first output of a process with `mib` MiB; at 3 GiB the memory phase alone too."""

    def case(directory: Path, prefix: Path) -> list[Measured]:
        turns, key, least = SIZES[mib]
        program = Program("memory", {"MIB": str(mib), "FAST": "1"})
        with Node(directory / "node", prefix) as node, Sides(directory, node, program, "memory") as sides:
            sides.capture()
            what = f"{mib / 1024:g} GiB of private memory, `create` to first output"
            found = [_against(sides, what, key, turns, least)]
            if least:
                found.append(_memory_phase(sides, node))
        return found

    return case


def engine(directory: Path, prefix: Path) -> list[Measured]:
    """Four processes, 2.5 GB, 40 % zero pages."""
    program = Program("vllm_like", {}, ask="/state")
    with Node(directory / "node", prefix) as node, Sides(directory, node, program, "engine") as sides:
        sides.capture()
        what = "vLLM-like, four processes, 2.5 GB, 40 % zeros, to the first answer"
        return [_against(sides, what, "vllm_like_speedup", 5, None)]


def ocr_server(directory: Path, prefix: Path) -> list[Measured]:
    """The model server: the first right answer to a page."""
    program = Program("ocr_server", {}, ask="/ocr", body=samples.png("invoice"))
    with Node(directory / "node", prefix) as node, Sides(directory, node, program, "ocr") as sides:
        sides.capture()
        return [_against(sides, "OCR server, restored, to the first answer", "ocr_restore_speedup", 7, None)]


def _against(sides: Sides, what: str, key: str, turns: int, least: float | None) -> Measured:
    found = sides.alternate(turns)
    ratio = median(found[BY_HAND]) / median(found[REWARM])
    target = f">= {least:g}" if least else "-"
    return Measured(what, key, found, ratio, target, least is None or ratio >= least)


def _memory_phase(sides: Sides, node: Node) -> Measured:
    """GB/s of the fill, for each number of threads in turn."""
    found: dict[str, list[float]] = {f"{threads} thread(s)": [] for threads in THREADS}
    for _turn in range(THREAD_TURNS):
        for threads in THREADS:
            node.configure(threads=threads)
            with sides.restored(REWARM) as restored:
                rate = restored.rate()
            if rate is not None:
                found[f"{threads} thread(s)"].append(rate)
    one, two = (median(found[f"{threads} thread(s)"]) for threads in THREADS)
    ratio = two / one if one else 0.0
    return Measured("the memory phase of 3 GiB", "memory_fill_scaling", found, ratio, "-", True, unit="GB/s")
