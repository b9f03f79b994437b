"""The memory phase and the whole restore on a machine with many cores and no package sources; figures as JSON.

    memory16.py CARRIED OUTPUT [--mib 10240] [--threads 1,4,8,16] [--turns 3] [--seconds 480] [--directory DIR]

CARRIED is what carry.sh gathered. As root, with cgroups, overlayfs and Python. The containers' root filesystem is an
overlay over the machine's own, and their network the machine's: neither iproute2 nor iptables is needed. Everything
lies in one temporary directory, which is removed; mounts and containers as well, also when time is up.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.sides import BY_HAND, HostNetwork, Program, Restored, Sides
from support import proc, rootfs
from support.bundle import unmount_below
from support.node import Node

BEGAN = time.monotonic()


def say(text: str) -> None:
    print(f"{time.monotonic() - BEGAN:6.1f} s  {text}", flush=True)


# What a container and rewarm may run on: the system's, and the one that runs this, seen through virtual environments.
PYTHONS = tuple(dict.fromkeys((os.path.realpath("/usr/bin/python3"), os.path.realpath(sys.executable))))
IMPORTS = "import blake3, yaml, zstandard, click, rich; from rewarm_native import _native"


def install(carried: Path, prefix: Path) -> None:
    """What install.sh would make, out of what was carried. Raises OSError, SystemExit with what is missing."""
    (prefix / "bin").mkdir(parents=True)
    (prefix / "libexec").mkdir()
    shutil.copytree(carried / "criu", prefix / "criu" / "criu")
    (prefix / "criu/bin").mkdir()
    for source, target in (("rewarm-runc", "bin"), ("rewarm-guard", "libexec"), ("runc", "bin"), ("criu", "criu/bin")):
        shutil.copy(carried / "bin" / source, prefix / target / source)
        (prefix / target / source).chmod(0o755)
    (prefix / "lib").mkdir()
    shutil.copy(carried / "bin/rewarm-device-memory.so", prefix / "lib/rewarm-device-memory.so")
    venv = prefix / "venv"
    failures = [failure for python in PYTHONS if (failure := environment(carried, venv, python))]
    if len(failures) == len(PYTHONS):
        raise SystemExit("\n".join(["no Python here takes the carried wheels:", *failures]))
    command = prefix / "bin/rewarm"
    command.write_text(f"#!{venv}/bin/python3 -I\nimport sys\nfrom rewarm.cli import main\nsys.exit(main())\n")
    command.chmod(0o755)
    # The carried runc finds its libraries beside it only where the machine has none of that name.
    missing = [line for line in proc.command("ldd", prefix / "bin/runc").stdout.splitlines() if "not found" in line]
    if missing:
        raise SystemExit(f"runc needs {missing}; copy {carried}/lib/* to /usr/local/lib, and run ldconfig")


def environment(carried: Path, venv: Path, python: str) -> str:
    """Makes the virtual environment with `python`, unless one is there; returns what is wrong with it, or ""."""
    if venv.exists():
        return ""
    done = subprocess.run([python, "-m", "venv", "--without-pip", venv], text=True, capture_output=True)
    if done.returncode == 0:
        [packages] = venv.glob("lib/python3*/site-packages")
        for wheel in sorted((carried / "wheels").glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(packages)
        shutil.copytree(carried / "packages", packages, dirs_exist_ok=True)
        done = subprocess.run([venv / "bin/python3", "-I", "-c", IMPORTS], text=True, capture_output=True)
    if done.returncode == 0:
        subprocess.run([venv / "bin/python3", "-m", "compileall", "-q", packages], check=False)
        return ""
    shutil.rmtree(venv, ignore_errors=True)
    return f"{python}: {done.stdout}{done.stderr}"


TOUCHERS = 8
TOUCH = """
import mmap, sys, time
def available():
    return int(open("/proc/meminfo").read().split("MemAvailable:")[1].split()[0]) >> 10
