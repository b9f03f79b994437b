"""Restores of GPU containers on a machine with a GPU and without package sources; figures as JSON.

    gpu.py CARRIED OUTPUT [--sizes 8,1,llm] [--turns 3] [--cold 3] [--seconds 480] [--directory DIR]
    gpu.py merge OUTPUT PART…            (writes the content of docs/benchmarks/h200.json, prints the table)

CARRIED is what carry.sh gathered. A size is GiB of weights of a PyTorch server with CUDA graphs, "8+20" those and GiB
of a KV cache of which a warm-up has used 64 MiB; `llm` is a transformers model of 8B parameters. They are measured in
the order given. OUTPUT is written after every step: what was not run, for want of time, and what failed, with the ends
of the logs, is in it too. Beside it lie traces of each side's last restore. As root; everything lies in one temporary
directory, which is removed. With REWARM_GPU_FAKE=1 a stand-in without a GPU: REWARM_TEST_PREFIX and REWARM_TEST_ROOTFS
are used as they are, and CARRIED is not.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import gpu_results
from bench import memory16 as device
from bench.gpu_sides import COLD, DISK, PLAIN, REWARM, STOCK, GpuSides, Timed
from bench.memory16 import BEGAN, say
from support import proc
from support.bundle import unmount_below
from support.gpu import checkpoints, evidence
from support.gpu.machine import FAKE, Machine
from support.node import Node

GIB = 1 << 30
LARGE = 12
"""GiB from which CRIU's images of a capture lie in memory: the disk has no room for them beside the store. And from
which every restore counts, also the first of each side: one takes long, with all that belongs to it."""
ALONE = 24
"""GiB from which one side is measured after the other, since both sides' images do not fit."""
USED_MIB = 64
LLM_GIB = 19
"""What the model takes, its KV cache included, roughly."""


class OutOfTime(Exception):
    """Nothing more is begun."""


class Run:
    """The figures so far, and the time that is left."""

    def __init__(self, output: Path, seconds: float) -> None:
        self.output = output
        self.seconds = seconds
        self.found: dict[str, Any] = {"cases": {}, "not_run": [], "failures": {}}

    def save(self) -> None:
        self.found["seconds"] = round(time.monotonic() - BEGAN, 1)
        self.output.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.output.with_suffix(".tmp")
        scratch.write_text(json.dumps(self.found, indent=2, sort_keys=True) + "\n")
        scratch.replace(self.output)

    def keep(self, case: str, side: str, trace: bytes) -> None:
        """The trace of the last restore of a side, beside the figures."""
        if trace and side in (REWARM, PLAIN, DISK):
            name = f"{self.output.stem}-{case}-{side.replace(' ', '-')}.trace.json"
            self.output.with_name(name).write_bytes(trace)

    def need(self, seconds: float, what: str) -> None:
        """Raises OutOfTime, and notes it, unless so many seconds are left."""
        if time.monotonic() - BEGAN + seconds > self.seconds:
            self.found["not_run"].append(what)
            say(f"not run, {seconds:.0f} s are not left: {what}")
            self.save()
            raise OutOfTime(what)

    def record(self, case: str, side: str, timed: Timed, *, counted: bool = True) -> None:
        phases = {key: round(value, 4) for key, value in timed.phases.items() if value > 0.0005}
        shown = {key: round(value, 3) for key, value in phases.items() if value > 0.02}
        say(f"{case}: {side}: {timed.seconds:.3f} s {shown}{'' if counted else ' (not counted)'}")
        if counted:
            figures = self.found["cases"][case]
            figures.setdefault("samples_s", {}).setdefault(side, []).append(round(timed.seconds, 4))
            figures.setdefault("phases_s", {}).setdefault(side, []).append(phases)
            gpu_results.summarise(figures)
        self.save()


