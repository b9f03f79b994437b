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
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import cases
from support import proc


def touch_memory(share: float = 0.6) -> None:
    """Touch a share of the free memory once, and give it back."""
    page = os.sysconf("SC_PAGE_SIZE")
    size = int(os.sysconf("SC_AVPHYS_PAGES") * page * share)
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        for at in range(0, size, page):
            memory[at] = 1


def main(prefix: Path, output: Path, names: list[str]) -> int:
    proc.become_subreaper()
    touch_memory()
    known: dict[str, Callable[[Path, Path], cases.Measured]] = {
        "passthrough": cases.passthrough,
        "model-server": cases.model_server,
        "restore-1g": cases.restore_1g,
    }
    figures: dict[str, object] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}",
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }
    missed = []
    print(f"| what | {'|'.join(('one side', 'the other', 'ratio', 'target'))} |\n|---|---|---|---|---|")
    for name, case in known.items():
        if names and name not in names:
            continue
        with tempfile.TemporaryDirectory(prefix="rewarm-bench-", dir=os.environ.get("REWARM_BENCH_DIR")) as directory:
            done = case(Path(directory), prefix)
        figures[done.key] = round(done.ratio, 4)
        figures[f"{done.key}_samples_s"] = {
            label: [round(s, 5) for s in found] for label, found in done.samples.items()
        }
        figures.update(done.more)
        (first, one), (second, two) = done.samples.items()
        print(
            f"| {done.what} | {first} {statistics.median(one):.3f} s | {second} {statistics.median(two):.3f} s "
            f"| {done.ratio:.2f} | {done.target} |",
            flush=True,
        )
        if not done.held:
            missed.append(done.key)
    output.write_text(json.dumps(figures, indent=2, sort_keys=True) + "\n")
    if missed:
        print(f"missed: {', '.join(missed)}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]), sys.argv[3:]))