held = []
for _ in range(int(sys.argv[1])):
    for _ in range(100):  # memory that is plugged in as it is used comes a little later
        if available() > 6144:
            break
        time.sleep(0.1)
    else:
        break
    piece = mmap.mmap(-1, 1 << 28, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        piece.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without them
        pass
    for at in range(0, 1 << 28, 4096):
        piece[at] = 1
    held.append(piece)
print(len(held), flush=True)
sys.stdin.read()
"""


def touch(gib: int = 0) -> None:
    """Touch memory once and give it back: a virtual machine gets it from its host at the first touch. 0: all but 6 GiB,
    since what the kernel gives out later need not be what was touched last."""
    gib = gib or int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) >> 20
    words = [sys.executable, "-c", TOUCH, str(-(-gib * 4 // TOUCHERS))]
    # All hold theirs until the last one has its share: else one would touch what another has given back.
    running = [
        subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(TOUCHERS)
    ]
    pieces = 0
    for one in running:
        assert one.stdout is not None
        pieces += int(one.stdout.readline() or 0)
    for one in running:
        one.communicate()
    total = int(Path("/proc/meminfo").read_text().split("MemTotal:")[1].split()[0]) >> 20
    say(f"touched {pieces / 4:g} of {gib} GiB; the machine has {total} GiB now")


def storage(directory: Path, mib: int) -> str:
    """Where the snapshot and the images lie: the disk if it has room, else memory."""
    needed = mib * 5 << 19  # 2.5 times
    if shutil.disk_usage(directory).free > needed + (2 << 30):
        return "disk"
    proc.command("mount", "-t", "tmpfs", "-o", f"size={needed}", "tmpfs", directory)
    return "tmpfs"


def machine(prefix: Path) -> dict[str, Any]:
    info = Path("/proc/cpuinfo").read_text()
    model = next((line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")), "")
    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}",
        "cpu": model,
        "huge_pages": huge.read_text().strip() if huge.exists() else "none",
        "runc": proc.command(prefix / "bin/runc", "--version").stdout.splitlines()[0],
        "criu": proc.command(prefix / "criu/bin/criu", "--version").stdout.split()[1],
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }


def measure(directory: Path, prefix: Path, asked: argparse.Namespace) -> dict[str, Any]:
    program = Program(
        "memory",
        {"MIB": str(asked.mib), "FAST": "1"},
        layers=[Path("/"), rootfs.workloads()],
        args=[os.path.realpath(prefix / "venv/bin/python3"), "-u", "-m", "support.workloads.memory"],
        network=HostNetwork,
    )
    found: dict[str, Any] = {**machine(prefix), "mib": asked.mib, "samples_s": {}, "memory_gb_per_s": {}}
    with Node(directory / "node", prefix) as node, Sides(directory, node, program, "memory16") as sides:
        captured = sides.capture()
        say(f"captured in {captured.seconds:.1f} s: {json.dumps(captured.said)[:300]}")
        figures = {key: value for key, value in captured.said.items() if key.endswith(("_bytes", "_seconds"))}
        found["capture"] = {"seconds": round(captured.seconds, 3), **figures}
        threads = [int(word) for word in asked.threads.split(",")]
        for turn in range(asked.turns + 1):  # the first is not counted
            for label in (BY_HAND, *threads):
                if isinstance(label, int):
                    node.configure(**({"threads": label} if asked.settings else {}))
                if time.monotonic() - BEGAN > asked.seconds:
                    say("out of time: the medians are over fewer restores")
                    return found
                with sides.restored(BY_HAND if label == BY_HAND else "rewarm") as restored:
                    record(found, restored, str(label), counted=turn > 0)
    return found


def record(found: dict[str, Any], restored: Restored, label: str, *, counted: bool) -> None:
    name = label if label == BY_HAND else f"{label} threads"
    # From the first byte that was asked for to the last that was written: waiting for CRIU counts.
    rate = found["mib"] * (1 << 20) / 1e9 / restored.phases["memory"].seconds if label != BY_HAND else None
    parts = {key: round(phase.seconds, 3) for key, phase in restored.phases.items() if phase.seconds > 0.02}
    say(f"{name}: {restored.seconds:.3f} s" + (f", memory {rate:.2f} GB/s" if rate else "") + f" {parts}")
    if counted:
        found["samples_s"].setdefault(name, []).append(round(restored.seconds, 4))
        if label != BY_HAND:
            found.setdefault("phases_s", {}).setdefault(name, []).append(parts)
            if rate:
                found["memory_gb_per_s"].setdefault(name, []).append(round(rate, 3))


def summary(found: dict[str, Any]) -> None:
    medians = {name: statistics.median(samples) for name, samples in found["samples_s"].items()}
    found["median_s"] = medians
    found["median_memory_gb_per_s"] = {
        name: statistics.median(rates) for name, rates in found["memory_gb_per_s"].items()
    }
    if BY_HAND in medians:
        found["speedup"] = {n: round(medians[BY_HAND] / s, 3) for n, s in medians.items() if n != BY_HAND}


def main() -> int:
    options = argparse.ArgumentParser()
    options.add_argument("carried", type=Path)
    options.add_argument("output", type=Path)
    options.add_argument("--mib", type=int, default=10240)
    options.add_argument("--threads", default="1,4,8,16")
    options.add_argument("--turns", type=int, default=3)
    options.add_argument("--seconds", type=float, default=420.0, help="begin no restore after this time")
    options.add_argument("--directory", default="/var/tmp", help="with room for 2.5 times the memory; else a tmpfs")
    options.add_argument("--no-settings", dest="settings", action="store_false", help="a rewarm without `threads`")
    asked = options.parse_args()
    proc.become_subreaper()

    def leave(_number: int, _frame: object) -> None:
        raise SystemExit("out of time")

    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGALRM, leave)
    signal.setitimer(signal.ITIMER_REAL, asked.seconds + 90)
    directory = Path(tempfile.mkdtemp(prefix="rewarm-memory-", dir=asked.directory))
    found: dict[str, Any] = {}
    try:
        kind = storage(directory, asked.mib)
        prefix = directory / "prefix"
        os.environ["REWARM_TEST_ROOTFS"] = str(directory / "rootfs")
        os.environ["PATH"] = f"{prefix}/bin:{os.environ['PATH']}"
        (directory / "rootfs").mkdir()
        # A file system of its own: overlayfs refuses a layer that lies inside another, and the lowest is all of /.
        proc.command("mount", "-t", "tmpfs", "tmpfs", directory / "rootfs")
        install(asked.carried.resolve(), prefix)
        say("installed")
        touch()
        found = measure(directory, prefix, asked)
        found["storage"] = kind
        summary(found)
        asked.output.parent.mkdir(parents=True, exist_ok=True)
        asked.output.write_text(json.dumps(found, indent=2, sort_keys=True) + "\n")
        say(json.dumps({key: found.get(key) for key in ("median_s", "median_memory_gb_per_s", "speedup")}))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        unmount_below(directory)
        shutil.rmtree(directory, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