def measure(run: Run, label: str, sides: GpuSides, gib: float, asked: argparse.Namespace) -> None:
    figures: dict[str, Any] = {"capture": {}, "gib": gib}
    run.found["cases"][label] = figures
    run.need(30 + gib * 3 if asked.alone else 60 + gib * 6, f"{label}: everything")
    sides.memory = 0 if FAKE else int(gib * GIB)
    run.record(label, COLD, sides.begin(REWARM))
    figures["program"] = sides.ask("/state")
    capture(run, label, sides, REWARM)
    together = gib < ALONE
    if asked.alone:
        sides.end_source()
        turns(run, label, sides, [REWARM], asked.turns, gib, first=1)
        if asked.disk:
            from_disk(run, label, sides, asked.turns, gib)
        sides.forget_snapshot()
        return
    if together:
        sides.end_source()
        # By hand, and by the driver alone: what the library serves is not stock. CRIU by hand ends the source.
        run.record(label, COLD, sides.begin(PLAIN))
        names = [REWARM]
        if asked.plain:
            capture(run, label, sides, PLAIN)
            names.append(PLAIN)
        if capture_by_hand(run, label, sides):
            names.insert(0, STOCK)
        turns(run, label, sides, names, asked.turns, gib, first=1 if gib >= LARGE else 0)
        sides.forget_images()
    else:
        sides.end_source()
        turns(run, label, sides, [REWARM], asked.turns, gib, first=1)
    sides.forget_snapshot()
    if not together and not FAKE and 2.2 * gib * GIB > memory():
        what = f"{label}: {STOCK}: the machine's memory does not hold its images beside the process"
        say(f"not run: {what}")
        run.found["not_run"].append(what)
    elif not together:
        run.need(60 + gib * 4, f"{label}: {STOCK}")
        run.record(label, COLD, sides.begin(PLAIN))
        if capture_by_hand(run, label, sides):
            turns(run, label, sides, [STOCK], asked.turns, gib, first=1)
    while len(figures["samples_s"][COLD]) < (asked.cold if gib < ALONE else 1):
        run.need(20 + gib, f"{label}: {COLD} {len(figures['samples_s'][COLD]) + 1}")
        run.record(label, COLD, sides.run(COLD))


def from_disk(run: Run, label: str, sides: GpuSides, count: int, gib: float) -> None:
    """The same with nothing of the store in memory, and what the disk can do in the same minutes."""
    os.sync()
    rates = run.found["cases"][label].setdefault("disk_gbps", [])
    for _ in range(count):
        rates.append(round(sides.disk_rate(), 2))
        turns(run, label, sides, [DISK], 1, gib, first=1)


def capture(run: Run, label: str, sides: GpuSides, side: str) -> None:
    """A snapshot of the source as it is; of REWARM its device memory is taken out of the driver's hands."""
    said = sides.capture(side, timeout=300)
    run.found["cases"][label]["capture"][side] = said
    say(f"{label}: captured by {side}: {json.dumps(said)}")
    run.save()


def capture_by_hand(run: Run, label: str, sides: GpuSides) -> bool:
    """False, noted as a failure, if it cannot be done: rewarm is measured all the same."""
    try:
        said = sides.capture_by_hand(timeout=240)
    except Exception as error:
        run.found["failures"][f"{label}: {STOCK}"] = f"{error}\n{tail(sides.directory / 'work/dump.log')}"[-4000:]
        say(f"{label}: {STOCK}: capture failed: {error}")
        run.save()
        return False
    finally:
        sides.end_source()
    run.found["cases"][label]["capture"][STOCK] = said
    say(f"{label}: captured by hand: {json.dumps(said)}")
    run.save()
    return True


def turns(run: Run, label: str, sides: GpuSides, names: list[str], count: int, gib: float, *, first: int = 0) -> None:
    """`count` restores of each side, in turn, after one of each that is not counted (unless `first` is 1)."""
    if not FAKE and gib < LARGE:
        os.sync()  # else the disk would be busy with what was captured
    longest = dict.fromkeys(names, 10 + gib)
    for turn in range(first, count + 1):
        for side in list(names):
            run.need(longest[side] * 1.3, f"{label}: {side}, restore {turn} of {count}")
            began = time.monotonic()
            try:
                run.record(label, side, sides.run(side), counted=turn > 0)
                run.keep(label, side, sides.trace)
            except Exception as error:
                failed(run, f"{label}: {side}", error, sides)
                names.remove(side)
                sides.by_hand.cleanup()
                sides.node.runtime.cleanup()
            longest[side] = time.monotonic() - began


