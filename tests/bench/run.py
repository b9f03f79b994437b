"""`make bench`: both sides of each comparison in one run; a table on standard output, the figures as JSON.

    run.py PREFIX OUTPUT [NAME…]       (names of benchmarks; all without one)

Medians, the two sides alternating, after the machine's memory was touched once: on a virtual machine the
first touch of a page is what takes longest.
"""

from __future__ import annotations

import datetime
import json
import mmap
import os
import platform
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import pods, restore, starts, storage
from bench.measured import Case, Measured
from support import proc


def touch_memory(share: float = 0.6) -> None:
    """Touch a share of the free memory once, and give it back."""
    page = os.sysconf("SC_PAGE_SIZE")
    size = int(os.sysconf("SC_AVPHYS_PAGES") * page * share)
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        for at in range(0, size, page):
            memory[at] = 1


CASES: dict[str, Case] = {
    "passthrough": starts.passthrough,
    "model-server": starts.model_server,
    "restore-1g": starts.restore_1g,
    "restore-500m": restore.private_memory(512),
    "restore-3g": restore.private_memory(3072),
    "restore-6g": restore.private_memory(6144),
    "engine": restore.engine,
    "ocr-server": restore.ocr_server,
    "cold": storage.cold,
    "ten-at-once": storage.ten_at_once,
    "sizes": storage.sizes,
    "captures": storage.captures,
    "pods": pods.pods,
}


def main(prefix: Path, output: Path, names: list[str]) -> int:
    proc.become_subreaper()
    touch_memory()
    figures: dict[str, object] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}",
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }
    missed = []
    print(f"| {' | '.join(('what', 'one side', 'the other', 'ratio', 'target'))} |\n| --- | --- | --- | --- | --- |")
    for name, case in CASES.items():
        if names and name not in names:
            continue
        with tempfile.TemporaryDirectory(prefix="rewarm-bench-", dir=os.environ.get("REWARM_BENCH_DIR")) as directory:
            found = case(Path(directory), prefix)
        for done in found:
            figures.update(as_figures(done))
            print(done.row(), flush=True)
            if not done.held:
                missed.append(done.key)
    output.write_text(json.dumps(figures, indent=2, sort_keys=True) + "\n")
    if missed:
        print(f"missed: {', '.join(missed)}", file=sys.stderr)
    return 1 if missed else 0


def as_figures(done: Measured) -> dict[str, object]:
    named = "_".join(filter(None, (done.key, "samples", done.unit.lower().replace("/", "_per_"))))
    samples = {label: [round(sample, 5) for sample in found] for label, found in done.samples.items()}
    return {done.key: round(done.ratio, 4), named: samples, **done.more}


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]), sys.argv[3:]))
