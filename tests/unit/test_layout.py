"""Where the chunks of device memory go."""

from __future__ import annotations

import random
from array import array

import pytest

from rewarm.gpu.layout import Layout
from rewarm.gpu.pieces import WINDOW, ZEROS, Piece


@pytest.mark.parametrize("seed", range(20))
def test_against_a_model(seed: int) -> None:
    """Window for window, with chunks in any order and pieces of several GPUs in turn."""
    choose = random.Random(seed)
    patterns = ["".join(choose.choices("x.", k=choose.randint(1, 9))) for _ in range(8)]
    numbers = list(range("".join(patterns).count("x")))
    choose.shuffle(numbers)
    left = iter(numbers)
    pieces = [
        Piece(
            7,
            choose.randrange(3),
            (at + 1) << 32,
            len(pattern) * WINDOW,
            array("I", [next(left) if letter == "x" else ZEROS for letter in pattern]),
        )
        for at, pattern in enumerate(patterns)
    ]
    found = Layout(pieces, 3)
    found.bases = [1 << 40, 2 << 40, 3 << 40]
    zeros = {
        (gpu, found.bases[gpu] + offset + at): (offset, size)
        for gpu, runs in enumerate(found.zeros)
        for offset, size in runs
        for at in range(0, size, WINDOW)
    }
    ends = list(found.bases)
    for piece in pieces:
        start = ends[piece.gpu]
        for chunk in piece.chunks:
            place = piece.gpu, ends[piece.gpu]
            assert (place in zeros) == (chunk == ZEROS)
            if chunk != ZEROS:
                assert found[chunk] == place
            ends[piece.gpu] += WINDOW
        for (gpu, address), (offset, size) in zeros.items():
            if gpu == piece.gpu and start <= address < ends[gpu]:
                assert start <= found.bases[gpu] + offset <= found.bases[gpu] + offset + size <= ends[gpu]
    assert len(zeros) == sum(pattern.count(".") for pattern in patterns)
    # Each is a call of the driver.
    assert sum(map(len, found.zeros)) == sum(len(pattern.replace("x", " ").split()) for pattern in patterns)


def test_nothing() -> None:
    found = Layout([], 1)
    assert found.zeros == [[]]
