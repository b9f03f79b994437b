"""What the device memory library costs a program that runs: with and without it, in turn, as processes of their own.

    gpu_overhead.py LIBRARY OUTPUT [--turns 6] [--seconds 4]

Needs PyTorch and a GPU. Inference (a small transformer block, batches of changing size, so that the caching allocator
works too), the rate of cudaMalloc and cudaFree of 2, 20 and 64 MiB, the rate of launches of a small kernel, and the
time until PyTorch has its first tensor on the GPU; and, in a program that has nothing else on the GPU, cuMemAlloc and
cuMemFree, by the library and by the driver in turn in one process. Figures are medians; a ratio above 1 is in favour of
the library.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SIZES = (2, 20, 64)


def work(seconds: float) -> dict[str, float]:
    began = time.monotonic()
    import torch  # type: ignore[import-not-found, unused-ignore]

    torch.ones(1, device="cuda").item()
    found = {"start_s": time.monotonic() - began}
    torch.manual_seed(1)
    layer = torch.nn.TransformerEncoderLayer(
        1024, 16, 4096, batch_first=True, device="cuda", dtype=torch.float16
    ).eval()
    with torch.inference_mode():
        for phase in (1.0, seconds):  # the first is not counted
            count, began = 0, time.monotonic()
            while time.monotonic() < began + phase:
                layer(torch.randn(32 + 8 * (count % 5), 512, 1024, device="cuda", dtype=torch.float16)).sum().item()
                count += 1
            found["inference_per_s"] = count / (time.monotonic() - began)
    small = torch.zeros(64, device="cuda")
    torch.cuda.synchronize()
    began = time.monotonic()
    for _ in range(100_000):
        small.add_(1)
    torch.cuda.synchronize()
    found["launches_per_s"] = 100_000 / (time.monotonic() - began)
    for size in SIZES:
        torch.cuda.empty_cache()
        began = time.monotonic()
        for _ in range(300):
            # Each is one cudaMalloc and one cudaFree: nothing is kept in PyTorch's cache.
            held = torch.empty(size << 20, dtype=torch.uint8, device="cuda")
            del held
            torch.cuda.empty_cache()
        found[f"allocations_{size}m_per_s"] = 300 / (time.monotonic() - began)
    return found


def bare() -> dict[str, list[float]]:
    """Microseconds of cuMemAlloc and cuMemFree, in turn as the dynamic linker finds them, where the preloaded library
    stands in front of them, and by the driver's own addresses."""
    driver = ctypes.CDLL("libcuda.so.1", mode=ctypes.RTLD_GLOBAL)
    both = ctypes.CDLL(None), driver
    context, address = ctypes.c_void_p(), ctypes.c_uint64()

    def call(library: ctypes.CDLL, name: str, *arguments: object) -> None:
        result = getattr(library, name)(*arguments)
        if result:
            raise SystemExit(f"{name}: CUresult {result}")

    call(driver, "cuInit", 0)
    call(driver, "cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)
    call(driver, "cuCtxSetCurrent", context)
    found = {}
    for size in SIZES:
        taken: tuple[list[float], list[float]] = [], []
        for _ in range(320):
            for library, its in zip(both, taken, strict=True):
                began = time.perf_counter()
                call(library, "cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size << 20))
                call(library, "cuMemFree_v2", address)
                its.append((time.perf_counter() - began) * 1e6)
        found[f"{size}m"] = [round(statistics.median(one[20:]), 1) for one in taken]
    return found


def asked_of(env: dict[str, str], *words: str) -> Any:
    """What this program says in a process of its own."""
    done = subprocess.run([sys.executable, __file__, *words], env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def main() -> int:
    options = argparse.ArgumentParser()
    options.add_argument("library", type=Path)
    options.add_argument("output", type=Path)
    options.add_argument("--turns", type=int, default=6)
    options.add_argument("--seconds", type=float, default=4.0)
    asked = options.parse_args()
    sides: dict[str, list[dict[str, float]]] = {"without": [], "with": []}
    alone: list[dict[str, list[float]]] = []
    preload = str(asked.library.resolve())
    for turn in range(asked.turns + 1):
        for side, found in sides.items():
            env = dict(os.environ)
            if side == "with":
                env["LD_PRELOAD"] = preload
            figures = asked_of(env, "--work", str(asked.seconds))
            if turn:  # the first of each is not counted
                found.append(figures)
            print(f"{side}: {json.dumps(figures)}", flush=True)
        alone.append(asked_of({**os.environ, "LD_PRELOAD": preload}, "--bare"))
        print(f"alone: {json.dumps(alone[-1])}", flush=True)
    medians = {
        side: {key: statistics.median(one[key] for one in found) for key in found[0]} for side, found in sides.items()
    }
    ratios = {}
    for key, value in medians["without"].items():
        ratio = medians["with"][key] / value
        ratios[key] = round(1 / ratio if key.endswith("_s") and not key.endswith("per_s") else ratio, 4)
    for key in alone[0]:
        its, drivers = (statistics.median(one[key][at] for one in alone) for at in range(2))
        ratios[f"alone_allocations_{key}"] = round(drivers / its, 4)
    document = {"median": medians, "ratio": ratios, "samples": sides, "alone_us": alone}
    asked.output.write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps(ratios))
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        print(json.dumps(work(float(sys.argv[2]))))
    elif sys.argv[1:2] == ["--bare"]:
        print(json.dumps(bare()))
    else:
        sys.exit(main())
