"""fio over files that are there: the rate of each engine, buffered and direct."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from support.proc import command

# Engine, jobs at a time, requests in flight of each.
ENGINES = (("psync", 4, 1), ("io_uring", 2, 8), ("libaio", 2, 8))
BLOCK = "2m"
SMALLEST = 1 << 20  # files that are large enough to count


def engines() -> Iterator[str]:
    """The names of what can be measured: "engine, direct" and "engine, buffered"."""
    for engine, _, _ in ENGINES:
        yield from (f"{engine}, direct", f"{engine}, buffered")


def rate(files: Sequence[Path], name: str, drop: Callable[[], None]) -> float:
    """GB/s of one of `engines`; `drop` takes the files out of the page cache first."""
    engine, _, way = name.partition(", ")
    jobs, depth = next((jobs, depth) for found, jobs, depth in ENGINES if found == engine)
    drop()
    return _rate([file for file in files if file.stat().st_size >= SMALLEST], engine, jobs, depth, way == "direct")


def _rate(files: Sequence[Path], engine: str, jobs: int, depth: int, direct: bool) -> float:
    """GB/s by the time from the first job's start to the last one's end. Raises CommandFailed."""
    common = f"[global]\nrw=read\nbs={BLOCK}\nioengine={engine}\niodepth={depth}\ndirect={int(direct)}\n"
    common += "thread=1\ngroup_reporting=1\nfile_service_type=sequential\n"
    with tempfile.NamedTemporaryFile("w", suffix=".fio") as job:
        job.write(common)
        # The largest first, each to the job with the least to do.
        shares: list[list[Path]] = [[] for _ in range(min(jobs, len(files)))]
        for file in sorted(files, key=lambda item: -item.stat().st_size):
            min(shares, key=lambda share: sum(item.stat().st_size for item in share)).append(file)
        for number, share in enumerate(shares):
            names = ":".join(str(file).replace(":", "\\:") for file in share)
            job.write(f"[job{number}]\nfilename={names}\n")
        job.flush()
        said = command("fio", "--readonly", "--output-format=json", job.name, timeout=300).stdout
    found = json.loads(said[said.index("{") :])["jobs"]
    size = sum(int(entry["read"]["io_bytes"]) for entry in found)
    seconds = max(float(entry["read"]["runtime"]) for entry in found) / 1000
    return size / seconds / 1e9
