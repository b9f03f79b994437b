"""What the device memory library costs a program that runs: with and without it, in turn, as processes of their own.

    gpu_overhead.py LIBRARY OUTPUT [--turns 6] [--seconds 4]

Needs PyTorch and a GPU. Inference (a small transformer block, batches of changing size, so that the caching allocator
works too), the rate of cudaMalloc and cudaFree of 2, 20 and 64 MiB, the rate of launches of a small kernel, and the
time until PyTorch has its first tensor on the GPU. Figures are medians; a ratio above 1 is in favour of the library.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

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


def main() -> int:
    options = argparse.ArgumentParser()
    options.add_argument("library", type=Path)
    options.add_argument("output", type=Path)
    options.add_argument("--turns", type=int, default=6)
    options.add_argument("--seconds", type=float, default=4.0)
    asked = options.parse_args()
    sides: dict[str, list[dict[str, float]]] = {"without": [], "with": []}
    for turn in range(asked.turns + 1):
        for side, found in sides.items():
            env = dict(os.environ)
            if side == "with":
                env["LD_PRELOAD"] = str(asked.library.resolve())
            words = [sys.executable, __file__, "--work", str(asked.seconds)]
            done = subprocess.run(words, env=env, stdout=subprocess.PIPE, text=True, check=True)
            if turn:  # the first of each is not counted
                found.append(json.loads(done.stdout))
            print(f"{side}: {done.stdout.strip()}", flush=True)
    medians = {
        side: {key: statistics.median(one[key] for one in found) for key in found[0]} for side, found in sides.items()
    }
    ratios = {}
    for key, value in medians["without"].items():
        ratio = medians["with"][key] / value
        ratios[key] = round(1 / ratio if key.endswith("_s") and not key.endswith("per_s") else ratio, 4)
    asked.output.write_text(json.dumps({"median": medians, "ratio": ratios, "samples": sides}, indent=2) + "\n")
    print(json.dumps(ratios))
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        print(json.dumps(work(float(sys.argv[2]))))
    else:
        sys.exit(main())