def failed(run: Run, what: str, error: BaseException, sides: GpuSides) -> None:
    say(f"{what}: failed: {error}")
    where = "".join(traceback.format_exception(error)[-3:])
    with contextlib.suppress(Exception):
        where += evidence.of(sides.node, sides.by_hand)
    run.found["failures"][what] = where[-8000:]
    run.save()


def memory() -> int:
    """Bytes that the machine has."""
    return int(Path("/proc/meminfo").read_text().split("MemTotal:")[1].split()[0]) << 10


def tail(path: Path) -> str:
    try:
        return "\n".join(path.read_text(errors="replace").splitlines()[-25:])
    except OSError as error:
        return str(error)


def case(run: Run, label: str, directory: Path, prefix: Path, machine: Machine, asked: argparse.Namespace) -> None:
    """One size, with a node of its own; a failure is noted and the next one begins."""
    model = label == "llm"
    weights, _, cache = label.partition("+")
    gib = LLM_GIB if model else float(weights) + float(cache or 0)
    directory = directory / f"case-{label}"
    directory.mkdir()
    settings: dict[str, Any] = {}
    if gib >= LARGE and not FAKE:
        # The device memory and as much again for everything else.
        proc.command("mount", "-t", "tmpfs", "-o", f"size={int(gib * 1.15 + 8) << 30}", "tmpfs", directory)
        settings["work_dir"] = str(directory / "work")
    # As on a node, where it is /run: what is synced there does not wait for the disk.
    (directory / "node/state").mkdir(parents=True)
    if not FAKE:
        proc.command("mount", "-t", "tmpfs", "tmpfs", directory / "node/state")
    # The store on the disk, also of a case whose images are in memory, if it has room.
    store = directory.with_name(f"store-{label}")
    if settings and shutil.disk_usage(directory.parent).free < int(gib * 1.1) * GIB:
        store = directory / "store"
    env = {} if model else {"GIB": weights, "MIB": str(max(1, int(gib * 8)))}
    if cache:
        env |= {"KV_GIB": cache, "KV_USED_MIB": str(USED_MIB)}
    with Node(directory / "node", prefix, store=store, **settings) as node:
        sides = GpuSides(directory, node, machine, checkpoints.here(), "llm" if model else "server", env)
        try:
            measure(run, label, sides, gib, asked)
            run.found["cases"][label]["work_dir"] = "memory" if settings else "disk"
            run.found["cases"][label]["store"] = "memory" if store.parent == directory else "disk"
        except OutOfTime:
            pass
        except Exception as error:
            failed(run, label, error, sides)
        finally:
            sides.close()
            shutil.rmtree(store, ignore_errors=True)
            unmount_below(directory)
            shutil.rmtree(directory, ignore_errors=True)
            run.save()


def gpu() -> dict[str, Any]:
    if FAKE:
        return {"gpu": "none: a stand-in", "driver": "none"}
    try:
        import pynvml  # type: ignore[import-not-found, import-untyped, unused-ignore]

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        found = {
            "gpu": str(pynvml.nvmlDeviceGetName(handle)),
            "driver": str(pynvml.nvmlSystemGetDriverVersion()),
            "gpu_memory": int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
        }
        # Else this process would hold the devices while others are captured.
        pynvml.nvmlShutdown()
        return found
    except Exception as error:
        return {"gpu": f"unknown: {error}", "driver": Path("/proc/driver/nvidia/version").read_text().split("\n")[0]}


