"""The kernel that takes digests on the GPU, run without one (support/ptx.py), against the library that captures use."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest
from blake3 import blake3

from rewarm.gpu import blake3_ptx
from rewarm.gpu.pieces import WINDOW
from support.ptx import Block

BASE = 0x7F0000000000


def digests(windows: list[bytes], order: list[int] | None = None) -> list[bytes]:
    """What the kernel finds for windows that lie one after the other, asked for in this order."""
    order = list(range(len(windows))) if order is None else order
    data = b"".join(windows)
    addresses = b"".join((BASE + at * WINDOW).to_bytes(8, "little") for at in order)
    addresses += bytes(-len(addresses) % 16)  # the kernel writes 16 bytes at a time
    found = BASE + len(data) + len(addresses)
    memory = np.frombuffer(data + addresses + bytes(32 * len(order)), np.uint32).copy()
    for number in range(len(order)):
        block = Block(blake3_ptx.text(), blake3_ptx.THREADS, memory, BASE)
        block.run({"addresses": BASE + len(data), "found": found}, number)
    everything = memory.tobytes()
    assert everything.startswith(data), "the windows were written"
    return [everything[found - BASE + at * 32 :][:32] for at in range(len(order))]


@pytest.mark.parametrize("seed", range(2))
def test_the_digest_of_any_bytes(seed: int) -> None:
    window = random.Random(seed).randbytes(WINDOW)
    assert digests([window]) == [blake3(window).digest()]


def test_zeros_and_ones() -> None:
    windows = [bytes(WINDOW), b"\xff" * WINDOW]
    assert digests(windows) == [blake3(window).digest() for window in windows]


def test_several_windows_in_any_order() -> None:
    windows = [random.Random(seed).randbytes(WINDOW) for seed in range(3)]
    assert digests(windows, [2, 0, 1]) == [blake3(windows[at]).digest() for at in (2, 0, 1)]


@pytest.mark.parametrize("at", [0, 1023, 1024, 65, WINDOW // 2, WINDOW - 1])
def test_every_byte_counts(at: int) -> None:
    window = bytearray(random.Random(5).randbytes(WINDOW))
    before = blake3(window).digest()
    window[at] ^= 1
    found = digests([bytes(window)])
    assert found != [before]
    assert found == [blake3(window).digest()]


def test_two_chunks_that_have_changed_places() -> None:
    window = random.Random(6).randbytes(WINDOW)
    swapped = window[1024:2048] + window[:1024] + window[2048:]
    assert digests([swapped]) == [blake3(swapped).digest()] != digests([window])


@pytest.mark.parametrize("kept", ["neither", "first", "second"])
def test_the_levels_of_the_tree_wait_for_each_other(kept: str) -> None:
    """Before a level is read, and again before it is written over: without either barrier the block is refused."""
    before, first, between, second, after = re.split(r"(bar\.sync 0;\n)", blake3_ptx.text())
    text = before + first * (kept == "first") + between + second * (kept == "second") + after
    memory = np.zeros((WINDOW + 16 + 32) // 4, np.uint32)
    memory[WINDOW // 4 :][:2] = np.frombuffer(BASE.to_bytes(8, "little"), np.uint32)
    block = Block(text, blake3_ptx.THREADS, memory, BASE)
    with pytest.raises(AssertionError, match="another thread's"):
        block.run({"addresses": BASE + WINDOW, "found": BASE + WINDOW + 16}, 0)


@pytest.mark.parametrize(
    ("capability", "target"), [((6, 0), "sm_50"), ((7, 0), "sm_50"), ((7, 5), "sm_75"), ((10, 0), "sm_75")]
)
def test_the_target(capability: tuple[int, int], target: str) -> None:
    assert f".target {target}\n" in blake3_ptx.text(capability)
