"""The figures of bench/gpu.py: medians, ratios, and several runs' parts as one file."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

STOCK, REWARM, COLD = "criu and driver", "rewarm", "cold"
MAIN, LARGEST = "8", "40"
"""The cases that the targets speak of."""


def summarise(case: dict[str, Any]) -> None:
    """Adds medians of the samples and phases, and the ratios, to the figures of one case."""
    samples: dict[str, list[float]] = case.get("samples_s", {})
    medians = {side: round(statistics.median(found), 4) for side, found in samples.items() if found}
    case["median_s"] = medians
    case["median_phases_s"] = {}
    for side, turns in case.get("phases_s", {}).items():
        names = dict.fromkeys(name for phases in turns for name in phases)
        case["median_phases_s"][side] = {
            name: round(statistics.median([phases[name] for phases in turns if name in phases]), 4) for name in names
        }
    for key, side in (("speedup_vs_criu_driver", STOCK), ("speedup_vs_cold", COLD)):
        if REWARM in medians and side in medians:
            case[key] = round(medians[side] / medians[REWARM], 2)


def merge(parts: list[Path]) -> dict[str, Any]:
    """All cases of all parts; of one that several have, the one with more restores by rewarm."""
    merged: dict[str, Any] = {"cases": {}, "not_run": [], "failures": {}}
    done: dict[str, Any] = merged["cases"]
    chosen: dict[str, Path] = {}
    read = {path: json.loads(path.read_text()) for path in parts}
    for path, part in read.items():
        here = {key: value for key, value in part.items() if key not in ("cases", "not_run", "failures", "seconds")}
        for name, case in part["cases"].items():
            if not case.get("samples_s"):
                continue  # it was begun when time was up
            if name not in done or _weight(case) > _weight(done[name]):
                done[name] = {**case, "where": here}
                chosen[name] = path
    for path, part in read.items():
        # What another part has in full is no longer missing.
        kept = [text for text in (*part["not_run"], *part["failures"]) if chosen.get(text.split(":")[0], path) == path]
        merged["not_run"] += [text for text in part["not_run"] if text in kept]
        merged["failures"] |= {text: said for text, said in part["failures"].items() if text in kept}
    places = [case["where"] for case in done.values()]
    if places and all(place == places[0] for place in places):
        merged |= places[0]
        for case in done.values():
            del case["where"]
    main = done.get(MAIN, {})
    merged["speedup_vs_criu_driver_8g"] = main.get("speedup_vs_criu_driver")
    merged["speedup_vs_cold_8g"] = main.get("speedup_vs_cold")
    largest = done.get(LARGEST, {})
    merged["device_8g_speedup_vs_stock"] = main.get("speedup_vs_criu_driver")
    merged["device_40g_s"] = largest.get("median_s", {}).get(REWARM)
    load = largest.get("median_phases_s", {}).get(REWARM, {}).get("device.load")
    merged["device_load_gbps"] = round(largest["gib"] * (1 << 30) / load / 1e9, 1) if load else None
    merged["phases"] = {name: case.get("median_phases_s", {}) for name, case in done.items()}
    return merged


def _weight(case: dict[str, Any]) -> int:
    return len(case.get("samples_s", {}).get(REWARM, []))


def table(merged: dict[str, Any]) -> str:
    """Lines of Markdown for the README."""
    head = (
        "weights", "cold start", "CRIU + driver by hand", "rewarm", "against by hand", "of rewarm: CRIU", "fill",
        "CUDA", "answer", "snapshot", "one capture: pause, in all", "restores",
    )  # fmt: skip
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for name, case in sorted(merged["cases"].items(), key=_size):
        medians = case.get("median_s", {})
        phases = case.get("median_phases_s", {}).get(REWARM, {})
        said = case.get("capture", {}).get(REWARM, {})
        cells = [_label(name)]
        cells += [_seconds(medians.get(side)) for side in (COLD, STOCK, REWARM)]
        ratio = case.get("speedup_vs_criu_driver")
        cells.append("-" if ratio is None else f"{ratio:.2f}")
        cells += [_seconds(phases.get(key)) for key in ("restore.runc", "restore.fill", "restore.cuda", "answer")]
        cells.append(f"{said['stored_bytes'] / 1e9:.1f} GB" if said.get("stored_bytes") else "-")
        cells.append(f"{_seconds(said.get('paused_seconds'))}, {_seconds(said.get('total_seconds'))}")
        cells.append(str(_weight(case)))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _size(entry: tuple[str, Any]) -> tuple[bool, list[float]]:
    """GiB first, models last."""
    name = entry[0]
    return not name[0].isdigit(), [float(part) for part in name.split("+")] if name[0].isdigit() else []


def _label(name: str) -> str:
    weights, _, cache = name.partition("+")
    if not name[0].isdigit():
        return name
    return f"{weights} GiB and {cache} of KV cache" if cache else f"{name} GiB"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} s"