def with_run_in_memory() -> None:
    """Go on in a mount namespace whose /run is a tmpfs, unless it is one: as on every node with systemd.

    CRIU keeps what it has found out about the kernel in /run, and on nothing else than a tmpfs; both sides would find
    it out anew in every restore.
    """
    if FAKE or proc.command("stat", "-f", "-c", "%T", "/run").stdout.strip() == "tmpfs":
        return
    # A driver of the GPU operator lies in /run/nvidia.
    script = "if [ -d /run/nvidia ]; then mount --rbind /run/nvidia /mnt; fi; "
    script += "mount -t tmpfs -o mode=755,nosuid,nodev tmpfs /run; "
    script += 'if mountpoint -q /mnt; then mkdir /run/nvidia; mount --move /mnt /run/nvidia; fi; exec "$@"'
    words = ["unshare", "--mount", "--propagation", "private", "sh", "-ec", script, "sh", sys.executable, *sys.argv]
    os.execvp(words[0], words)


def main() -> int:
    if sys.argv[1:2] == ["merge"]:
        merged = gpu_results.merge([Path(word) for word in sys.argv[3:]])
        Path(sys.argv[2]).parent.mkdir(parents=True, exist_ok=True)
        Path(sys.argv[2]).write_text(json.dumps(merged, indent=2, sort_keys=True) + "\n")
        print(gpu_results.table(merged))
        return 0
    options = argparse.ArgumentParser()
    options.add_argument("carried", type=Path)
    options.add_argument("output", type=Path)
    options.add_argument("--sizes", default="8,1,llm")
    options.add_argument("--turns", type=int, default=3)
    options.add_argument(
        "--cold", type=int, default=3, help=f"cold starts, the source's own counted; one from {ALONE} GiB"
    )
    options.add_argument("--alone", action="store_true", help="nothing but rewarm with the device memory library")
    options.add_argument("--plain", action="store_true", help="rewarm without the device memory library as well")
    options.add_argument("--disk", action="store_true", help="with --alone: also with the store out of the page cache")
    options.add_argument("--seconds", type=float, default=480.0, help="begin nothing after this time")
    options.add_argument("--directory", default="/var/tmp")
    asked = options.parse_args()
    with_run_in_memory()
    proc.become_subreaper()
    run = Run(asked.output.resolve(), asked.seconds)

    def leave(_number: int, _frame: object) -> None:
        raise SystemExit("out of time")

    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGALRM, leave)
    signal.setitimer(signal.ITIMER_REAL, asked.seconds + 60)
    directory = Path(tempfile.mkdtemp(prefix="rewarm-gpu-bench-", dir=asked.directory))
    labels = asked.sizes.split(",")
    try:
        prefix = Path(os.environ.get("REWARM_TEST_PREFIX") or directory / "prefix")
        if not FAKE:
            (directory / "rootfs").mkdir()
            os.environ["REWARM_TEST_ROOTFS"] = str(directory / "rootfs")
            os.environ["PATH"] = f"{prefix}/bin:{os.environ['PATH']}"
            # A file system of its own: overlayfs refuses a layer that lies inside another, and the lowest is all of /.
            proc.command("mount", "-t", "tmpfs", "tmpfs", directory / "rootfs")
            device.install(asked.carried.resolve(), prefix)
            say("installed")
        run.found["run"] = proc.command("stat", "-f", "-c", "%T", "/run").stdout.strip()
        run.found |= {**device.machine(prefix), **gpu()} if not FAKE else gpu()
        run.save()
        if not FAKE:
            device.touch()
        machine = Machine.here()
        for label in labels:
            case(run, label, directory, prefix, machine, asked)
    except BaseException as error:
        run.found["failures"]["the run"] = f"{type(error).__name__}: {error}"
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        done = run.found["cases"]
        run.found["not_run"] += [f"{label}: everything" for label in labels if label not in done]
        run.save()
        say(json.dumps({label: one.get("median_s") for label, one in done.items()}))
        unmount_below(directory)
        shutil.rmtree(directory, ignore_errors=True)
    return 1 if run.found["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
